"""Warm-up requests, which a server runs on a new version before clients may use it.

They are stored in `assets.extra/tf_serving_warmup_requests`, a TFRecord file of PredictionLog messages. TensorFlow
Serving refuses a version whose warm-up fails, so the exporter replays the requests before it publishes a version.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import prediction_log_pb2

from robust_tf.serving.model import inference
from robust_tf.serving.model.served_model import ServedModel
from robust_tf.serving.model.status import ServingError, invalid
from robust_tf.serving.model.tensors import examples_of, to_array

WARMUP_FILE = pathlib.PurePath("assets.extra", "tf_serving_warmup_requests")
MAX_RECORDS = 1000  # TensorFlow Serving refuses files with more records


def predict_log(
    model_name: str, signature_name: str, inputs: Mapping[str, np.ndarray]
) -> prediction_log_pb2.PredictionLog:
    """Returns a Predict request as a warm-up record."""
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = model_name
    request.model_spec.signature_name = signature_name
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return log


def classify_log(model_name: str, signature_name: str, examples: Sequence[bytes]) -> prediction_log_pb2.PredictionLog:
    """Returns a Classify request for serialized tf.Examples as a warm-up record."""
    log = prediction_log_pb2.PredictionLog()
    request = log.classify_log.request
    request.model_spec.name = model_name
    request.model_spec.signature_name = signature_name
    for example in examples:
        request.input.example_list.examples.add().MergeFromString(example)
    return log


def write_warmup(version_dir: pathlib.Path, logs: Sequence[prediction_log_pb2.PredictionLog]) -> None:
    """Writes the warm-up records of a version, and replaces any earlier ones."""
    path = version_dir / WARMUP_FILE
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())


def replay_warmup(model: ServedModel, *, iterations: int = 1) -> int:
    """Runs the warm-up requests of a version, if it has any, and returns their number.

    Args:
        model: The version.
        iterations: Number of times to run each request.

    Raises:
        ServingError: The file is damaged or too long, or a request fails.
    """
    count = 0
    for count, log in enumerate(_read(model.path / WARMUP_FILE), start=1):
        if count > MAX_RECORDS:
            raise invalid(f"Number of warmup records exceeds the maximum ({MAX_RECORDS})")
        for _ in range(iterations):
            _replay(model, log)
    return count


def _read(path: pathlib.Path) -> Iterator[prediction_log_pb2.PredictionLog]:
    if not path.is_file():
        return
    try:
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            yield prediction_log_pb2.PredictionLog.FromString(record)
    except (tf.errors.DataLossError, DecodeError) as error:
        raise ServingError("DATA_LOSS", f"Cannot read the warm-up file {path}: {error}") from error


def _replay(model: ServedModel, log: prediction_log_pb2.PredictionLog) -> None:
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        request = log.predict_log.request
        inference.predict(
            model,
            {name: to_array(name, proto) for name, proto in request.inputs.items()},
            signature_name=request.model_spec.signature_name,
            outputs=request.output_filter,
        )
    elif kind == "classify_log":
        request = log.classify_log.request
        inference.classify(model, examples_of(request.input), signature_name=request.model_spec.signature_name)
    elif kind == "regress_log":
        request = log.regress_log.request
        inference.regress(model, examples_of(request.input), signature_name=request.model_spec.signature_name)
    elif kind == "multi_inference_log":
        for task in log.multi_inference_log.request.tasks:
            run = inference.classify if task.method_name == inference.CLASSIFY else inference.regress
            examples = examples_of(log.multi_inference_log.request.input)
            run(model, examples, signature_name=task.model_spec.signature_name)
    else:
        raise ServingError("UNIMPLEMENTED", f"Unsupported log_type for warmup: {kind}")
