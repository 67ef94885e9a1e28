"""Any Keras image classifier as the one form that the programs work with.

That form is a flat Functional model from one tensor of [0, 1] images (batch, height, width, channels) to float32 logits
(batch, num_classes), num_classes >= 2. `build_classifier` makes such models.
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
    """Returns the model as a flat Functional classifier from [0, 1] images to logits.

    Nested models become part of the flat one; one-entry dicts of inputs and outputs are unwrapped; a softmax at the end
    is removed. One output, a logit z or the sigmoid of one, becomes the two logits [0, z]: class 1 is what z speaks
    for (label 1 of a binary cross-entropy), and the softmax of the two is [1 - sigmoid(z), sigmoid(z)].

    Args:
        model: a Sequential, Functional or subclassed model. It stays as it is.

    Returns:
        The model itself where it has this form already, otherwise a new model with copies of the weights.

    Raises:
        UserError: the model has several inputs or outputs, takes no float images, gives no row of numbers for each
            image, or can't be called on a symbolic input.
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
                "A classifier with one output gives a logit or its sigmoid, for class 1 of two. Received: "
                f"{model.name!r}, whose output ends in {removed or left}. Use a sigmoid, or one output for each class."
            )
        logits = keras.ops.pad(logits, [[0, 0], [1, 0]])
    elif "sigmoid" in (removed, left):
        raise UserError(
            f"A classifier chooses one of its classes. Received: {model.name!r}, whose {units} sigmoid outputs are "
            "independent labels. If just one of them is right for each image, build it again without the sigmoid."
        )
    if logits.dtype != "float32":
        logits = keras.layers.Activation("linear", dtype="float32", name="float32_logits")(logits)
    return keras.Model(flat.inputs[0], logits, name=model.name)


def pixel_warning(classifier: keras.Model) -> str | None:
    """A sentence for a plain classifier whose first layers expect 0-255 pixels, or None.

    Only a Rescaling by 1/64 or less, or a Normalization with means above 2, right after the input tells that.
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
                f"The layer {layer.name!r} after the input looks made for pixels from 0 to 255, but here every "
                "classifier gets pixels in [0, 1]: 0 is black and 1 is white. If so, the figures will be wrong; remove "
                "that layer, or put keras.layers.Rescaling(255) before it."
            )
    return None


def image_shape(model: keras.Model) -> tuple[int | None, ...]:
    """The shape of the images that a model takes, (batch, height, width, channels), batch None.

    Raises:
        UserError: the model takes something else.
    """
    return tuple(_image_input(model).shape)


def outputs_of(model: keras.Model, images: Any) -> Any:
    """What a model itself gives for images (batch, height, width, channels), in inference mode: (batch, outputs).

    Raises:
        UserError: it has several outputs, none of them called "logits".
    """
    return _one_output(model, model(_arguments(model, images), training=False))


def copy_weights(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Gives a layer the weights of another one of the same kind."""
    target.set_weights(source.get_weights())
    for layer in getattr(target, "layers", [target]):
        if hasattr(layer, "finalize_state"):  # an adapted Normalization computes with what it derives from its weights
            layer.finalize_state()


def _is_functional(model: keras.Model) -> bool:
    # A subclass of Functional may add a training step or other arguments, which copies would lose.
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
    """A new input like the only one of a model, with a free batch size."""
    given = _inputs(model)
    if len(given) != 1:
        raise UserError(
            f"A classifier has one input, the images. Received: {model.name!r} with {_listed(list(given))}. Build one "
            "with keras.Model(images, outputs) that computes or fixes the others."
        )
    (tensor,) = given.values()
    _check_images(model.name, tensor)
    return keras.Input(tensor.shape[1:], dtype=tensor.dtype, name="images")


def _one_to_one(model: keras.Model) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """A new input of one image tensor, and the one output that the model gives for it."""
    images = _image_input(model)
    takes_training = "training" in inspect.signature(model.call).parameters
    try:
        # `call`, not the model itself: its layers are then the layers of the new model.
        outputs = model.call(_arguments(model, images), **({"training": None} if takes_training else {}))
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        # The user's own code fails here, in whatever way it does; the message has its words.
        raise UserError(
            f"The model must be one that Keras can call on a symbolic input. Received: {model.name!r}, "
            f"{type(model).__name__}: {_first_line(error)}. Write its `call` with keras.layers and keras.ops alone, or "
            "build it with keras.Model(inputs, outputs)."
        ) from error
    output = _one_output(model, outputs)
    _check_outputs(model.name, output)
    return images, output


def _arguments(model: keras.Model, images: Any) -> Any:
    """The images in the structure that the model takes them in, such as a dict."""
    if isinstance(model.input if _has_graph(model) else None, dict | list | tuple):
        return keras.tree.pack_sequence_as(model.input, [images])
    return images


def _has_graph(model: keras.Model) -> bool:
    return hasattr(model, "operations")


