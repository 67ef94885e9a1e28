"""What the attacks refuse: images, labels, radii and outputs that no honest figure could come from."""

import numbers
import re
from collections.abc import Sequence
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
from robust_tf.attacks.warning_flags import (
    PROBABILITIES,
    issue,
    mean_of_zero_gradients,
    pixel_flags,
    zero_gradient_sentence,
)
from robust_tf.config.checks import check_epsilon
from robust_tf.errors import UserError, unknown_name

# How far from [0, 1] an image may be. The reference clamps inside the model, and attacks images between -0.2 and 1.2
# as well; another unit (0 to 255, -1 to 1, normalised by mean and deviation) goes beyond this.
PIXEL_TOLERANCE = 0.201

Labels = TypeVar("Labels", tf.Tensor, np.ndarray)

_PIXEL_RULE = "Images must be in [0, 1]."
_PIXEL_WAY_OUT = "Divide 0-255 images by 255, and put the normalisation inside the model."


def check_threat_model(norm: str, epsilon: float | tf.Tensor, norms: tuple[str, ...] = ("linf", "l2", "l1")) -> None:
    """Refuses a norm that is not in `norms`, and an epsilon out of its range; a graph's tensor has no value yet."""
    if not isinstance(norm, str) or norm not in norms:
        raise unknown_name("norm of this attack", norm, norms)
    if isinstance(epsilon, tf.Tensor) and epsilon.shape.rank not in (None, 0):
        raise UserError(f"epsilon must be one number. Received: a tensor of shape {epsilon.shape}.")
    if not tf.is_symbolic_tensor(epsilon):
        check_epsilon(norm, epsilon)


