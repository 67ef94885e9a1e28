"""Checks that refuse images, labels, radii and model outputs that would lead to a wrong robust accuracy."""

import numbers
import re
from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np
import tensorflow as tf

from robust_tf.attacks.losses import ONE_LOGIT, Loss
from robust_tf.attacks.outputs import (
    CheckedModel,
    Model,
    callable_in_graphs,
    kind_of_probabilities,
    output_of,
    with_classes,
)
from robust_tf.attacks.threat_models import NORMS
from robust_tf.attacks.warning_flags import (
    PROBABILITIES,
    issue,
    mean_of_zero_gradients,
    pixel_flags,
    zero_gradient_sentence,
)
from robust_tf.config.checks import check_epsilon
from robust_tf.errors import UserError, unknown_name

# How far outside [0, 1] a pixel may lie. The reference clamps pixels inside the model, and also attacks images with
# pixels from -0.2 to 1.2. Images in another unit (0 to 255, -1 to 1, normalized by mean and deviation) go beyond this.
PIXEL_TOLERANCE = 0.201

Labels = TypeVar("Labels", tf.Tensor, np.ndarray)

_PIXEL_RULE = "Images must be in [0, 1]."
_PIXEL_WAY_OUT = "Divide 0-255 images by 255, and put the normalization inside the model."


def check_threat_model(norm: str, epsilon: float | tf.Tensor, norms: Collection[str] = tuple(NORMS)) -> None:
    """Refuses a norm that the attack does not support, and a radius out of range.

    Args:
        norm: Name of the norm.
        epsilon: Radius, in [0, 1] pixel units. A symbolic tensor in a graph has no value yet and is not checked.
        norms: Names of the norms that the attack supports.

    Raises:
        UserError: The norm is not in `norms`, or epsilon is not one number in its range.
    """
    if not isinstance(norm, str) or norm not in norms:
        raise unknown_name("norm of this attack", norm, norms)
    if isinstance(epsilon, tf.Tensor) and epsilon.shape.rank not in (None, 0):
        raise UserError(f"epsilon must be one number. Received: a tensor of shape {epsilon.shape}.")
    if not tf.is_symbolic_tensor(epsilon):
        check_epsilon(norm, epsilon)


