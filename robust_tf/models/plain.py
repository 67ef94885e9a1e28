"""Conversion of any Keras image classifier into the plain form that all programs use.

A plain classifier is a flat Functional model that maps one tensor of images in [0, 1], (batch, height, width,
channels), to float32 logits (batch, num_classes) with num_classes >= 2. `build_classifier` builds such models.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from robust_tf.errors import UserError
from robust_tf.models.representation import FEATURES, LOGITS, head_of

_PROBABILITIES = ("softmax", "sigmoid")


def plain_classifier(model: keras.Model) -> keras.Model:
    """Converts a model into a flat Functional classifier that maps images in [0, 1] to logits.

    Nested models are flattened, dicts with a single input or output are unwrapped, and a softmax at the end is removed.
    A single output, which is a logit z or its sigmoid, becomes the two logits [0, z], whose softmax is
    [1 - sigmoid(z), sigmoid(z)]. Class 1 is the class that has label 1 in the binary cross-entropy.

    Args:
        model: Sequential, Functional or subclassed model. It is not changed.

    Returns:
        The model itself if it is plain already, otherwise a new model with copies of the weights.

    Raises:
        UserError: The model has several inputs or outputs, does not take float images, does not return one row of
            numbers for each image, or cannot be called on a symbolic input.

    Example:
        >>> model = keras.Sequential(
        ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(5, activation="softmax")]
        ... )
        >>> classifier = plain_classifier(model)
        >>> classifier.output_shape, classifier.layers[-1].activation.__name__
        ((None, 5), 'linear')
    """
    if _is_plain(model):
        return model
    images, outputs = _one_to_one(model)
    flat = _flat_copy(keras.Model(images, outputs, name=model.name))
    removed, left, logits = _without_probabilities(flat)
    units = logits.shape[-1]
    if units == 1:
        if removed == "softmax" or left:
            raise UserError(
                "A classifier with one output must return a logit or its sigmoid, for class 1 of two. Received: "
                f"{model.name!r}, whose output ends in {removed or left}. Use a sigmoid, or one output for each class."
            )
        logits = keras.ops.pad(logits, [[0, 0], [1, 0]])
    elif "sigmoid" in (removed, left):
        raise UserError(
            f"A classifier must choose one of its classes. Received: {model.name!r}, whose {units} sigmoid outputs are "
            "independent labels. If exactly one of them is right for each image, build it again without the sigmoid."
        )
    if logits.dtype != "float32":
        logits = keras.layers.Activation("linear", dtype="float32", name="float32_logits")(logits)
    return keras.Model(flat.inputs[0], logits, name=model.name)


def pixel_warning(classifier: keras.Model) -> str | None:
    """Returns a warning for a classifier whose first layer expects pixels from 0 to 255, or None.

    The signs are a Rescaling by 1/64 or less, or a Normalization with means above 2, right after the input.

    Args:
        classifier: Plain classifier.

    Example:
        >>> model = keras.Sequential(
        ...     [keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(2)]
        ... )
        >>> pixel_warning(plain_classifier(model)) is None
        False
    """
    for layer in classifier.layers:
        if isinstance(layer, keras.layers.InputLayer) or layer.input is not classifier.inputs[0]:
            continue
        if isinstance(layer, keras.layers.Rescaling):
            found = np.max(np.abs(layer.scale)) <= 1 / 64
        elif isinstance(layer, keras.layers.Normalization):
            found = np.max(np.abs(layer.mean)) > 2
        else:
            continue
        if found:
            return (
                f"The layer {layer.name!r} after the input seems to expect pixels from 0 to 255, but here every "
                "classifier gets pixels in [0, 1], from black to white. In that case all figures will be wrong: remove "
                "the layer, or put keras.layers.Rescaling(255) before it."
            )
    return None


def image_shape(model: keras.Model) -> tuple[int | None, ...]:
    """Returns the shape of the images that a model takes, (None, height, width, channels).

    Args:
        model: Any model.

    Raises:
        UserError: The model does not take images, or has further inputs.

    Example:
        >>> image_shape(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()]))
        (None, 8, 8, 3)
    """
    return tuple(_image_input(model).shape)


def outputs_of(model: keras.Model, images: Any) -> Any:
    """Returns the outputs of a model in inference mode, (batch, num_outputs), without any conversion to logits.

    Args:
        model: Any model that takes images.
        images: Images (batch, height, width, channels).

    Raises:
        UserError: The model has several outputs, none of them called "logits".

    Example:
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(5)])
        >>> outputs_of(model, np.zeros((2, 8, 8, 3))).shape.as_list()
        [2, 5]
    """
    return _one_output(model, model(_arguments(model, images), training=False))


def copy_weights(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies the weights of a layer to another layer of the same kind.

    Args:
        source: Layer with the weights.
        target: Layer that gets the weights.
    """
    target.set_weights(source.get_weights())
    for layer in getattr(target, "layers", [target]):
        if hasattr(layer, "finalize_state"):  # an adapted Normalization uses values that it derives from its weights
            layer.finalize_state()