def _inputs(model: keras.Model) -> dict[str, keras.KerasTensor]:
    """The inputs of a model by name; of a subclassed one, those that it was built with."""
    if _has_graph(model):
        return dict(zip(_names(model.input, model.inputs, "input"), model.inputs, strict=True))
    if isinstance(model, keras.Sequential) and model.built:
        return {"images": model.inputs[0]}
    shapes: Any = (model.get_build_config() or {}).get("input_shape") if model.built else None
    by_name = shapes if isinstance(shapes, dict) else {"images": shapes}
    if not all(isinstance(shape, list | tuple) and len(shape) > 1 for shape in by_name.values()):
        raise UserError(
            f"A classifier must know the shape of its images. Received: {model.name!r}, built for {shapes}. Begin it "
            "with keras.Input((height, width, 3)), or call it once on a batch of images before it is saved."
        )
    return {name: keras.KerasTensor((None, *shape[1:]), "float32") for name, shape in by_name.items()}


def _one_output(model: keras.Model, outputs: Any) -> keras.KerasTensor:
    """The output of a model that has one, or the one that is called "logits"."""
    tensors = keras.tree.flatten(outputs)
    if len(tensors) == 1:
        return tensors[0]
    names = _names(outputs, tensors, "output", getattr(model, "output_names", None))
    if names.count(LOGITS) == 1:
        return tensors[names.index(LOGITS)]
    raise UserError(
        f"A classifier has one output, or one that is called 'logits'. Received: {model.name!r} with "
        f"{_listed(names)}. Keep one, e.g. the first: keras.Model(model.inputs, model.outputs[0])."
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
            f"A classifier takes images with the channels last, (batch, height, width, 3). Received: {shape} in "
            f"{name!r}, channels first. Build it with data_format='channels_last', or put "
            "keras.layers.Permute((3, 1, 2)) after an input of (height, width, 3)."
        )
    if len(shape) != 4:
        raise UserError(f"A classifier takes images, (batch, height, width, 3). Received: {shape} in {name!r}.")
    if not images.dtype.startswith(("float", "bfloat")):
        raise UserError(
            f"A classifier takes images of floating-point numbers in [0, 1]. Received: an input of type {images.dtype} "
            f"in {name!r}. Build it with keras.Input(..., dtype='float32'); rounding has no gradient."
        )


def _check_outputs(name: str, outputs: Any) -> None:
    shape = tuple(getattr(outputs, "shape", ()))
    if len(shape) != 2 or shape[1] is None:
        raise UserError(
            f"A classifier gives one number for each class, (batch, num_classes). Received: {shape} from {name!r}. Add "
            "pooling or Flatten before its end."
        )


def _flat_copy(model: keras.Model) -> keras.Model:
    """A copy whose layers include those of the models inside it, renamed where two have the same name."""
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
    copy = keras.Model.from_config(flat.get_config())  # each of its layers is called in this graph alone
    sources = {twin.name: operation for operation, twin in pairs}
    for layer in copy.layers:
        if layer.weights:
            copy_weights(sources[layer.name], layer)
    return copy


def _is_opened(operation: keras.Operation) -> bool:
    return isinstance(operation, keras.Sequential) or _has_graph(operation)


def _is_needless(operation: keras.Operation) -> bool:
    """Whether it is the conversion to a tensor that Keras puts before the layers of a model that is opened."""
    return type(operation).__name__ == "ConvertToTensor" and operation.input.dtype == operation.output.dtype


def _call(operation: keras.Operation, *arguments: Any, **options: Any) -> Any:
    if _is_needless(operation):
        return arguments[0]
    return operation.call(*arguments, **options) if _is_opened(operation) else operation(*arguments, **options)


def _pairs(model: keras.Model, copy: keras.Model) -> Iterator[tuple[keras.Operation, keras.Operation]]:
    """Yields each operation that is not opened as a nested model, with the same operation of a copy."""
    twins = {twin.name: twin for twin in _operations(copy)}
    for operation in _operations(model):
        twin = twins[operation.name]
        if _is_opened(operation):
            yield from _pairs(operation, twin)
        else:
            yield operation, twin


def _operations(model: keras.Model) -> list[keras.Operation]:
    return model.operations if _has_graph(model) else model.layers


def _unique(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _misnamed(model: keras.Model) -> set[str]:
    """Which of the names that mean something here belong to layers that are something else.

    "features" is a layer that gives (batch, feature_dim), "logits" the head.
    """
    names = {layer.name: layer for _, layer in _pairs(model, model) if isinstance(layer, keras.Layer)}
    misnamed = set()
    if FEATURES in names and len(names[FEATURES].output.shape) != 2:
        misnamed.add(FEATURES)
    if LOGITS in names and names[LOGITS] is not head_of(list(names.values())):
        misnamed.add(LOGITS)
    return misnamed


def _activation(operation: keras.Operation) -> str:
    """ "softmax", "sigmoid", "linear" or another activation at the end of an operation; "" for one that has none."""
    name = type(operation).__name__.lower()
    if name in _PROBABILITIES:  # a Softmax layer, or keras.ops.softmax and sigmoid
        return name
    return getattr(getattr(operation, "activation", None), "__name__", "")


def _without_probabilities(classifier: keras.Model) -> tuple[str, str, keras.KerasTensor]:
    """Takes a softmax or sigmoid from the end of a copy, which is changed in place.

    Returns:
        The name of what was taken, or ""; where nothing was, the name of an activation that is left after the head, or
        ""; and the tensor before what was taken.
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
    """The operations from the output back to the first one with a kernel, as long as each has one input."""
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
