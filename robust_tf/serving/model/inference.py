"""Predict, Classify and Regress on a loaded model, whatever the transport: arrays in, arrays out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from robust_tf.serving.model.session import DEFAULT_SIGNATURE, LoadedModel, type_name
from robust_tf.serving.model.status import ServingError, invalid


class Classification(NamedTuple):
    """What Classify answers for a batch.

    Attributes:
        classes: (batch, k) bytes as objects, or None when the signature gives scores only.
        scores: (batch, k) float32, or None when the signature gives classes only.
    """

    classes: np.ndarray | None
    scores: np.ndarray | None


def predict(
    model: LoadedModel,
    inputs: Mapping[str, np.ndarray],
    *,
    signature_name: str = "",
    outputs: Iterable[str] = (),
    timeout_ms: int = 0,
) -> dict[str, np.ndarray]:
    """Runs a signature by the names of its inputs and outputs.

    Raises:
        ServingError: FAILED_PRECONDITION when there is no such signature, else what `LoadedModel.run` raises.
    """
    name = signature_name or DEFAULT_SIGNATURE
    if model.signature(name) is None:
        raise ServingError("FAILED_PRECONDITION", f'Serving signature key "{name}" not found.')
    return model.run(name, inputs, outputs, timeout_ms=timeout_ms)


def classify(
    model: LoadedModel, examples: Sequence[bytes], *, signature_name: str = "", timeout_ms: int = 0
) -> Classification:
    """Classes and scores for serialised tf.Examples.

    Raises:
        ServingError: INVALID_ARGUMENT when the signature is not made for Classify, or its outputs don't fit.
    """
    definition = _signature_for_examples(model, signature_name)
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
    model: LoadedModel, examples: Sequence[bytes], *, signature_name: str = "", timeout_ms: int = 0
) -> np.ndarray:
    """One value for each serialised tf.Example, (batch,) float32.

    Raises:
        ServingError: INVALID_ARGUMENT when the signature is not made for Regress, or its output doesn't fit.
    """
    definition = _signature_for_examples(model, signature_name)
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


def _signature_for_examples(model: LoadedModel, signature_name: str) -> meta_graph_pb2.SignatureDef:
    name = signature_name or DEFAULT_SIGNATURE
    definition = model.signature(name)
    if definition is None:
        raise invalid(f"No signature was found with the name: {name}")
    if len(definition.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    return definition


def _expect_type(definition: meta_graph_pb2.SignatureDef, output: str, expected: int) -> None:
    if output in definition.outputs and definition.outputs[output].dtype != expected:
        received = type_name(definition.outputs[output].dtype)
        raise invalid(f"Expected {output} Tensor of {type_name(expected)}. Got: {received}")


def _run_on_examples(
    model: LoadedModel, examples: Sequence[bytes], signature_name: str, timeout_ms: int
) -> dict[str, np.ndarray]:
    if not examples:
        raise invalid("Input is empty.")
    batch = np.array(list(examples), dtype=object)
    return model.run(signature_name or DEFAULT_SIGNATURE, {"inputs": batch}, timeout_ms=timeout_ms)