def _is_functional(model: keras.Model) -> bool:
    # A subclass of Functional does not count. It may add a training step or arguments, which a copy would lose.
    return type(model).__name__ == "Functional"


def _is_plain(model: keras.Model) -> bool:
    if not _is_functional(model) or any(isinstance(layer, keras.Model) for layer in model.layers):
        return False
    images, logits = model.input, model.output
    if not isinstance(images, keras.KerasTensor) or not isinstance(logits, keras.KerasTensor):
        return False
    _check_images(model.name, images)
    _check_outputs(model.name, logits)
    return (
        images.shape[0] is None
        and logits.shape[1] > 1
        and logits.dtype == "float32"
        and not any(_activation(one) in _PROBABILITIES for one in _tail(model))
        and not _misnamed(model)
    )


def _image_input(model: keras.Model) -> keras.KerasTensor:
    """Returns a new input like the only input of a model, but with any batch size."""
    given = _inputs(model)
    if len(given) != 1:
        raise UserError(
            f"A classifier must have one input, the images. Received: {model.name!r} with {_listed(list(given))}. "
            "Build a keras.Model(images, outputs) that computes the other inputs or sets them to constants."
        )
    (tensor,) = given.values()
    _check_images(model.name, tensor)
    return keras.Input(tensor.shape[1:], dtype=tensor.dtype, name="images")


def _one_to_one(model: keras.Model) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Returns a new input, which is one tensor of images, and the model's only output for this input."""
    images = _image_input(model)
    takes_training = "training" in inspect.signature(model.call).parameters
    try:
        # Calling `call` instead of the model makes the model's layers, not the model itself, part of the new model.
        outputs = model.call(_arguments(model, images), **({"training": None} if takes_training else {}))
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        # The user's own code has failed; the message quotes its error.
        raise UserError(
            f"Keras must be able to call the model on a symbolic input. Received: {model.name!r}, "
            f"{type(model).__name__}: {_first_line(error)}. Use only keras.layers and keras.ops in its `call`, or "
            "build it with keras.Model(inputs, outputs)."
        ) from error
    output = _one_output(model, outputs)
    _check_outputs(model.name, output)
    return images, output


def _arguments(model: keras.Model, images: Any) -> Any:
    """Puts the images into the structure that the model takes, such as a dict."""
    if isinstance(model.input if _has_graph(model) else None, dict | list | tuple):
        return keras.tree.pack_sequence_as(model.input, [images])
    return images


def _has_graph(model: keras.Model) -> bool:
    return hasattr(model, "operations")


