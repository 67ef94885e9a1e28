"""Reads the configuration files of `tensorflow_model_server`: models, batching, monitoring, TLS and sessions.

They are protocol buffers in text form. No package contains the messages for batching, monitoring and TLS, so their
fields are declared here, with the same names.
"""

import dataclasses
import os
import pathlib
import ssl
import tempfile
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from google.protobuf.message import Message
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow_serving.config import model_server_config_pb2

from robust_tf.errors import UserError, unknown_name
from robust_tf.serving.model.folders import MAX_VERSION, check_local
from robust_tf.serving.model.status import invalid
from robust_tf.serving.server.model_settings import ModelSettings, RequestLogging
from robust_tf.serving.server.serve_config import ServeConfig

_FIELD = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "robust_tf.serving"

# The fields of each message: name, number, type (a scalar type or the name of a message), and whether it is repeated.
_MESSAGES: dict[str, list[tuple[str, int, Any, bool]]] = {
    "BatchingParameters": [
        ("max_batch_size", 1, "Int64Value", False),
        ("batch_timeout_micros", 2, "Int64Value", False),
        ("max_enqueued_batches", 3, "Int64Value", False),
        ("num_batch_threads", 4, "Int64Value", False),
        ("thread_pool_name", 5, "StringValue", False),
        ("allowed_batch_sizes", 6, _FIELD.TYPE_INT64, True),
        ("pad_variable_length_inputs", 7, _FIELD.TYPE_BOOL, False),
        ("enable_large_batch_splitting", 8, "BoolValue", False),
        ("max_execution_batch_size", 9, "Int64Value", False),
    ],
    "PrometheusConfig": [("enable", 1, _FIELD.TYPE_BOOL, False), ("path", 2, _FIELD.TYPE_STRING, False)],
    "MonitoringConfig": [("prometheus_config", 1, f".{_PACKAGE}.PrometheusConfig", False)],
    "SSLConfig": [
        ("server_key", 1, _FIELD.TYPE_STRING, False),
        ("server_cert", 2, _FIELD.TYPE_STRING, False),
        ("custom_ca", 3, _FIELD.TYPE_STRING, False),
        ("client_verify", 4, _FIELD.TYPE_BOOL, False),
    ],
}
BATCHING_FILE = "batching_params.pbtxt"
_COLLECTORS = ("", "tfrecord")  # types of log collectors; TensorFlow Serving itself defines none
_PROMETHEUS_PATH = "/monitoring/prometheus/metrics"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """How requests are put together in batches. The defaults are those of TensorFlow Serving.

    Attributes:
        max_batch_size: Largest number of rows in a request, and in a batch unless large requests are split.
        batch_timeout_micros: Longest time that the first request of a batch waits for others, in microseconds.
        max_enqueued_batches: Number of batches that may wait. Further requests are refused with UNAVAILABLE.
        num_batch_threads: Number of batches that run at the same time.
        allowed_batch_sizes: Sizes to which batches are padded; a batch is padded to the next larger one. Empty for no
            padding.
        enable_large_batch_splitting: Whether a request that is larger than a batch runs in parts.
        max_execution_batch_size: Largest number of rows in a batch if large requests are split. 0 means the same as
            `max_batch_size`.
    """

    max_batch_size: int = 1000
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 10
    num_batch_threads: int = 2
    allowed_batch_sizes: tuple[int, ...] = ()
    enable_large_batch_splitting: bool = False
    max_execution_batch_size: int = 0

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_enqueued_batches", "num_batch_threads"):
            if getattr(self, name) < 1:
                raise UserError(f"Batching needs {name} to be at least 1. Received: {getattr(self, name)}.")
        if self.batch_timeout_micros < 0:
            raise UserError(
                f"Batching needs batch_timeout_micros to be at least 0. Received: {self.batch_timeout_micros}."
            )
        if self.max_execution_batch_size and not self.enable_large_batch_splitting:
            raise UserError(
                "max_execution_batch_size needs enable_large_batch_splitting. Received: "
                f"max_execution_batch_size={self.max_execution_batch_size} alone."
            )
        if not 0 <= self.max_execution_batch_size <= self.max_batch_size:
            raise UserError(
                "max_execution_batch_size must be from 0 to max_batch_size. Received: "
                f"{self.max_execution_batch_size} with max_batch_size={self.max_batch_size}."
            )
        sizes, last = self.allowed_batch_sizes, "max_batch_size"
        if self.max_execution_batch_size:
            last = "max_execution_batch_size"
        if sizes and (list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != getattr(self, last)):
            raise UserError(
                f"allowed_batch_sizes must increase and end with {last}. Received: "
                f"{list(sizes)} with {last}={getattr(self, last)}."
            )

    def execution_sizes(self) -> list[int] | None:
        """Returns the sizes that a batch may have, or None if any size up to `max_batch_size` may occur."""
        if self.allowed_batch_sizes:
            return list(self.allowed_batch_sizes)
        return list(range(1, self.max_execution_batch_size + 1)) or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tls:
    """Keys and certificates of the gRPC port.

    Attributes:
        server_key: Private key of the server, PEM text.
        server_cert: Certificate of the server, PEM text.
        custom_ca: Certificates of the authorities to verify clients with, PEM text, or "".
        client_verify: Whether clients must show a certificate.
    """

    server_key: str
    server_cert: str
    custom_ca: str
    client_verify: bool


