"""Predict, Classify and Regress on a model in memory. REST and gRPC share these functions, which take arrays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from robust_tf.serving.model.served_model import ServedModel
from robust_tf.serving.model.session import type_name
from robust_tf.serving.model.status import ServingError, invalid
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE

# The method names that a signature of a SavedModel may declare.
PREDICT = "tensorflow/serving/predict"
CLASSIFY = "tensorflow/serving/classify"
REGRESS = "tensorflow/serving/regress"


class Classification(NamedTuple):
    """The classes of a batch and their scores.

    Attributes:
        classes: Names of the classes, (batch, k) bytes as objects. None if the signature gives scores only.
        scores: Scores of the classes, (batch, k) float32. None if the signature gives classes only.
    """

    classes: np.ndarray | None
    scores: np.ndarray | None


def predict(
    model: ServedModel,
    inputs: Mapping[str, np.ndarray],
    *,
    signature_name: str = "",
    outputs: Iterable[str] = (),
    timeout_ms: int = 0,
) -> dict[str, np.ndarray]:
    """Runs a signature.

    Args:
        model: Model to run.
        inputs: An array for each input of the signature, by name.
        signature_name: Name of the signature. "" stands for `serving_default`.
        outputs: Names of the outputs to compute. All if empty.
        timeout_ms: Longest time of the run in milliseconds. 0 sets no limit.

    Returns:
        An array for each output, by name.

    Raises:
        ServingError: There is no such signature (FAILED_PRECONDITION), or the model refuses the request (see
            `LoadedModel.run`).
    """
    name = signature_name or DEFAULT_SIGNATURE
    definition = model.signature(name)
    if definition is None:
        raise ServingError("FAILED_PRECONDITION", f'Serving signature key "{name}" not found.')
    if model.checks_methods and definition.method_name not in (PREDICT, CLASSIFY, REGRESS):
        raise ServingError(
            "INTERNAL",
            f"Expected prediction signature method_name to be one of {{{PREDICT}, {CLASSIFY}, {REGRESS}}}. Was: "
            f"{definition.method_name}",
        )
    return model.run(name, inputs, outputs, timeout_ms=timeout_ms)


def classify(
    model: ServedModel, examples: Sequence[bytes], *, signature_name: str = "", timeout_ms: int = 0
) -> Classification:
    """Runs a signature that classifies examples.

    Args:
        model: Model to run.
        examples: Serialized tf.Examples.
        signature_name: Name of the signature. "" stands for `serving_default`.
        timeout_ms: Longest time of the run in milliseconds. 0 sets no limit.

    Raises:
        ServingError: The signature does not have the inputs and outputs that Classify needs, or what it computes does
            not have the right shape (INVALID_ARGUMENT).
    """
    definition = _signature_for_examples(model, signature_name, "classification", CLASSIFY)
    if not 1 <= len(definition.outputs) <= 2:
        raise invalid(f"Expected one or two output Tensors, found {len(definition.outputs)}")
    if "inputs" not in definition.inputs:
        raise invalid(f"No classification inputs found in SignatureDef: {list(definition.inputs)}")
    unknown = sorted(set(definition.outputs) - {"classes", "scores"})
    if unknown:
        raise invalid(f"Expected classification outputs named 'classes' and 'scores'. Received: {unknown}")
    _expect_type(definition, "classes", types_pb2.DT_STRING)
    _expect_type(definition, "scores", types_pb2.DT_FLOAT)
    values = _run_on_examples(model, examples, signature_name, timeout_ms)
    for name, value in values.items():
        if value.ndim != 2:
            raise invalid(f"Expected Tensor shape: [batch_size num_classes] but got {list(value.shape)} for {name}")
        if len(value) != len(examples):
            raise invalid(f"Expected {name} output batch size of {len(examples)}. Got: {len(value)}")
    result = Classification(values.get("classes"), values.get("scores"))
    if result.classes is not None and result.scores is not None and result.classes.shape != result.scores.shape:
        raise invalid(
            "Tensors class and score should match in size. Received: classes "
            f"{list(result.classes.shape)}, scores {list(result.scores.shape)}"
        )
    return result


def regress(
    model: ServedModel, examples: Sequence[bytes], *, signature_name: str = "", timeout_ms: int = 0
) -> np.ndarray:
    """Runs a signature that computes one number for each example.

    Args:
        model: Model to run.
        examples: Serialized tf.Examples.
        signature_name: Name of the signature. "" stands for `serving_default`.
        timeout_ms: Longest time of the run in milliseconds. 0 sets no limit.

    Returns:
        The numbers, (batch,) float32.

    Raises:
        ServingError: The signature does not have the inputs and outputs that Regress needs, or what it computes does
            not have the right shape (INVALID_ARGUMENT).
    """
    definition = _signature_for_examples(model, signature_name, "regression", REGRESS)
    if len(definition.outputs) != 1:
        raise invalid(f"Expected one output Tensor, found {len(definition.outputs)}")
    if "inputs" not in definition.inputs:
        raise invalid(f"No regression inputs found in SignatureDef: {list(definition.inputs)}")
    if "outputs" not in definition.outputs:
        raise invalid(f"No regression outputs found in SignatureDef: {list(definition.outputs)}")
    _expect_type(definition, "outputs", types_pb2.DT_FLOAT)
    values = _run_on_examples(model, examples, signature_name, timeout_ms)["outputs"]
    if values.shape not in ((len(examples),), (len(examples), 1)):
        raise invalid(
            f"Expected output batch size of {len(examples)} or [{len(examples)},1]. Got: {list(values.shape)}"
        )
    return values.reshape(-1)


def _signature_for_examples(
    model: ServedModel, signature_name: str, kind: str, method_name: str
) -> meta_graph_pb2.SignatureDef:
    name = signature_name or DEFAULT_SIGNATURE
    definition = model.signature(name)
    if definition is None:
        raise invalid(f"No signature was found with the name: {name}")
    if model.checks_methods and definition.method_name != method_name:
        raise invalid(
            f"Expected {kind} signature method_name to be {method_name}. Was: {definition.method_name}. Exports of "
            "TensorFlow 2 need --enable_signature_method_name_check=false."
        )
    if len(definition.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    return definition


def _expect_type(definition: meta_graph_pb2.SignatureDef, output: str, expected: int) -> None:
    if output in definition.outputs and definition.outputs[output].dtype != expected:
        received = type_name(definition.outputs[output].dtype)
        raise invalid(f"Expected {output} Tensor of {type_name(expected)}. Got: {received}")


def _run_on_examples(
    model: ServedModel, examples: Sequence[bytes], signature_name: str, timeout_ms: int
) -> dict[str, np.ndarray]:
    if not examples:
        raise invalid("Input is empty.")
    batch = np.array(list(examples), dtype=object)
    return model.run(signature_name or DEFAULT_SIGNATURE, {"inputs": batch}, timeout_ms=timeout_ms)
