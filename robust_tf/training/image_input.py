"""The image input of a model, which may have further inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks.checks import floating
from robust_tf.errors import UserError

Shape = tuple[int | None, ...]

_TRIAL_IMAGES = 4
_TRIAL_SIZE = 64  # height and width of the trial images if the model accepts any size


def input_shapes(model: keras.Model) -> Any:
    """Returns the shape of a model's input, or a list or dict of shapes. The shapes include the batch axis.

    Args:
        model: Built model.

    Raises:
        UserError: The model does not know the shape of its input.
    """
    try:
        inputs = model.input
    except (AttributeError, ValueError):  # a subclassed model, or a loaded Sequential, which has only `inputs`
        inputs = getattr(model, "inputs", None)
        inputs = inputs[0] if inputs and len(inputs) == 1 else inputs
    if inputs is not None:
        return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), inputs)
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        raise UserError(
            "The attack must know the input shape of the classifier. Received: a classifier without one. Call it on "
            "a batch of images first, or make its first layer a keras.Input."
        )
    return tuple(shapes) if _is_shape(shapes) else map_shapes(tuple, shapes)


def map_shapes(function: Callable[[Shape], Any], shapes: Any) -> Any:
    """Applies a function to each shape in a structure of shapes.

    Args:
        function: Function of one shape.
        shapes: A shape, or a list or dict of shapes.
    """
    if _is_shape(shapes):
        return function(shapes)
    if isinstance(shapes, Mapping):
        return {name: map_shapes(function, value) for name, value in shapes.items()}
    return [map_shapes(function, value) for value in shapes]


def check_has_images(model: keras.Model) -> None:
    """Checks that a model has exactly one image input (batch, height, width, channels).

    Args:
        model: Built model.

    Raises:
        UserError: The model has no image input, or several.
    """
    found: list[Shape] = []
    map_shapes(found.append, input_shapes(model))
    if sum(len(shape) == 4 for shape in found) != 1:
        raise UserError(
            "The attack needs a classifier with exactly one image input, (batch, height, width, channels). Received: "
            f"inputs of shape {', '.join(map(str, found))}."
        )


def trial_outputs(model: keras.Model) -> Any:
    """Returns the outputs of a model for a few random images, in inference mode.

    Args:
        model: Any model that takes images.

    Raises:
        UserError: The model is not built.
    """
    random = np.random.default_rng(0)

    def trial(shape: Shape) -> tf.Tensor:
        sizes = [_TRIAL_IMAGES, *(size or _TRIAL_SIZE for size in shape[1:])]
        return tf.constant(random.random(sizes, np.float32))

    if not model.built:
        raise UserError(
            "The attack needs a classifier that is built. Received: a classifier that has not seen any input yet. "
            "Call it on a batch of images first, or make its first layer a keras.Input."
        )
    return model(map_shapes(trial, input_shapes(model)), training=False)


def images_of(inputs: Any) -> tf.Tensor:
    """Returns the images among the inputs of a batch, as float32.

    Args:
        inputs: Inputs of a batch: an array, or a structure of arrays.

    Raises:
        UserError: There are no images, or several arrays of images, or the images are integers.
    """
    images = keras.tree.flatten(inputs)[_position(inputs)]
    images = tf.convert_to_tensor(images)
    if images.shape.rank is None:
        images = tf.ensure_shape(images, [None] * 4)
    return tf.cast(floating(images), tf.float32)


def with_images(inputs: Any, images: tf.Tensor) -> Any:
    """Returns the inputs of a batch with the images replaced.

    Args:
        inputs: Inputs of a batch: an array, or a structure of arrays.
        images: Images to put in.
    """
    leaves = keras.tree.flatten(inputs)
    leaves[_position(inputs)] = images
    return keras.tree.pack_sequence_as(inputs, leaves)


def _position(inputs: Any) -> int:
    leaves = keras.tree.flatten(inputs)
    shapes = [tf.convert_to_tensor(leaf).shape if not hasattr(leaf, "shape") else leaf.shape for leaf in leaves]
    positions = [index for index, shape in enumerate(shapes) if len(leaves) == 1 or len(shape) == 4]
    if len(positions) != 1 or getattr(shapes[positions[0]], "rank", 4) not in (None, 4):
        raise UserError(
            "The attack needs exactly one array of images in each batch, (batch, height, width, channels). Received: "
            f"arrays of shape {', '.join(str(tuple(shape)) for shape in shapes)}."
        )
    return positions[0]


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(size is None or isinstance(size, int) for size in value)