def check_at_least(lowest: int, **values: int) -> None:
    """Refuses a count, given by its name, that is no integer or below `lowest`."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise UserError(f"{name} must be an integer of {lowest} or more. Received: {name}={value!r}.")
        if value < lowest:
            raise UserError(f"{name} must be {lowest} or more. Received: {name}={value}.")


def checked_batch(
    model: Model, images: tf.Tensor, labels: tf.Tensor, *, loss: Loss | None = None, targeted: bool = False
) -> tuple[Model, tf.Tensor, tf.Tensor]:
    """The model of an attack, and its batch as float32 images and (batch,) int32 labels.

    A graph looks at shapes, types and the last activation when it is built, and at the pixels when it runs. Eagerly
    the values are looked at too, and the model learns how many classes it has, so that the attack's own graph knows.

    Args:
        labels: (batch,) or (batch, 1) integers.
        loss: what the attack follows the gradient of; None: it follows no gradient.
        targeted: the labels are targets.

    Raises:
        UserError: the shapes or types don't fit, or images are not in [0, 1], or the attack follows gradients and the
            model gives probabilities. In eager calls also: the batch is empty, a label is not a class of the model, or
            the model gives NaN for an image.

    Warns:
        AttackWarning: eagerly, for images without any gradient of the loss, and images that look like another unit.
    """
    images, labels = tf.convert_to_tensor(images), flat_labels(tf.convert_to_tensor(labels))
    if images.shape.rank != 4 or not images.shape[:1].is_compatible_with(labels.shape):
        raise UserError(
            "Images have the axes (batch, height, width, channels), and labels are one integer for each image. "
            f"Received: images of shape {images.shape}, labels of shape {labels.shape}.{_one_image(images.shape)}"
        )
    if not labels.dtype.is_integer:
        raise UserError(f"Labels are one integer for each image. Received: labels of type {labels.dtype.name}.")
    if tf.executing_eagerly():
        check_images(images.numpy())
        images = tf.cast(images, tf.float32)
        model = _looked_at(model, images, labels, loss, targeted)
        issue(pixel_flags(images.numpy()).values(), stacklevel=3)
    elif not isinstance(model, CheckedModel):
        images = assert_pixels(floating(images))
        model = _refusing(model, follows_gradients=loss is not None)
    return model, tf.cast(images, tf.float32), tf.cast(labels, tf.int32)


def _looked_at(model: Model, images: tf.Tensor, labels: tf.Tensor, loss: Loss | None, targeted: bool) -> CheckedModel:
    """The model with what its outputs on these images tell; warns and refuses for what they tell about an attack."""
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


def _refusing(model: Model, *, follows_gradients: bool) -> Model:
    """The same model, which refuses its outputs where a graph can see that they are no logits of classes."""

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
    """A batch that comes from `fit` as float32 images and (batch,) int32 labels.

    Looks at types and shapes when the graph is built, and at the pixels when it runs (not under XLA).

    Args:
        attacked: whether the images will be attacked; else their shape and values don't matter.

    Raises:
        UserError: integer images, labels that are not (batch,) or (batch, 1), or images for an attack that are not
            (batch, height, width, channels) or, eagerly, not in [0, 1].
        InvalidArgumentError: in a graph, images that are not in [0, 1]; see `pixel_error`.
    """
    images, labels = floating(tf.convert_to_tensor(images)), flat_labels(tf.convert_to_tensor(labels))
    if attacked:
        if images.shape.rank not in (None, 4):
            raise UserError(
                f"Images have the axes (batch, height, width, channels). Received: images of shape {images.shape}."
                + _one_image(images.shape)
            )
        images = assert_pixels(images)
    return tf.cast(images, tf.float32), tf.cast(labels, tf.int32)


def flat_labels(labels: Labels) -> Labels:
    """Labels (batch,) of (batch,) or (batch, 1), a tensor or an array; refuses one-hot labels and other shapes."""
    rank = tf.TensorShape(labels.shape).rank
    if rank == 2 and labels.shape[1] == 1:  # as the data sets of Keras have them
        return labels[:, 0]
    if rank not in (None, 1):
        raise UserError(
            f"The attack needs one label for each image, (batch,). Received: labels of shape {labels.shape}. Make "
            "one-hot labels integers, labels.argmax(axis=-1), and use SparseCategoricalCrossentropy in training."
        )
    return labels


def assert_pixels(images: tf.Tensor) -> tf.Tensor:
    """The images; they must be in [0, 1].

    A graph looks when it runs. Compiled by XLA it doesn't: XLA leaves assertions out.

    Raises:
        UserError: eagerly, they are not.
        InvalidArgumentError: in a graph, they are not; `pixel_error` makes a UserError of it.
    """
    if tf.executing_eagerly():
        low, high = float(tf.reduce_min(images)), float(tf.reduce_max(images))
        if images.shape.num_elements() and not _are_pixels(low, high):
            raise _not_pixels(f"{low:g}", f"{high:g}")
        return images
    # Each pixel, since whether the smallest number of a tensor with NaN is NaN depends on the device.
    inside = tf.reduce_all((images >= -PIXEL_TOLERANCE) & (images <= 1.0 + PIXEL_TOLERANCE))
    low, high = (tf.cast(value, tf.float32) for value in (tf.reduce_min(images), tf.reduce_max(images)))
    data = [f"{_PIXEL_RULE} Received: values from", low, "to", high, f". {_PIXEL_WAY_OUT}"]
    with tf.control_dependencies([tf.debugging.Assert(inside, data)]):
        return tf.identity(images)


def pixel_error(error: tf.errors.InvalidArgumentError) -> UserError | None:
    """The UserError that the failed assertion of `assert_pixels` stands for; None for any other error."""
    found = re.search(r"Received: values from\] ?\[([^\]]*)\] ?\[to\] ?\[([^\]]*)\]", error.message)
    return None if found is None else _not_pixels(*(f"{float(value):g}" for value in found.groups()))


def check_images(images: np.ndarray) -> None:
    """Refuses images of an evaluation that are not (batch, height, width, channels) numbers in [0, 1]."""
    if images.ndim != 4:
        raise UserError(
            f"Images have the axes (batch, height, width, channels). Received: an array of shape {images.shape}."
            + _one_image(images.shape)
        )
    if not images.size:
        raise UserError(f"There is nothing to attack. Received: images of shape {images.shape}.")
    low, high = float(images.min()), float(images.max())
    if images.dtype.kind in "iub":
        raise UserError(
            f"Images must be numbers in [0, 1]. Received: images of type {images.dtype}, with values from {low:g} to "
            f"{high:g}. {_PIXEL_WAY_OUT}"
        )
    if not _are_pixels(low, high):
        raise _not_pixels(f"{low:g}", f"{high:g}")


def check_labels(labels: np.ndarray, *, num_images: int, num_classes: int) -> None:
    """Refuses labels that are not one class number in [0, num_classes) for each image."""
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"Labels are one integer for each of the {num_images} images. "
            f"Received: an array of shape {labels.shape} and type {labels.dtype}."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise UserError(
            f"Labels must be in 0..{num_classes - 1}: the classifier has {num_classes} classes. "
            f"Received: {labels[wrong[0]]} for image {wrong[0]}, and {wrong.size} such labels in all."
        )


def check_logits(logits: np.ndarray, image_ids: np.ndarray | None = None, *, num_images: int | None = None) -> None:
    """Refuses logits that are not (batch, classes) of 2 classes or more, NaN and infinity: no comparison holds."""
    if logits.ndim != 2 or logits.shape[1] < 2 or num_images not in (None, len(logits)):
        raise _not_logits(logits.shape)
    logits = logits.astype(np.float32)
    for kind, of_kind in (("NaN", np.isnan), ("infinity", np.isposinf)):
        wrong = np.flatnonzero(of_kind(logits).any(axis=-1))
        if wrong.size:
            first = wrong[0] if image_ids is None else image_ids[wrong[0]]
            raise UserError(
                f"The classifier gives {kind} for {wrong.size} of {len(logits)} images, the first is image {first}. "
                "Check its weights (a training that diverged?) and its precision."
            )


def floating(images: tf.Tensor) -> tf.Tensor:
    if not images.dtype.is_floating:
        raise UserError(
            f"Images must be numbers in [0, 1]. Received: images of type {images.dtype.name}. {_PIXEL_WAY_OUT}"
        )
    return images


def _one_image(shape: Sequence[int | None]) -> str:
    return (
        " A single image needs a batch axis, images[None]; gray ones need a channel, images[..., None]."
        if len(shape) == 3
        else ""
    )


def _are_pixels(low: float, high: float) -> bool:
    return low >= -PIXEL_TOLERANCE and high <= 1.0 + PIXEL_TOLERANCE  # nor is NaN


def _not_pixels(low: str, high: str) -> UserError:
    return UserError(f"{_PIXEL_RULE} Received: values from {low} to {high}. {_PIXEL_WAY_OUT}")


def _not_logits(shape: tuple[int | None, ...]) -> UserError:
    if len(shape) == 2 and shape[1] == 1:
        return UserError(ONE_LOGIT)
    return UserError(
        f"A classifier gives logits (batch, classes), 2 classes or more. Received: outputs of shape {shape}."
    )


def _probabilities(kind: str) -> UserError:
    return UserError(
        f"This attack follows the gradient of logits. Received: outputs that are probabilities ({kind}), of which the "
        "gradient vanishes. Remove the model's last activation (in Keras: model.layers[-1].activation = None)."
    )