def _inputs(model: keras.Model) -> dict[str, keras.KerasTensor]:
    """Returns the inputs of a model by name. For a subclassed model these are the inputs that it was built with."""
    if _has_graph(model):
        return dict(zip(_names(model.input, model.inputs, "input"), model.inputs, strict=True))
    if isinstance(model, keras.Sequential) and model.built:
        return {"images": model.inputs[0]}
    shapes: Any = (model.get_build_config() or {}).get("input_shape") if model.built else None
    by_name = shapes if isinstance(shapes, dict) else {"images": shapes}
    if not all(isinstance(shape, list | tuple) and len(shape) > 1 for shape in by_name.values()):
        raise UserError(
            f"A classifier must know the shape of its images. Received: {model.name!r}, built for {shapes}. Make its "
            "first layer a keras.Input((height, width, 3)), or call it once on a batch of images before it is saved."
        )
    return {name: keras.KerasTensor((None, *shape[1:]), "float32") for name, shape in by_name.items()}


def _one_output(model: keras.Model, outputs: Any) -> keras.KerasTensor:
    """Returns the only output of a model, or the one that is called "logits"."""
    tensors: list[keras.KerasTensor] = keras.tree.flatten(outputs)
    if len(tensors) == 1:
        return tensors[0]
    names = _names(outputs, tensors, "output", getattr(model, "output_names", None))
    if names.count(LOGITS) == 1:
        return tensors[names.index(LOGITS)]
    raise UserError(
        f"A classifier must have one output, or one that is called 'logits'. Received: {model.name!r} with "
        f"{_listed(names)}. Keep one of them, such as the first: keras.Model(model.inputs, model.outputs[0])."
    )


def _names(structure: Any, tensors: list[Any], kind: str, names: list[str] | None = None) -> list[str]:
    if isinstance(structure, dict) and len(structure) == len(tensors):
        return [str(key) for key in sorted(structure)]  # the order in which Keras flattens
    if names is not None and len(names) == len(tensors):
        return list(names)
    return [f"{kind} {number}" for number, _ in enumerate(tensors, 1)]


def _listed(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(map(repr, names))}"


def _check_images(name: str, images: keras.KerasTensor) -> None:
    shape = tuple(images.shape)
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        raise UserError(
            f"A classifier must take images with the channels last, (batch, height, width, 3). Received: {shape} in "
            f"{name!r}, channels first. Build it with data_format='channels_last', or put "
            "keras.layers.Permute((3, 1, 2)) after an input of (height, width, 3)."
        )
    if len(shape) != 4:
        raise UserError(f"A classifier must take images, (batch, height, width, 3). Received: {shape} in {name!r}.")
    if not images.dtype.startswith(("float", "bfloat")):
        raise UserError(
            f"A classifier must take floating-point images in [0, 1]. Received: an input of type {images.dtype} in "
            f"{name!r}. Build it with keras.Input(..., dtype='float32'), because integers have no gradients."
        )


def _check_outputs(name: str, outputs: Any) -> None:
    shape = tuple(getattr(outputs, "shape", ()))
    if len(shape) != 2 or shape[1] is None:
        raise UserError(
            f"A classifier must return one number for each class, (batch, num_classes). Received: {shape} from "
            f"{name!r}. Add pooling or Flatten near its end."
        )


def _flat_copy(model: keras.Model) -> keras.Model:
    """Returns a copy without nested models. Layers with the same name are renamed."""
    skeleton = keras.Model.from_config(model.get_config())
    pairs = list(_pairs(model, skeleton))
    taken: set[str] = set()
    misnamed = _misnamed(skeleton)
    for _, operation in pairs:
        operation.name = _unique(operation.name, taken | misnamed)
        taken.add(operation.name)
    flat = skeleton
    while any(_is_opened(operation) or _is_needless(operation) for operation in flat.operations):
        flat = keras.models.clone_model(flat, clone_function=lambda layer: layer, call_function=_call)
    copy = keras.Model.from_config(flat.get_config())  # the layers of the copy are not called in any other graph
    sources = {twin.name: operation for operation, twin in pairs}
    for layer in copy.layers:
        if layer.weights:
            copy_weights(sources[layer.name], layer)
    return copy


