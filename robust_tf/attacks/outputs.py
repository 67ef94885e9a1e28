"""Reads the output of any model as one tensor of logits, and explains what is wrong if that is impossible."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.errors import UserError

Model = Callable[[tf.Tensor], tf.Tensor]

# Operations that change the form of an output but not its meaning.
_FORMS = {"Cast", "Identity", "Reshape", "EnsureShape", "StopGradient"}
_PROBABILITIES = {"Softmax": "softmax", "Sigmoid": "sigmoid"}


def logits_of(model: Model, images: tf.Tensor) -> tf.Tensor:
    """Returns the model's logits in float32.

    A Keras model runs in inference mode, so BatchNorm uses its moving statistics and does not change them.

    Raises:
        UserError: The model does not return exactly one tensor.
    """
    return tf.cast(output_of(model, images), tf.float32)


def outputs_of(model: Model, images: tf.Tensor) -> Any:
    """Returns the model's outputs in float32: one tensor of logits, or several tensors in the model's structure."""
    outputs = _raw_output(model, images)
    if isinstance(outputs, Mapping | list | tuple):
        return keras.tree.map_structure(lambda output: tf.cast(output, tf.float32), outputs)
    return tf.cast(_one_output(outputs), tf.float32)


def output_of(model: Model, images: tf.Tensor) -> tf.Tensor:
    """Returns the model's logits in the precision of the model."""
    return _one_output(_raw_output(model, images))


def _one_output(output: Any) -> tf.Tensor:
    if tf.is_tensor(output):
        return output
    if _is_array(output):  # from NumPy or from another framework
        return tf.convert_to_tensor(np.asarray(output))
    if isinstance(output, Mapping):
        received, way_out = f"a dict with the keys {list(output)}", f"model(images)[{next(iter(output), '')!r}]"
    elif isinstance(output, list | tuple):
        received, way_out = f"a {type(output).__name__} of {len(output)} outputs", "model(images)[0]"
    else:
        name = "None" if output is None else type(output).__name__
        raise UserError(f"A classifier must return one tensor of logits, (batch, classes). Received: {name}.")
    raise UserError(
        f"A classifier must return one tensor of logits, (batch, classes). Received: {received}. Choose one of them, "
        f"e.g. lambda images: {way_out}."
    )


def _raw_output(model: Model, images: tf.Tensor) -> Any:
    # keras.Model and keras.Layer take `training`; a plain callable does not.
    if not isinstance(model, keras.Layer):
        return model(images)
    inputs = getattr(model, "inputs", None)
    if isinstance(model, keras.Model) and inputs and len(inputs) > 1:
        raise UserError(
            "An attack calls the model with images alone. Received: a model with inputs of shape "
            f"{', '.join(str(tuple(each.shape)) for each in inputs)}. Attack a function that adds the other inputs, "
            "e.g. lambda images: model([images, others])."
        )
    return model(images, training=False)


def _is_array(output: Any) -> bool:
    return hasattr(output, "__array__") and hasattr(output, "dtype")


@dataclasses.dataclass(frozen=True)
class CheckedModel:
    """A model whose outputs have been checked. Its logits have a static shape in graphs too.

    Without this, the outputs of some callables, such as a tf.numpy_function, have no static shape in a graph.

    Attributes:
        model: Callable from images to logits.
        num_classes: Number of logits.
    """

    model: Model
    num_classes: int

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Returns the model's logits, (batch, num_classes)."""
        return tf.ensure_shape(output_of(self.model, images), [None, self.num_classes])


def with_classes(model: Model, count: int) -> CheckedModel:
    """Returns the same model with logits of the static shape (batch, count), even in graphs."""
    return model if isinstance(model, CheckedModel) else CheckedModel(model, count)


def callable_in_graphs(model: Model, images: tf.Tensor) -> Model:
    """Returns a model that can be called in graphs.

    A model that returns tensors is returned unchanged. One that returns arrays, such as `model.predict`, a NumPy
    function or a model of another framework, is called from graphs as Python code and has no gradient.

    Args:
        model: Callable from images to logits, as tensor or as array.
        images: Images on which to call the model once, eagerly.
    """
    if isinstance(model, CheckedModel):
        return model
    output = _raw_output(model, images)
    if tf.is_tensor(output) or not _is_array(output):
        return model

    def call(images: tf.Tensor) -> np.ndarray:
        return np.asarray(_raw_output(model, images), np.float32)

    return lambda images: tf.stop_gradient(tf.py_function(call, [images], tf.float32))


def looks_like_probabilities(outputs: np.ndarray) -> bool:
    """Returns whether all rows of outputs (batch, classes) are in [0, 1] and sum to 1, up to rounding."""
    tolerance = 1e-5 if outputs.dtype in (np.float32, np.float64) else 1e-2
    outputs = outputs.astype(np.float32)
    inside = outputs.min() > -1e-5 and outputs.max() < 1 + 1e-5
    return bool(inside and np.all(np.abs(outputs.sum(axis=1) - 1) < tolerance))


def kind_of_probabilities(model: Model, outputs: tf.Tensor) -> str:
    """Returns how outputs became probabilities: "softmax", "sigmoid", or "" if they seem to be logits.

    Args:
        model: Model that returned the outputs. If it is a Keras model, its last activation is inspected.
        outputs: Outputs (batch, classes). Eagerly their values are inspected, in a graph their last operation.
    """
    if tf.is_symbolic_tensor(outputs):
        op = outputs.op
        while op.type in _FORMS:
            op = op.inputs[0].op
        return _PROBABILITIES.get(op.type, "")
    if looks_like_probabilities(outputs.numpy()):
        return "softmax"
    while isinstance(model, CheckedModel):
        model = model.model
    layers = getattr(model, "layers", None) if isinstance(model, keras.Model) else None
    last = getattr(layers[-1], "activation", None) if layers else None
    return "sigmoid" if last is keras.activations.sigmoid else ""
