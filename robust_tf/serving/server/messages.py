"""Replies and log records as messages of the official protos, built from arrays."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tensorflow_serving.apis import classification_pb2, logging_pb2, model_pb2, prediction_log_pb2, regression_pb2

from robust_tf.serving.model.inference import Classification
from robust_tf.serving.model.tensors import to_proto


def fill_classification(reply: classification_pb2.ClassificationResult, result: Classification) -> None:
    """Writes the classes and scores of a batch into a message."""
    classes, scores = result
    rows, width = (scores if scores is not None else classes).shape  # type: ignore[union-attr]  # one is not None
    for row in range(rows):
        entry = reply.classifications.add()
        for column in range(width):
            entry.classes.add(
                label="" if classes is None else classes[row, column].decode("utf-8", "replace"),
                score=0.0 if scores is None else float(scores[row, column]),
            )


def fill_regression(reply: regression_pb2.RegressionResult, values: np.ndarray) -> None:
    """Writes the numbers of a batch into a message."""
    for value in values:
        reply.regressions.add(value=float(value))


def log_of_messages(method: str, request: Any, reply: Any) -> prediction_log_pb2.PredictionLog:
    """Returns the log record of a gRPC request.

    Args:
        method: "predict", "classify", "regress" or "multi_inference".
        request: Message of the request.
        reply: Message of the reply.
    """
    log = prediction_log_pb2.PredictionLog()
    entry = getattr(log, f"{method}_log")
    entry.request.CopyFrom(request)
    entry.response.CopyFrom(reply)
    return log


def log_of_predict(
    spec: model_pb2.ModelSpec, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> prediction_log_pb2.PredictionLog:
    """Returns the log record of a Predict request over REST."""
    log = prediction_log_pb2.PredictionLog()
    request, response = log.predict_log.request, log.predict_log.response
    request.model_spec.CopyFrom(spec)
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(to_proto(value, packed=True))
    for name, value in outputs.items():
        response.outputs[name].CopyFrom(to_proto(value, packed=True))
    return log


def log_of_examples(
    spec: model_pb2.ModelSpec, examples: Sequence[bytes], result: Classification | np.ndarray
) -> prediction_log_pb2.PredictionLog:
    """Returns the log record of a Classify or Regress request over REST.

    Args:
        spec: Model and signature of the request.
        examples: Serialized tf.Examples.
        result: Result of `classify` or `regress`.
    """
    log = prediction_log_pb2.PredictionLog()
    if isinstance(result, Classification):
        request = log.classify_log.request
        fill_classification(log.classify_log.response.result, result)
    else:
        request = log.regress_log.request
        fill_regression(log.regress_log.response.result, result)
    request.model_spec.CopyFrom(spec)
    for example in examples:
        request.input.example_list.examples.add().MergeFromString(example)
    return log


def log_metadata(spec: model_pb2.ModelSpec, tags: Sequence[str], sampling_rate: float) -> logging_pb2.LogMetadata:
    """Returns the metadata of a log record for a request that has just been answered.

    Args:
        spec: Model, number of the version and signature that answered.
        tags: Tags of the version's graph.
        sampling_rate: Share of the requests that are logged.
    """
    metadata = logging_pb2.LogMetadata(model_spec=spec, saved_model_tags=tags, timestamp_secs=int(time.time()))
    metadata.sampling_config.sampling_rate = sampling_rate
    return metadata