def models_to_serve(config: ServeConfig) -> list[ModelSettings]:
    """Returns the models that the flags name. Each call reads the config file again.

    Raises:
        UserError: The config file cannot be read, or its content is not valid.
    """
    if config.model_config_file:
        return model_settings(read_model_config(pathlib.Path(config.model_config_file)))
    return [ModelSettings(name=config.model_name, base_path=pathlib.Path(config.model_base_path).absolute())]


def read_model_config(path: pathlib.Path) -> model_server_config_pb2.ModelServerConfig:
    """Reads the file of `--model_config_file`."""
    return _parse(path, model_server_config_pb2.ModelServerConfig(), "tensorflow.serving.ModelServerConfig")


def model_settings(config: model_server_config_pb2.ModelServerConfig) -> list[ModelSettings]:
    """Returns the models that a ModelServerConfig names.

    Raises:
        UserError: There are no models, a name is missing or occurs twice, a path is relative, or a platform or policy
            is not supported.
    """
    if config.WhichOneof("config") != "model_config_list":
        received = config.WhichOneof("config") or "an empty file"
        raise UserError(f"A ModelServerConfig needs a model_config_list. Received: {received}.")
    settings: dict[str, ModelSettings] = {}
    for model in config.model_config_list.config:
        if not model.name:
            raise UserError(f"Every model needs a name. Received: base_path: {model.base_path!r} without a name.")
        if model.name in settings:
            raise UserError(f"Illegal to list model {model.name} multiple times in config list")
        check_local(model.base_path, f"base_path of model {model.name}")
        if not pathlib.PurePath(model.base_path).is_absolute():
            raise UserError(
                f"Expected model {model.name} to have an absolute path or URI; got base_path()={model.base_path}"
            )
        is_tensorflow = model.model_platform == "tensorflow" or (
            not model.model_platform and model.model_type == model_server_config_pb2.TENSORFLOW
        )
        if not is_tensorflow:
            raise UserError(
                f'Model {model.name} needs model_platform: "tensorflow". Received: {model.model_platform!r}.'
            )
        settings[model.name] = _one_model(model)
    prefixes = [one.logging.filename_prefix for one in settings.values() if one.logging]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise UserError(
                f"Each model needs its own filename_prefix for request logging. Received: {prefix!r} more than once."
            )
    return list(settings.values())


def _one_model(model: model_server_config_pb2.ModelConfig) -> ModelSettings:
    policy = model.model_version_policy
    kind = policy.WhichOneof("policy_choice")
    specific = tuple(policy.specific.versions) if kind == "specific" else ()
    if kind == "specific" and not specific:
        raise UserError(f"model_version_policy of {model.name} names no version. Received: specific {{ }}.")
    numbers = [*specific, *model.version_labels.values()]
    if any(not 0 <= number <= MAX_VERSION for number in numbers):
        raise UserError(f"A version of model {model.name} must be a number of 0 or more. Received: {numbers}.")
    latest = 0 if kind == "all" else (policy.latest.num_versions or 1)
    return ModelSettings(
        name=model.name,
        base_path=pathlib.Path(model.base_path),
        latest=latest,
        specific=specific,
        labels=dict(model.version_labels),
        logging=_request_logging(model) if model.HasField("logging_config") else None,
    )


def _request_logging(model: model_server_config_pb2.ModelConfig) -> RequestLogging:
    collector, sampling = model.logging_config.log_collector_config, model.logging_config.sampling_config
    for message, supported in (
        (model.logging_config, ("log_collector_config", "sampling_config")),
        (sampling, ("sampling_rate",)),
    ):
        for field, _ in message.ListFields():
            if field.name not in supported:
                raise UserError(
                    f"logging_config of model {model.name} has a field that is not supported. Received: {field.name}."
                )
    if collector.type not in _COLLECTORS:
        raise unknown_name(f"type of log_collector_config of model {model.name}", collector.type, ["tfrecord"])
    prefix, rate = collector.filename_prefix, sampling.sampling_rate
    check_local(prefix, f"filename_prefix of model {model.name}")
    if not pathlib.PurePath(prefix).is_absolute():
        raise UserError(
            f"Request logging needs a filename_prefix with an absolute path. Received: {prefix!r} for model "
            f"{model.name}."
        )
    if not os.access(os.path.dirname(prefix), os.W_OK | os.X_OK):
        raise UserError(
            "Request logging needs a folder that exists and is writable for this user. Received: filename_prefix "
            f"{prefix!r} for model {model.name}."
        )
    if not model.logging_config.HasField("sampling_config") or not 0 <= rate <= 1:
        raise UserError(
            f"Request logging needs sampling_config {{ sampling_rate: 0.1 }}, with a number from 0 to 1. Received: "
            f"{rate:g} for model {model.name}."
        )
    return RequestLogging(prefix, rate)