def check_at_least(lowest: int, **values: int) -> None:
    """Refuses counts, passed by name, that are not integers or are below `lowest`."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise UserError(f"{name} must be an integer of {lowest} or more. Received: {name}={value!r}.")
        if value < lowest:
            raise UserError(f"{name} must be {lowest} or more. Received: {name}={value}.")


def checked_batch(
    model: Model, images: tf.Tensor, labels: tf.Tensor, *, loss: Loss | None = None, targeted: bool = False
) -> tuple[Model, tf.Tensor, tf.Tensor]:
    """Checks the arguments of an attack and returns them in the form that the attack uses.

    In a graph, shapes, types and the last activation are checked when the graph is built, and the pixels when it runs.
    In an eager call the values are checked too, and the returned model has a static number of classes, even in the
    graph that the attack builds.

    Args:
        model: Callable from images to logits (batch, classes).
        images: Float images (batch, height, width, channels) in [0, 1].
        labels: Integer labels, (batch,) or (batch, 1).
        loss: Loss whose gradient the attack follows; None if it follows no gradient.
        targeted: Whether the labels are target classes.

    Returns:
        The model, the images in float32 and the labels as (batch,) int32.

    Raises:
        UserError: The shapes or types do not fit, the images are not in [0, 1], or the model returns probabilities
            although the attack follows gradients. In an eager call also: the batch is empty, a label is not a class of
            the model, or the model returns NaN for an image.

    Warns:
        AttackWarning: In an eager call, the loss has no gradient at some images, or the images seem to be in another
            unit.
    """
    images, labels = tf.convert_to_tensor(images), flat_labels(tf.convert_to_tensor(labels))
    if images.shape.rank != 4 or not images.shape[:1].is_compatible_with(labels.shape):
        raise UserError(
            "Images must have the axes (batch, height, width, channels), and labels are one integer for each image. "
            f"Received: images of shape {images.shape}, labels of shape {labels.shape}.{_one_image(images.shape)}"
        )
    if not labels.dtype.is_integer:
        raise UserError(f"Labels must be one integer for each image. Received: labels of type {labels.dtype.name}.")
    if tf.executing_eagerly():
        check_images(images.numpy())
        images = tf.cast(images, tf.float32)
        model = _checked_by_value(model, images, labels, loss, targeted)
        issue(pixel_flags(images.numpy()).values(), stacklevel=3)
    elif not isinstance(model, CheckedModel):
        images = assert_pixels(floating(images))
        model = _checked_in_graphs(model, follows_gradients=loss is not None)
    return model, tf.cast(images, tf.float32), tf.cast(labels, tf.int32)


def _checked_by_value(
    model: Model, images: tf.Tensor, labels: tf.Tensor, loss: Loss | None, targeted: bool
) -> CheckedModel:
    """Checks a model by its outputs for these images; returns it together with its number of classes."""
    model = callable_in_graphs(model, images)
    outputs = output_of(model, images)
    check_logits(outputs.numpy(), num_images=images.shape[0])
    check_labels(labels.numpy(), num_images=images.shape[0], num_classes=outputs.shape[-1])
    kind = kind_of_probabilities(model, outputs)
    if kind:
        if loss is not None:
            raise _probabilities(kind)
        issue([PROBABILITIES], stacklevel=4)
    checked = with_classes(model, outputs.shape[-1])
    if loss is not None:
        share = float(mean_of_zero_gradients(checked, images, tf.cast(labels, tf.int32), loss, targeted=targeted))
        if share > 0:
            issue([zero_gradient_sentence(share)], stacklevel=4)
    return checked


def _checked_in_graphs(model: Model, *, follows_gradients: bool) -> Model:
    """Returns the same model with a check that its outputs are logits, which runs when a graph is built."""

    def logits(images: tf.Tensor) -> tf.Tensor:
        outputs = output_of(model, images)
        if outputs.shape.rank not in (None, 2) or outputs.shape[-1:] == [1]:
            raise _not_logits(tuple(outputs.shape))
        kind = kind_of_probabilities(model, outputs)
        if kind and follows_gradients:
            raise _probabilities(kind)
        return outputs

    return logits


def training_batch(images: tf.Tensor, labels: tf.Tensor, *, attacked: bool = True) -> tuple[tf.Tensor, tf.Tensor]:
    """Checks a batch that comes from `fit` and returns it as float32 images and (batch,) int32 labels.

    Types and shapes are checked when the graph is built, and the pixels when it runs (but not under XLA).

    Args:
        images: Float images (batch, height, width, channels) in [0, 1].
        labels: Integer labels, (batch,) or (batch, 1).
        attacked: Whether the images will be attacked. If not, their shape and values do not matter.

    Returns:
        The images in float32 and the labels as (batch,) int32.

    Raises:
        UserError: The images are integers, the labels are not (batch,) or (batch, 1), or images for an attack are not
            (batch, height, width, channels) or, in an eager call, not in [0, 1].
        InvalidArgumentError: In a graph, the images are not in [0, 1]; see `pixel_error`.
    """
    images, labels = floating(tf.convert_to_tensor(images)), flat_labels(tf.convert_to_tensor(labels))
    if attacked:
        if images.shape.rank not in (None, 4):
            raise UserError(
                f"Images must have the axes (batch, height, width, channels). Received: images of shape {images.shape}."
                + _one_image(images.shape)
            )
        images = assert_pixels(images)
    return tf.cast(images, tf.float32), tf.cast(labels, tf.int32)


def flat_labels(labels: Labels) -> Labels:
    """Returns labels of shape (batch,) or (batch, 1) as (batch,); refuses one-hot labels and other shapes."""
    rank = tf.TensorShape(labels.shape).rank
    if rank == 2 and labels.shape[1] == 1:  # as in the data sets of Keras
        return labels[:, 0]
    if rank not in (None, 1):
        raise UserError(
            f"The attack needs one label for each image, (batch,). Received: labels of shape {labels.shape}. Turn "
            "one-hot labels into integers with labels.argmax(axis=-1), and train with SparseCategoricalCrossentropy."
        )
    return labels


def assert_pixels(images: tf.Tensor) -> tf.Tensor:
    """Returns the images after checking that they are in [0, 1].

    A graph checks them when it runs, unless it is compiled by XLA, which leaves assertions out.

    Raises:
        UserError: In an eager call, the images are not in [0, 1].
        InvalidArgumentError: In a graph, they are not; `pixel_error` turns this into a UserError.
    """
    if tf.executing_eagerly():
        low, high = float(tf.reduce_min(images)), float(tf.reduce_max(images))
        if images.shape.num_elements() and not _are_pixels(low, high):
            raise _not_pixels(f"{low:g}", f"{high:g}")
        return images
    # Every pixel is compared, because the minimum of a tensor that contains NaN depends on the device.
    inside = tf.reduce_all((images >= -PIXEL_TOLERANCE) & (images <= 1.0 + PIXEL_TOLERANCE))
    low, high = (tf.cast(value, tf.float32) for value in (tf.reduce_min(images), tf.reduce_max(images)))
    data = [f"{_PIXEL_RULE} Received: values from", low, "to", high, f". {_PIXEL_WAY_OUT}"]
    with tf.control_dependencies([tf.debugging.Assert(inside, data)]):
        return tf.identity(images)


def pixel_error(error: tf.errors.InvalidArgumentError) -> UserError | None:
    """Returns the UserError for a failed assertion of `assert_pixels`, or None for any other error."""
    found = re.search(r"Received: values from\] ?\[([^\]]*)\] ?\[to\] ?\[([^\]]*)\]", error.message)
    return None if found is None else _not_pixels(*(f"{float(value):g}" for value in found.groups()))


def check_images(images: np.ndarray) -> None:
    """Refuses images that are not (batch, height, width, channels) floating-point numbers in [0, 1]."""
    if images.ndim != 4:
        raise UserError(
            f"Images must have the axes (batch, height, width, channels). Received: an array of shape {images.shape}."
            + _one_image(images.shape)
        )
    if not images.size:
        raise UserError(f"There is nothing to attack. Received: images of shape {images.shape}.")
    low, high = float(images.min()), float(images.max())
    if images.dtype.kind in "iub":
        raise UserError(
            f"Images must be floats in [0, 1]. Received: images of type {images.dtype}, with values from {low:g} to "
            f"{high:g}. {_PIXEL_WAY_OUT}"
        )
    if not _are_pixels(low, high):
        raise _not_pixels(f"{low:g}", f"{high:g}")


def check_labels(labels: np.ndarray, *, num_images: int, num_classes: int) -> None:
    """Refuses labels that are not one integer in [0, num_classes) for each image."""
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"Labels must be one integer for each of the {num_images} images. "
            f"Received: an array of shape {labels.shape} and type {labels.dtype}."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise UserError(
            f"Labels must be in 0..{num_classes - 1}, because the classifier has {num_classes} classes. "
            f"Received: {labels[wrong[0]]} for image {wrong[0]}, and {wrong.size} such labels in total."
        )


def check_logits(logits: np.ndarray, image_ids: np.ndarray | None = None, *, num_images: int | None = None) -> None:
    """Refuses logits that are not (batch, classes) for 2 classes or more, or that contain NaN or infinity.

    Args:
        logits: Outputs of the model.
        image_ids: Numbers of the images for the message, (batch,) integers; by default their positions.
        num_images: Number of images that the model was given; None if it does not matter.

    Raises:
        UserError: The shape or a value is wrong.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or num_images not in (None, len(logits)):
        raise _not_logits(logits.shape)
    logits = logits.astype(np.float32)
    for kind, of_kind in (("NaN", np.isnan), ("infinity", np.isposinf)):
        wrong = np.flatnonzero(of_kind(logits).any(axis=-1))
        if wrong.size:
            first = wrong[0] if image_ids is None else image_ids[wrong[0]]
            raise UserError(
                f"The classifier returns {kind} for {wrong.size} of {len(logits)} images; the first is image {first}. "
                "Check its weights (did the training diverge?) and its precision."
            )


