"""The parts that REST and gRPC share: choosing a version, measuring and logging requests, status and metadata."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence

from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2, prediction_log_pb2
from tensorflow_serving.config import model_server_config_pb2

from robust_tf.errors import UserError
from robust_tf.serving.model.served_model import ServedModel
from robust_tf.serving.model.status import ServingError, invalid, only_serving_errors
from robust_tf.serving.server.config_files import model_settings
from robust_tf.serving.server.messages import log_metadata
from robust_tf.serving.server.metrics import Metrics
from robust_tf.serving.server.request_logs import LogEntry, RequestLogs
from robust_tf.serving.server.versions import ModelManager
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE

_STATES = get_model_status_pb2.ModelVersionStatus.State


class Service:
    """The models of one server, their metrics and their request logs.

    Args:
        manager: The loaded versions.
        metrics: The metrics that Prometheus reads.
        logs: The request logs.
        tags: Tags of the graphs of the versions, for the logs.

    Attributes:
        manager: The loaded versions.
        metrics: The metrics that Prometheus reads.
    """

    def __init__(self, manager: ModelManager, metrics: Metrics, logs: RequestLogs, *, tags: Sequence[str] = ()) -> None:
        self.manager = manager
        self.metrics = metrics
        self._logs = logs
        self._tags = tags

    @contextlib.contextmanager
    def counted(self, model_name: str, method: str, entrypoint: str) -> Iterator[None]:
        """Counts the request that the block answers. If it succeeds, its time is recorded too.

        Args:
            model_name: Name of the model in the request.
            method: "predict", "classify", "regress" or "multi_inference".
            entrypoint: "REST" or "GRPC".
        """
        # Otherwise, a client could make the metrics grow without limit by inventing names.
        name = model_name if model_name in self.manager.names() else "unknown"
        start = time.perf_counter()
        try:
            with only_serving_errors():
                yield
        except ServingError as error:
            self.metrics.count_request(name, error.code)
            raise
        self.metrics.count_request(name, "OK")
        self.metrics.observe(name, method, entrypoint, microseconds=(time.perf_counter() - start) * 1e6)

    @contextlib.contextmanager
    def leased(self, spec: model_pb2.ModelSpec) -> Iterator[tuple[int, ServedModel]]:
        """Yields the number and the model of the version that a request asks for, and keeps it loaded during the block.

        Raises:
            ServingError: There is no such version.
        """
        if not spec.name:
            raise invalid("ModelSpec has no name specified.")
        choice = spec.WhichOneof("version_choice")
        version = spec.version.value if choice == "version" else None
        label = spec.version_label if choice == "version_label" else ""
        with self.manager.lease(spec.name, version=version, label=label) as leased:
            yield leased

    @contextlib.contextmanager
    def running(self, model_name: str, method: str, *, examples: int) -> Iterator[None]:
        """Records the time of the block as one run of the model.

        Args:
            model_name: Name of the model in the request.
            method: "predict", "classify" or "regress".
            examples: Number of examples in the run.
        """
        start = time.perf_counter()
        yield
        microseconds = (time.perf_counter() - start) * 1e6
        self.metrics.observe_run(model_name, method, microseconds=microseconds, examples=examples)

    def log(
        self,
        spec: model_pb2.ModelSpec,
        number: int,
        *,
        size: Callable[[], int],
        make: Callable[[], prediction_log_pb2.PredictionLog],
    ) -> None:
        """Logs an answered request if its model has request logging and the request belongs to the sample.

        Args:
            spec: Model and signature in the request.
            number: Number of the version that answered.
            size: Function that returns the size of the request in bytes.
            make: Function that returns the log record without its metadata. It is called later in another thread.
        """
        chosen = self.manager.request_logging(spec.name)
        if chosen is None or random.random() >= chosen.sampling_rate:
            return
        served = model_pb2.ModelSpec(name=spec.name, signature_name=spec.signature_name or DEFAULT_SIGNATURE)
        served.version.value = number
        metadata = log_metadata(served, self._tags, chosen.sampling_rate)

        def make_with_metadata() -> prediction_log_pb2.PredictionLog:
            log = make()
            log.log_metadata.CopyFrom(metadata)
            return log

        self._logs.put(LogEntry(chosen.filename_prefix, spec.name, size(), make_with_metadata))

    def status(self, spec: model_pb2.ModelSpec) -> get_model_status_pb2.GetModelStatusResponse:
        """Returns the states of a model's versions. A label is ignored, as in TensorFlow Serving."""
        if not spec.name:
            raise invalid("ModelSpec has no name specified.")
        version = spec.version.value if spec.WhichOneof("version_choice") == "version" else None
        reply = get_model_status_pb2.GetModelStatusResponse()
        for number, state, error in self.manager.states(spec.name, version):
            entry = reply.model_version_status.add(version=number, state=_STATES.Value(state))
            entry.status.error_code = error.number if error else 0
            entry.status.error_message = error.message if error else ""
        return reply

    def metadata(self, spec: model_pb2.ModelSpec) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Returns the signatures of a version."""
        with self.leased(spec) as (number, model):
            reply = get_model_metadata_pb2.GetModelMetadataResponse()
            reply.model_spec.name = spec.name
            reply.model_spec.version.value = number
            signatures = get_model_metadata_pb2.SignatureDefMap()
            for name, definition in model.signatures.items():
                signatures.signature_def[name].CopyFrom(definition)
            reply.metadata["signature_def"].Pack(signatures)
            return reply

    def reload(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        """Serves the models of another configuration from now on.

        Raises:
            ServingError: The configuration is not valid, and nothing has changed (INVALID_ARGUMENT); or a label names
                a version that is not available (FAILED_PRECONDITION; see `ModelManager.configure`).
        """
        try:
            settings = model_settings(config)
        except UserError as error:
            raise invalid(str(error)) from error
        self.manager.configure(settings)
