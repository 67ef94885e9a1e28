"""The embedded server, which loads models, answers on its ports, and stops without losing a request."""

import logging
import math
import os
import pathlib
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import uvicorn

from robust_tf.errors import UserError
from robust_tf.serving.model.folders import why_no_version
from robust_tf.serving.model.served_model import ServedModel
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.server import config_files
from robust_tf.serving.server.batching import BatchedModel
from robust_tf.serving.server.config_files import Batching
from robust_tf.serving.server.grpc_services import add_services
from robust_tf.serving.server.metrics import Metrics
from robust_tf.serving.server.model_settings import ModelSettings
from robust_tf.serving.server.request_logs import RequestLogs
from robust_tf.serving.server.rest import RestApp
from robust_tf.serving.server.serve_config import ServeConfig
from robust_tf.serving.server.service import Service
from robust_tf.serving.server.versions import ModelManager

if TYPE_CHECKING:
    from robust_tf.serving.server.health import HealthService

_LOG = logging.getLogger(__name__)


class Server:
    """One embedded server. It reserves its ports when it is created, and loads the models in `start`.

    Args:
        config: The flags.

    Raises:
        UserError: A file that the flags name is not valid, or a port is in use.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        for warning in config.warnings():
            _LOG.warning("%s", warning)
        self._models = config_files.models_to_serve(config)
        self._batching = _batching(config)
        self._session_settings = config_files.session_settings(config)
        monitoring = config.monitoring_config_file
        metrics_path = config_files.read_monitoring(pathlib.Path(monitoring)) if monitoring else None
        metrics = Metrics()
        self._manager = ModelManager(
            self._load,
            poll_seconds=config.file_system_poll_wait_seconds,
            warm_up=max(1, config.num_request_iterations_for_warmup) if config.enable_model_warmup else 0,
            load_retries=config.max_num_load_retries,
            retry_seconds=config.load_retry_interval_micros / 1e6,
            load_threads=config.num_load_threads,
            unload_threads=config.num_unload_threads,
            labels_before_versions=config.allow_version_labels_for_unavailable_models,
            metrics=metrics,
        )
        self._logs = RequestLogs(metrics)
        self._service = Service(self._manager, metrics, self._logs, tags=config.saved_model_tags.split(","))
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = _bind(config) if config.rest_api_port else None
        self._health: HealthService | None = None
        self._grpc = self._grpc_server() if config.port or config.grpc_socket_path else None
        self._workers = ThreadPoolExecutor(config.rest_api_num_threads, thread_name_prefix="rest")
        app = RestApp(
            self._service,
            workers=self._workers,
            timeout_ms=config.rest_api_timeout_in_ms,
            max_body_bytes=config.max_request_bytes,
            metrics_path=metrics_path,
            cors=config.rest_api_enable_cors_support,
        )
        self._rest = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="warning",
                access_log=False,
                ws="none",
                # Longer than clients and proxies keep idle connections, so that they, not the server, close them.
                timeout_keep_alive=75,
                server_header=False,
                timeout_graceful_shutdown=max(1, int(config.shutdown_grace_seconds)),
            )
        )

    def start(self) -> bool:
        """Loads the models, then opens the ports. Waits until every model has a version.

        Returns:
            Whether the server is now serving. False if it was asked to stop first.

        Raises:
            UserError: A version cannot be loaded, no version can ever appear, or a label has no version.
        """
        self._load_first_versions()
        if self._stopping.is_set():
            return False
        if self._grpc is not None:
            self._grpc.start()
        if self._listener is not None:
            listener = self._listener
            try:
                listener.listen(2048)
            except OSError as error:  # another server has taken the port while this one was loading
                raise _port_error(self._config, "rest_api_port", error.strerror or str(error)) from error
            self._run_in_thread("rest-server", lambda: self._rest.run(sockets=[listener]))
        self._manager.start_polling()
        if self._config.model_config_file and self._config.model_config_file_poll_wait_seconds > 0:
            self._run_in_thread("config-poller", self._poll_config)
        _LOG.info("Serving %s", ", ".join(self._manager.names()))
        return True

    def ask_to_stop(self) -> None:
        """Makes `wait` return. May be called from a signal handler."""
        self._stopping.set()

    def wait(self) -> None:
        """Waits until `ask_to_stop` is called."""
        self._stopping.wait()

    def stop(self) -> None:
        """Stops accepting requests, finishes those that were accepted, then frees the models.

        Requests that take longer than `shutdown_grace_seconds` are cancelled.
        """
        self._stopping.set()
        self._rest.should_exit = True
        if self._health is not None:
            self._health.stop()
        if self._grpc is not None:
            self._grpc.stop(self._config.shutdown_grace_seconds).wait()
        for thread in self._threads:
            thread.join()
        if self._listener is not None:
            self._listener.close()
        self._manager.stop()
        self._workers.shutdown()
        self._logs.close()

    def _load(self, path: pathlib.Path) -> ServedModel:
        batching = self._batching
        if batching is not None and self._config.enable_per_model_batching_parameters:
            batching = config_files.batching_of_version(path, batching)
        model = LoadedModel(
            path,
            tags=self._config.saved_model_tags.split(","),
            session_config=self._session_settings,
            checks_methods=self._config.enable_signature_method_name_check,
        )
        return model if batching is None else BatchedModel(model, batching)

    def _load_first_versions(self) -> None:
        while not self._stopping.is_set():
            _check_that_versions_can_come(self._models)
            label_error = None
            try:
                self._manager.configure(self._models)
            except ServingError as error:
                label_error = error
            failures = self._manager.failures()
            if failures:
                raise UserError(f"{len(failures)} servable(s) did not become available: " + "; ".join(failures))
            if self._manager.ready():
                if label_error:
                    raise UserError(label_error.message)
                return
            retry_seconds = self._manager.seconds_to_retry()
            poll_seconds = self._config.file_system_poll_wait_seconds
            if poll_seconds <= 0 and retry_seconds == math.inf:
                raise UserError(
                    "There is no version to serve, and with --file_system_poll_wait_seconds=0 the server looks only "
                    "once. Received: "
                    + " ".join(
                        f"{model.name}: {model.base_path}. {absence.reason}"
                        for model in self._models
                        if (absence := why_no_version(model.base_path))
                    )
                )
            self._stopping.wait(min(retry_seconds, poll_seconds if poll_seconds > 0 else math.inf))

    def _grpc_server(self) -> grpc.Server:
        config = self._config
        options: dict[str, int | str] = {
            "grpc.max_receive_message_length": config.max_request_bytes,
            "grpc.max_send_message_length": -1,
            "grpc.so_reuseport": 0,
        }
        server = grpc.server(
            ThreadPoolExecutor(config.grpc_max_threads, thread_name_prefix="grpc"),
            options=list((options | config.channel_arguments()).items()),
        )
        add_services(server, self._service, packed=config.enable_serialization_as_tensor_content)
        if config.enable_grpc_healthcheck_service:
            # Imported only here, because this is the only part that needs its package.
            from robust_tf.serving.server.health import HealthService

            self._health = HealthService()
            self._health.add_to(server)
        try:
            if config.port and config.ssl_config_file:
                credentials = _credentials(config_files.read_tls(pathlib.Path(config.ssl_config_file)))
                server.add_secure_port(f"{config.host}:{config.port}", credentials)
            elif config.port:
                server.add_insecure_port(f"{config.host}:{config.port}")
        except RuntimeError as error:
            if self._listener is not None:
                self._listener.close()
            raise _port_error(config, "port", str(error)) from error
        if config.grpc_socket_path:
            try:
                server.add_insecure_port(f"unix:{config.grpc_socket_path}")
            except RuntimeError as error:
                if self._listener is not None:
                    self._listener.close()
                raise UserError(
                    f"Cannot open the Unix socket. Received: --grpc_socket_path={config.grpc_socket_path}: {error}."
                ) from error
        return server

    def _run_in_thread(self, name: str, target: Any) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _poll_config(self) -> None:
        path = self._config.model_config_file
        while not self._stopping.wait(self._config.model_config_file_poll_wait_seconds):
            try:
                models = config_files.models_to_serve(self._config)
                if models != self._models:
                    self._manager.configure(models)
                    # Set only after success, so that a label whose version does not exist yet is tried again.
                    self._models = models
                    _LOG.info("Applied the changes in %s", path)
            except (UserError, ServingError) as error:
                _LOG.error("Cannot apply the changes in %s: %s", path, error)


def _batching(config: ServeConfig) -> Batching | None:
    if not config.enable_batching:
        return None
    if config.batching_parameters_file:
        return config_files.read_batching(pathlib.Path(config.batching_parameters_file))
    return Batching(num_batch_threads=os.cpu_count() or 1)


def _credentials(tls: config_files.Tls) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.server_key.encode(), tls.server_cert.encode())],
        root_certificates=tls.custom_ca.encode() or None,
        require_client_auth=tls.client_verify,
    )


def _check_that_versions_can_come(models: Sequence[ModelSettings]) -> None:
    """Refuses folders in which no version can ever appear."""
    for model in models:
        absence = why_no_version(model.base_path)
        if absence is not None and absence.final:
            raise UserError(
                f"Model {model.name} has no version to serve, and none can appear. Received: "
                f"{model.base_path}. {absence.reason}"
            )


def _bind(config: ServeConfig) -> socket.socket:
    """Returns a socket that occupies the REST port. It refuses connections until it listens."""
    listener = socket.socket(socket.AF_INET6 if ":" in config.bind_address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.bind_address, config.rest_api_port))
    except OSError as error:
        listener.close()
        raise _port_error(config, "rest_api_port", error.strerror or str(error)) from error
    # Accepted connections inherit this option. Without it, the body of a reply would wait 40 ms for the client to
    # acknowledge the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _port_error(config: ServeConfig, flag_name: str, reason: str) -> UserError:
    port = getattr(config, flag_name)
    kind = "gRPC" if flag_name == "port" else "REST"
    return UserError(
        f"Cannot open the {kind} port. Received: --{flag_name}={port} on {config.bind_address}: {reason}. Choose "
        f"another one, for example --{flag_name}={port + 10 if port <= 65525 else port - 10}, or 0 for none."
    )
