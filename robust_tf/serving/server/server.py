"""The embedded server: starts, watches, drains and stops everything."""

import dataclasses
import logging
import os
import pathlib
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import tensorflow as tf
import uvicorn

from robust_tf.errors import UserError
from robust_tf.flags import flag
from robust_tf.serving.model.folders import why_no_version
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.server import config_files
from robust_tf.serving.server.batching import BatchedModel
from robust_tf.serving.server.config_files import Batching
from robust_tf.serving.server.grpc_services import add_services
from robust_tf.serving.server.metrics import Metrics
from robust_tf.serving.server.model_settings import ModelSettings
from robust_tf.serving.server.rest import RestApp
from robust_tf.serving.server.service import Service
from robust_tf.serving.server.versions import ModelManager

_LOG = logging.getLogger(__name__)
# Enough waiting requests to fill a batch; the model's own work is spread by TensorFlow's threads.
_THREADS = max(32, 4 * (os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The flags of `python -m robust_tf.serve`: those of `tensorflow_model_server`, and a few of ours at the end."""

    port: int = flag(8500, "gRPC port; 0 opens none.")
    grpc_socket_path: str = flag("", "Unix socket to serve gRPC on too.")
    rest_api_port: int = flag(8501, "REST port; 0 opens none.")
    rest_api_timeout_in_ms: int = flag(30_000, "Longest run of a model for a REST request.")
    rest_api_num_threads: int = flag(_THREADS, "REST requests worked on at the same time.")
    rest_api_enable_cors_support: bool = flag(False, "Let web pages of other origins ask.")
    grpc_max_threads: int = flag(_THREADS, "gRPC requests worked on at the same time.")
    model_name: str = flag("default", "Name of the model in requests.")
    model_base_path: str = flag("", "Folder of the model's versions.")
    model_config_file: str = flag("", "Text file of a ModelServerConfig: several models, policies, labels.")
    model_config_file_poll_wait_seconds: float = flag(0.0, "Read that file again so often; 0: never.")
    file_system_poll_wait_seconds: float = flag(1.0, "Look for new versions so often; 0: only at the start.")
    allow_version_labels_for_unavailable_models: bool = flag(False, "Accept new labels before their version.")
    enable_model_warmup: bool = flag(True, "Replay a version's warm-up requests before it takes others.")
    saved_model_tags: str = flag("serve", "Tags of the SavedModel's graph, with commas between them.")
    enable_batching: bool = flag(False, "Run requests that arrive together together.")
    batching_parameters_file: str = flag("", "Text file of BatchingParameters; needs --enable_batching.")
    monitoring_config_file: str = flag("", "Text file of a MonitoringConfig: Prometheus.")
    ssl_config_file: str = flag("", "Text file of an SSLConfig: TLS for gRPC.")
    tensorflow_intra_op_parallelism: int = flag(0, "Threads within an operation; 0: TensorFlow's choice.")
    tensorflow_inter_op_parallelism: int = flag(0, "Operations at the same time; 0: TensorFlow's choice.")
    bind_address: str = flag("127.0.0.1", "Address of both ports; 0.0.0.0 lets other machines in.")
    enable_profiler: bool = flag(False, "Accepted for the command lines of tensorflow_model_server: no profiler here.")
    max_request_bytes: int = flag(100 * 2**20, "Larger requests are refused.")
    shutdown_grace_seconds: float = flag(30.0, "How long requests may take to end after SIGTERM.")
    check: bool = flag(False, "Check the files, folders, versions and labels that the flags name; serve nothing.")

    def __post_init__(self) -> None:
        if bool(self.model_base_path) == bool(self.model_config_file):
            raise UserError(
                "Either --model_base_path or --model_config_file is needed. Received: "
                f"--model_base_path={self.model_base_path!r} --model_config_file={self.model_config_file!r}."
            )
        if self.model_base_path:
            config_files.check_local(self.model_base_path, "--model_base_path")
        if self.batching_parameters_file and not self.enable_batching:
            raise UserError(
                "--batching_parameters_file needs --enable_batching. Received: "
                f"--batching_parameters_file={self.batching_parameters_file} alone."
            )
        if not (self.port or self.rest_api_port or self.grpc_socket_path):
            raise UserError("A server needs a port. Received: --port=0 --rest_api_port=0.")
        for name in ("port", "rest_api_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise UserError(f"--{name} is a number from 0 to 65535. Received: {getattr(self, name)}.")
        if self.port and self.port == self.rest_api_port:
            raise UserError(
                f"gRPC and REST need a port each. Received: --port={self.port} --rest_api_port={self.port}."
            )
        for name in ("rest_api_num_threads", "grpc_max_threads", "max_request_bytes", "rest_api_timeout_in_ms"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is at least 1. Received: {getattr(self, name)}.")

    def models(self) -> list[ModelSettings]:
        """The models to serve, the config file read anew."""
        if self.model_config_file:
            return config_files.model_settings(config_files.read_model_config(pathlib.Path(self.model_config_file)))
        return [ModelSettings(name=self.model_name, base_path=pathlib.Path(self.model_base_path).absolute())]

    @property
    def host(self) -> str:
        """The address as it stands before a port."""
        return f"[{self.bind_address}]" if ":" in self.bind_address else self.bind_address

    def addresses(self) -> str:
        """Where the server answers, for people."""
        rest = [f"http://{self.host}:{self.rest_api_port}/"] if self.rest_api_port else []
        grpc_ = [f"grpc://{self.host}:{self.port}"] if self.port else []
        sockets = [f"unix:{self.grpc_socket_path}"] if self.grpc_socket_path else []
        return " ".join([*rest, *grpc_, *sockets])


class Server:
    """One embedded server; it takes its ports at once, and loads nothing before `start`.

    Args:
        config: the flags.

    Raises:
        UserError: a file that the flags name is at fault, or a port is taken.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        if config.enable_profiler:
            _LOG.warning("--enable_profiler=true has no effect: there is no profiler in this server")
        self._models = config.models()
        self._batching = _batching(config)
        monitoring = config.monitoring_config_file
        metrics_path = config_files.read_monitoring(pathlib.Path(monitoring)) if monitoring else None
        metrics = Metrics()
        self._manager = ModelManager(
            self._load,
            poll_seconds=config.file_system_poll_wait_seconds,
            warm_up=config.enable_model_warmup,
            labels_before_versions=config.allow_version_labels_for_unavailable_models,
            metrics=metrics,
        )
        self._service = Service(self._manager, metrics)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = _bind(config) if config.rest_api_port else None
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
                timeout_keep_alive=75,  # longer than clients and proxies keep an idle connection: they close first
                server_header=False,
                timeout_graceful_shutdown=max(1, int(config.shutdown_grace_seconds)),
            )
        )

    def start(self) -> bool:
        """Loads the models, then answers on the ports; waits for a first version where there is none yet.

        Returns:
            Whether it serves now; False when it was asked to stop before that.

        Raises:
            UserError: a version can't be loaded, none can come, or a label has no version.
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
            except OSError as error:  # another server took the port while this one loaded
                raise _port_error(self._config, "rest_api_port", error.strerror or str(error)) from error
            self._run_in_thread("rest-server", lambda: self._rest.run(sockets=[listener]))
        self._manager.start_polling()
        if self._config.model_config_file and self._config.model_config_file_poll_wait_seconds > 0:
            self._run_in_thread("config-poller", self._poll_config)
        _LOG.info("Serving %s", ", ".join(self._manager.names()))
        return True

    def ask_to_stop(self) -> None:
        """Makes `wait` return; may be called from a signal handler."""
        self._stopping.set()

    def wait(self) -> None:
        """Returns when somebody has asked to stop."""
        self._stopping.wait()

    def stop(self) -> None:
        """Takes no new requests, finishes those that were accepted, then frees the models.

        Those that take longer than `shutdown_grace_seconds` are cancelled.
        """
        self._stopping.set()
        self._rest.should_exit = True
        if self._grpc is not None:
            self._grpc.stop(self._config.shutdown_grace_seconds).wait()
        for thread in self._threads:
            thread.join()
        if self._listener is not None:
            self._listener.close()
        self._manager.stop()
        self._workers.shutdown()

    def _load(self, path: pathlib.Path) -> LoadedModel:
        options: dict[str, Any] = {
            "tags": self._config.saved_model_tags.split(","),
            "session_config": tf.compat.v1.ConfigProto(
                intra_op_parallelism_threads=self._config.tensorflow_intra_op_parallelism,
                inter_op_parallelism_threads=self._config.tensorflow_inter_op_parallelism,
            ),
        }
        if self._batching is None:
            return LoadedModel(path, **options)
        return BatchedModel(path, batching=self._batching, **options)

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
            if self._config.file_system_poll_wait_seconds <= 0:
                raise UserError(
                    "There is no version to serve, and --file_system_poll_wait_seconds=0 looks only once. Received: "
                    + " ".join(
                        f"{model.name}: {model.base_path}. {absence.reason}"
                        for model in self._models
                        if (absence := why_no_version(model.base_path))
                    )
                )
            self._stopping.wait(self._config.file_system_poll_wait_seconds)

    def _grpc_server(self) -> grpc.Server:
        config = self._config
        server = grpc.server(
            ThreadPoolExecutor(config.grpc_max_threads, thread_name_prefix="grpc"),
            options=[
                ("grpc.max_receive_message_length", config.max_request_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        add_services(server, self._service)
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
                models = self._config.models()
                if models != self._models:
                    self._manager.configure(models)
                    self._models = models  # only now: a label whose version isn't there yet is tried again
                    _LOG.info("Read %s again", path)
            except (UserError, ServingError) as error:
                _LOG.error("%s is not in force: %s", path, error)


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
    """Refuses folders in which no version can be, however long the server waits."""
    for model in models:
        absence = why_no_version(model.base_path)
        if absence is not None and absence.final:
            raise UserError(
                f"Model {model.name} has no version to serve, and none can appear. Received: "
                f"{model.base_path}. {absence.reason}"
            )


def _bind(config: ServeConfig) -> socket.socket:
    """A socket that holds the REST port, but refuses connections until it listens."""
    listener = socket.socket(socket.AF_INET6 if ":" in config.bind_address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.bind_address, config.rest_api_port))
    except OSError as error:
        listener.close()
        raise _port_error(config, "rest_api_port", error.strerror or str(error)) from error
    # Accepted connections take this over; else the body of a reply waits for the client's acknowledgement of its
    # headers, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _port_error(config: ServeConfig, flag_name: str, reason: str) -> UserError:
    port = getattr(config, flag_name)
    kind = "gRPC" if flag_name == "port" else "REST"
    return UserError(
        f"Cannot open the {kind} port. Received: --{flag_name}={port} on {config.bind_address}: {reason}. Choose "
        f"another one, for example --{flag_name}={port + 10 if port <= 65525 else port - 10}, or 0 for none."
    )
