"""The flags of the server. Reading them does not import TensorFlow, so `--help` answers at once."""

import dataclasses
import os
import re

from robust_tf.errors import UserError
from robust_tf.flags import flag, record
from robust_tf.serving.model.folders import check_local
from robust_tf.serving.server.flags_without_effect import FlagsWithoutEffect

# Enough threads for the concurrent requests that fill a batch. The model itself runs in TensorFlow's own threads.
_THREADS = max(32, 4 * (os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The flags of `python -m robust_tf.serve`.

    They are the flags of `tensorflow_model_server` and, in between, four that exist only here: `bind_address`,
    `max_request_bytes`, `shutdown_grace_seconds` and `check`.
    """

    port: int = flag(8500, "Port for gRPC. 0 turns it off.")
    grpc_socket_path: str = flag("", "Unix socket on which to serve gRPC as well.")
    rest_api_port: int = flag(8501, "Port for REST. 0 turns it off.")
    rest_api_timeout_in_ms: int = flag(
        30_000, "Longest time in milliseconds that the model may run for a REST request."
    )
    rest_api_num_threads: int = flag(_THREADS, "Number of REST requests to work on at the same time.")
    rest_api_enable_cors_support: bool = flag(False, "Allow requests from web pages of other origins.")
    grpc_max_threads: int = flag(_THREADS, "Number of gRPC requests to work on at the same time.")
    grpc_channel_arguments: str = flag(
        "", "Arguments of the gRPC server, separated by commas, such as grpc.max_connection_age_ms=2000."
    )
    enable_grpc_healthcheck_service: bool = flag(False, "Answer the health checks of gRPC (grpc.health.v1).")
    enable_serialization_as_tensor_content: bool = flag(
        False, "Reply to gRPC Predict requests with packed bytes (tensor_content) instead of lists of numbers."
    )
    model_name: str = flag("default", "Name of the model in requests.")
    model_base_path: str = flag("", "Folder that holds the versions of the model.")
    model_config_file: str = flag(
        "", "Text file with a ModelServerConfig, for several models, version policies or labels."
    )
    model_config_file_poll_wait_seconds: float = flag(
        0.0, "Interval in seconds at which to read --model_config_file again. 0 reads it once."
    )
    file_system_poll_wait_seconds: float = flag(
        1.0, "Interval in seconds at which to look for new versions. 0 looks only at the start."
    )
    allow_version_labels_for_unavailable_models: bool = flag(
        False, "Accept a new label before its version is available."
    )
    max_num_load_retries: int = flag(
        0, "Number of times to try again to load a version after a failure, even if its files have not changed."
    )
    load_retry_interval_micros: int = flag(
        60_000_000, "Time in microseconds between two tries to load a version. 0 or less does not wait."
    )
    num_load_threads: int = flag(0, "Number of versions to load at the same time. 0 loads one after the other.")
    num_unload_threads: int = flag(
        0, "Number of threads that free unloaded versions. 0 lets the last request to a version free it."
    )
    enable_model_warmup: bool = flag(True, "Run the warm-up requests of a version before clients may use it.")
    num_request_iterations_for_warmup: int = flag(0, "Number of times to run each warm-up request. 0 means once.")
    enable_signature_method_name_check: bool = flag(
        False, "Refuse signatures whose method_name is not the one of the request. SavedModels of TensorFlow 1 have it."
    )
    saved_model_tags: str = flag("serve", "Tags of the graph to load from the SavedModel, separated by commas.")
    enable_batching: bool = flag(False, "Batch concurrent requests.")
    batching_parameters_file: str = flag("", "Text file with BatchingParameters. Needs --enable_batching.")
    enable_per_model_batching_parameters: bool = flag(
        False,
        "Batch requests to a version with the BatchingParameters in the file batching_params.pbtxt in its folder, and "
        "not at all without this file. Needs --enable_batching.",
    )
    monitoring_config_file: str = flag("", "Text file with a MonitoringConfig, which switches on Prometheus metrics.")
    ssl_config_file: str = flag("", "Text file with an SSLConfig, which switches on TLS for gRPC.")
    tensorflow_intra_op_parallelism: int = flag(0, "Number of threads for one operation. 0 lets TensorFlow choose.")
    tensorflow_inter_op_parallelism: int = flag(
        0, "Number of operations to run at the same time. 0 lets TensorFlow choose."
    )
    tensorflow_session_parallelism: int = flag(
        0, "Number of threads for one operation, and of operations at the same time. 0 lets TensorFlow choose."
    )
    tensorflow_session_config_file: str = flag(
        "", "Text file with a ConfigProto for TensorFlow's sessions. Other flags take precedence."
    )
    per_process_gpu_memory_fraction: float = flag(
        0.0, "Share of a GPU's memory to use, from 0 to 1. 0 lets TensorFlow choose."
    )
    mixed_precision: str = flag("", "bfloat16 computes parts of each model in bfloat16, where the processor can.")
    bind_address: str = flag("127.0.0.1", "Address of both ports. 0.0.0.0 lets other machines connect.")
    max_request_bytes: int = flag(100 * 2**20, "Size in bytes above which a request is refused.")
    shutdown_grace_seconds: float = flag(30.0, "Time in seconds that running requests have to finish after SIGTERM.")
    check: bool = flag(
        False, "Check the files, folders, versions and labels that the flags name, without serving anything."
    )

    version: bool = flag(False, "Print the versions of this server and of TensorFlow, and exit.")
    without_effect: FlagsWithoutEffect = record(FlagsWithoutEffect, "Flags of tensorflow_model_server without effect")

    def __post_init__(self) -> None:
        if self.version:
            return
        if not (self.model_base_path or self.model_config_file):
            raise UserError(
                "--model_base_path or --model_config_file is needed. Received: "
                f"--model_base_path={self.model_base_path!r} --model_config_file={self.model_config_file!r}."
            )
        if self.model_base_path:
            check_local(self.model_base_path, "--model_base_path")
        if self.batching_parameters_file and not self.enable_batching:
            raise UserError(
                "--batching_parameters_file needs --enable_batching. Received: "
                f"--batching_parameters_file={self.batching_parameters_file} alone."
            )
        if not (self.port or self.rest_api_port or self.grpc_socket_path):
            raise UserError("A server needs a port. Received: --port=0 --rest_api_port=0.")
        for name in ("port", "rest_api_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise UserError(f"--{name} must be from 0 to 65535. Received: {getattr(self, name)}.")
        if self.port and self.port == self.rest_api_port:
            raise UserError(
                "gRPC and REST need different ports. Received: "
                f"--port={self.port} --rest_api_port={self.rest_api_port}."
            )
        for name in ("rest_api_num_threads", "grpc_max_threads", "max_request_bytes", "rest_api_timeout_in_ms"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1. Received: {getattr(self, name)}.")
        for name in ("max_num_load_retries", "num_load_threads", "num_unload_threads"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must be at least 0. Received: {getattr(self, name)}.")
        self._check_session()
        self.channel_arguments()

    def _check_session(self) -> None:
        names = ("tensorflow_session_parallelism", "tensorflow_intra_op_parallelism", "tensorflow_inter_op_parallelism")
        if all(getattr(self, name) > 0 for name in names):
            raise UserError(
                f"--{names[0]} sets both --{names[1]} and --{names[2]}, so at most two of them can be given. Received: "
                + " ".join(f"--{name}={getattr(self, name)}" for name in names)
                + "."
            )
        if not 0 <= self.per_process_gpu_memory_fraction <= 1:
            raise UserError(
                "--per_process_gpu_memory_fraction must be from 0 to 1. Received: "
                f"{self.per_process_gpu_memory_fraction}."
            )
        if self.mixed_precision not in ("", "bfloat16"):
            raise UserError(
                f"--mixed_precision must be bfloat16. Received: {self.mixed_precision!r}. Leave it out for float32."
            )

    def channel_arguments(self) -> dict[str, int | str]:
        """Returns the arguments in `grpc_channel_arguments` by name. Integers of up to nine digits are integers.

        Raises:
            UserError: An argument has no name or no value.
        """
        arguments: dict[str, int | str] = {}
        for argument in filter(None, self.grpc_channel_arguments.split(",")):
            name, separator, value = argument.partition("=")
            if not (name and separator and value):
                raise UserError(
                    "--grpc_channel_arguments must be name=value pairs separated by commas, such as "
                    f"grpc.max_connection_age_ms=2000. Received: {argument!r} in {self.grpc_channel_arguments!r}."
                )
            arguments[name] = int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else value
        return arguments

    def warnings(self) -> list[str]:
        """Returns a line for each flag that has no effect, alone or together with other flags."""
        lines = self.without_effect.warnings()
        if self.model_config_file and self.model_base_path:
            lines.append(
                f"--model_base_path={self.model_base_path} has no effect: --model_config_file={self.model_config_file} "
                "names the models"
            )
        if self.enable_per_model_batching_parameters and not self.enable_batching:
            lines.append("--enable_per_model_batching_parameters=true has no effect without --enable_batching")
        return lines

    @property
    def host(self) -> str:
        """The address as it is written before a port, with brackets if it is IPv6."""
        return f"[{self.bind_address}]" if ":" in self.bind_address else self.bind_address

    def addresses(self) -> str:
        """Returns the addresses at which the server answers, as one line of text."""
        rest = [f"http://{self.host}:{self.rest_api_port}/"] if self.rest_api_port else []
        grpc = [f"grpc://{self.host}:{self.port}"] if self.port else []
        sockets = [f"unix:{self.grpc_socket_path}"] if self.grpc_socket_path else []
        return " ".join([*rest, *grpc, *sockets])