def _is_opened(operation: keras.Operation) -> bool:
    return isinstance(operation, keras.Sequential) or _has_graph(operation)


def _is_needless(operation: keras.Operation) -> bool:
    """Returns whether an operation is the conversion to a tensor that Keras adds in front of a flattened model."""
    return type(operation).__name__ == "ConvertToTensor" and operation.input.dtype == operation.output.dtype


def _call(operation: keras.Operation, *arguments: Any, **options: Any) -> Any:
    if _is_needless(operation):
        return arguments[0]
    return operation.call(*arguments, **options) if _is_opened(operation) else operation(*arguments, **options)


def _pairs(model: keras.Model, copy: keras.Model) -> Iterator[tuple[keras.Operation, keras.Operation]]:
    """Yields each operation that is not a nested model, together with the same operation of a copy."""
    twins = {twin.name: twin for twin in _operations(copy)}
    for operation in _operations(model):
        twin = twins[operation.name]
        if _is_opened(operation):
            yield from _pairs(operation, twin)
        else:
            yield operation, twin


def _operations(model: keras.Model) -> list[keras.Operation]:
    operations: list[keras.Operation] = model.operations if _has_graph(model) else model.layers
    return operations


def _unique(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _misnamed(model: keras.Model) -> set[str]:
    """Returns the reserved names that are used for other layers.

    "features" is reserved for a layer that returns (batch, feature_dim), "logits" for the head.
    """
    names = {layer.name: layer for _, layer in _pairs(model, model) if isinstance(layer, keras.Layer)}
    misnamed = set()
    if FEATURES in names and len(names[FEATURES].output.shape) != 2:
        misnamed.add(FEATURES)
    if LOGITS in names and names[LOGITS] is not head_of(list(names.values())):
        misnamed.add(LOGITS)
    return misnamed


def _activation(operation: keras.Operation) -> str:
    """Returns the name of the activation at the end of an operation, such as "softmax", or "" if there is none."""
    name = type(operation).__name__.lower()
    if name in _PROBABILITIES:  # a Softmax layer, keras.ops.softmax, or keras.ops.sigmoid
        return name
    return getattr(getattr(operation, "activation", None), "__name__", "")


def _without_probabilities(classifier: keras.Model) -> tuple[str, str, keras.KerasTensor]:
    """Removes a softmax or sigmoid from the end of a copied model, which is changed in place.

    Returns:
        A tuple (removed, left, logits): the name of the removed activation, or ""; if nothing was removed, the name of
        another activation after the head, or ""; and the output without the removed activation.
    """
    tail = list(_tail(classifier))
    kept = [one for one in tail if not (isinstance(one, keras.layers.Identity) or _is_linear(one))]
    activations = [_activation(one) for one in kept]
    last, name = (kept[0], activations[0]) if kept else (None, "")
    if last is None or name not in _PROBABILITIES:
        left = [one for one in activations if one not in ("", "linear")]
        return "", (left[0] if left else ""), classifier.outputs[0]
    if hasattr(last, "kernel"):
        last.activation = keras.activations.linear
        return name, "", last.output
    return name, "", last.input


def _is_linear(operation: keras.Operation) -> bool:
    return isinstance(operation, keras.layers.Activation) and _activation(operation) == "linear"


def _tail(classifier: keras.Model) -> Iterator[keras.Operation]:
    """Yields the operations from the output back to the last one with a kernel, or to one with several inputs."""
    makers = {id(tensor): one for one in classifier.operations for tensor in keras.tree.flatten(one.output)}
    operation = makers[id(classifier.outputs[0])]
    while True:
        yield operation
        inputs = keras.tree.flatten(operation.input)
        if hasattr(operation, "kernel") or len(inputs) != 1 or isinstance(operation, keras.layers.InputLayer):
            return
        operation = makers[id(inputs[0])]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