def read_batching(path: pathlib.Path) -> Batching:
    """Reads the file of `--batching_parameters_file`."""
    message: Any = _parse(path, _MESSAGE_CLASSES["BatchingParameters"](), "tensorflow.serving.BatchingParameters")
    if message.pad_variable_length_inputs:
        raise UserError(
            "pad_variable_length_inputs is not supported: requests whose rows differ in shape go into different "
            f"batches. Received: {path} with this field."
        )
    values: dict[str, Any] = {
        field.name: getattr(message, field.name).value
        for field in dataclasses.fields(Batching)
        if field.name != "allowed_batch_sizes" and message.HasField(field.name)
    }
    return Batching(allowed_batch_sizes=tuple(message.allowed_batch_sizes), **values)


def batching_of_version(path: pathlib.Path, common: Batching) -> Batching | None:
    """Returns the batching of a version that brings its own parameters, or None if it brings none.

    Args:
        path: Folder of the version, which may hold the file `BATCHING_FILE`.
        common: Batching of the server, from which only the number of threads is taken.

    Raises:
        ServingError: The file is not valid (INVALID_ARGUMENT).
    """
    file = path / BATCHING_FILE
    if not file.is_file():
        return None
    try:
        return dataclasses.replace(read_batching(file), num_batch_threads=common.num_batch_threads)
    except UserError as error:
        raise invalid(str(error)) from error


def read_monitoring(path: pathlib.Path) -> str | None:
    """Reads the file of `--monitoring_config_file`. Returns the path that Prometheus scrapes, or None."""
    message: Any = _parse(path, _MESSAGE_CLASSES["MonitoringConfig"](), "tensorflow.serving.MonitoringConfig")
    return (message.prometheus_config.path or _PROMETHEUS_PATH) if message.prometheus_config.enable else None


def read_tls(path: pathlib.Path) -> Tls:
    """Reads the file of `--ssl_config_file`.

    Raises:
        UserError: A key or certificate is missing or damaged, or the key does not belong to the certificate.
    """
    message: Any = _parse(path, _MESSAGE_CLASSES["SSLConfig"](), "tensorflow.serving.SSLConfig")
    if not message.server_key or not message.server_cert:
        raise UserError(f"TLS needs server_key and server_cert. Received: {path} without them.")
    if message.client_verify and not message.custom_ca:
        raise UserError(f"client_verify needs a custom_ca to verify clients with. Received: {path} without it.")
    tls = Tls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(Tls)})
    try:
        _check_pem(tls)
    except (ssl.SSLError, ValueError) as error:
        raise UserError(
            f"TLS needs PEM texts, and a key that belongs to the certificate. Received: {path}: {error}."
        ) from error
    return tls


def read_session(path: pathlib.Path) -> config_pb2.ConfigProto:
    """Reads the file of `--tensorflow_session_config_file`."""
    message: config_pb2.ConfigProto = _parse(path, config_pb2.ConfigProto(), "tensorflow.ConfigProto")
    return message


def session_settings(config: ServeConfig) -> config_pb2.ConfigProto:
    """Returns the settings of the Sessions that run the models, from all flags that concern them."""
    file = config.tensorflow_session_config_file
    settings = read_session(pathlib.Path(file)) if file else config_pb2.ConfigProto()
    intra, inter = config.tensorflow_intra_op_parallelism, config.tensorflow_inter_op_parallelism
    if not (intra or inter):
        intra = inter = config.tensorflow_session_parallelism
    if intra or inter:
        settings.intra_op_parallelism_threads, settings.inter_op_parallelism_threads = intra, inter
    if config.per_process_gpu_memory_fraction:
        settings.gpu_options.per_process_gpu_memory_fraction = config.per_process_gpu_memory_fraction
    if config.mixed_precision:
        settings.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 = (
            rewriter_config_pb2.RewriterConfig.ON
        )
    return settings


def _check_pem(tls: Tls) -> None:
    """Checks keys and certificates, because gRPC would only report that it cannot open its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Python reads keys only from files. No other user can read this temporary file.
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:
        pem.write(f"{tls.server_key}\n{tls.server_cert}\n")
        pem.flush()
        context.load_cert_chain(pem.name, password="")  # without a password, OpenSSL would ask for one on the terminal
    if tls.custom_ca:
        context.load_verify_locations(cadata=tls.custom_ca)


def _parse(path: pathlib.Path, message: Message, name: str) -> Any:
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), message)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the {name} file. Received: {path}: {error}.") from error
    except text_format.ParseError as error:
        raise UserError(f"Error parsing text-format {name}: {path}:{error}") from error


def _message_classes() -> dict[str, type[Message]]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="robust_tf/serving.proto", package=_PACKAGE, syntax="proto3", dependency=[wrappers_pb2.DESCRIPTOR.name]
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind, repeated in fields:
            field = message.field.add(name=field_name, number=number)
            field.label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type = _FIELD.TYPE_MESSAGE
                field.type_name = kind if kind.startswith(".") else f".google.protobuf.{kind}"
            else:
                field.type = kind
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_MESSAGE_CLASSES = _message_classes()
