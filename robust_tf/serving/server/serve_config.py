"""The flags of the server. Reading them does not import TensorFlow, so `--help` answers at once."""

import dataclasses
import os

from robust_tf.errors import UserError
from robust_tf.flags import flag
from robust_tf.serving.model.folders import check_local

# Enough threads for the concurrent requests that fill a batch. The model itself runs in TensorFlow's own threads.
_THREADS = max(32, 4 * (os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The flags of `python -m robust_tf.serve`.

    They are the flags of `tensorflow_model_server`, followed by four that exist only here.
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
    enable_model_warmup: bool = flag(True, "Run the warm-up requests of a version before clients may use it.")
    saved_model_tags: str = flag("serve", "Tags of the graph to load from the SavedModel, separated by commas.")
    enable_batching: bool = flag(False, "Batch concurrent requests.")
    batching_parameters_file: str = flag("", "Text file with BatchingParameters. Needs --enable_batching.")
    monitoring_config_file: str = flag("", "Text file with a MonitoringConfig, which switches on Prometheus metrics.")
    ssl_config_file: str = flag("", "Text file with an SSLConfig, which switches on TLS for gRPC.")
    tensorflow_intra_op_parallelism: int = flag(0, "Number of threads for one operation. 0 lets TensorFlow choose.")
    tensorflow_inter_op_parallelism: int = flag(
        0, "Number of operations to run at the same time. 0 lets TensorFlow choose."
    )
    enable_profiler: bool = flag(
        False, "No effect. Accepted because command lines of tensorflow_model_server may contain it."
    )
    bind_address: str = flag("127.0.0.1", "Address of both ports. 0.0.0.0 lets other machines connect.")
    max_request_bytes: int = flag(100 * 2**20, "Size in bytes above which a request is refused.")
    shutdown_grace_seconds: float = flag(30.0, "Time in seconds that running requests have to finish after SIGTERM.")
    check: bool = flag(
        False, "Check the files, folders, versions and labels that the flags name, without serving anything."
    )

    def __post_init__(self) -> None:
        if bool(self.model_base_path) == bool(self.model_config_file):
            raise UserError(
                "Either --model_base_path or --model_config_file is needed. Received: "
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