def floating(images: tf.Tensor) -> tf.Tensor:
    """Returns the images after checking that they are floating-point numbers."""
    if not images.dtype.is_floating:
        raise UserError(
            f"Images must be floats in [0, 1]. Received: images of type {images.dtype.name}. {_PIXEL_WAY_OUT}"
        )
    return images


def _one_image(shape: Sequence[int | None]) -> str:
    return (
        " A single image needs a batch axis, images[None]; gray images need a channel axis, images[..., None]."
        if len(shape) == 3
        else ""
    )


def _are_pixels(low: float, high: float) -> bool:
    return low >= -PIXEL_TOLERANCE and high <= 1.0 + PIXEL_TOLERANCE  # false for NaN


def _not_pixels(low: str, high: str) -> UserError:
    return UserError(f"{_PIXEL_RULE} Received: values from {low} to {high}. {_PIXEL_WAY_OUT}")


def _not_logits(shape: tuple[int | None, ...]) -> UserError:
    if len(shape) == 2 and shape[1] == 1:
        return UserError(ONE_LOGIT)
    return UserError(
        f"A classifier must return logits (batch, classes) for 2 classes or more. Received: outputs of shape {shape}."
    )


def _probabilities(kind: str) -> UserError:
    return UserError(
        f"This attack follows the gradient of logits. Received: outputs that are probabilities ({kind}), whose "
        "gradient vanishes. Remove the model's last activation (in Keras: model.layers[-1].activation = None)."
    )
