"""What the attacks refuse: images, labels, radii and logits that no honest figure could come from."""

import numpy as np
import tensorflow as tf

from robust_tf.attacks.losses import Model, logits_of, with_classes
from robust_tf.config_checks import check_epsilon
from robust_tf.errors import UserError, unknown_name

# Rounding of a resize or of a float16 file, not another unit.
PIXEL_TOLERANCE = 1e-3


def check_threat_model(norm: str, epsilon: float | tf.Tensor, norms: tuple[str, ...] = ("linf", "l2", "l1")) -> None:
    """Refuses a norm that is not in `norms`, and an epsilon out of its range; a tensor's value is not looked at."""
    if norm not in norms:
        raise unknown_name("norm of this attack", norm, norms)
    if not isinstance(epsilon, tf.Tensor):
        check_epsilon(norm, epsilon)


def check_at_least(lowest: int, **values: int) -> None:
    """Refuses a count, given by its name, that is below `lowest`."""
    for name, value in values.items():
        if value < lowest:
            raise UserError(f"{name} must be {lowest} or more. Received: {name}={value}.")


def checked_batch(
    model: Model, images: tf.Tensor, labels: tf.Tensor, *, pixel_tolerance: float = PIXEL_TOLERANCE
) -> tuple[Model, tf.Tensor, tf.Tensor]:
    """The model of an attack, and its batch as float32 and int32.

    In a graph there are no values to look at, only shapes. Eagerly the model learns how many classes it has, so that
    the attack's own graph knows: some callables, such as a tf.numpy_function, don't say it there.

    Args:
        pixel_tolerance: how far from [0, 1] an image may be.

    Raises:
        UserError: the shapes don't fit; or, eagerly, images are not in [0, 1], a label is no class of the model, or
            the model gives NaN for one of the images.
    """
    images = tf.cast(tf.convert_to_tensor(images), tf.float32)
    labels = tf.convert_to_tensor(labels)
    if images.shape.rank != 4 or not images.shape[:1].is_compatible_with(labels.shape):
        raise UserError(
            "Images have the axes (batch, height, width, channels), and labels are one integer for each image. "
            f"Received: images of shape {images.shape}, labels of shape {labels.shape}."
        )
    if tf.executing_eagerly() and images.shape[0]:
        low, high = float(tf.reduce_min(images)), float(tf.reduce_max(images))
        if not (low >= -pixel_tolerance and high <= 1.0 + pixel_tolerance):
            raise _not_pixels(low, high)
        logits = logits_of(model, images)
        check_logits(logits.numpy())
        check_labels(labels.numpy(), num_images=images.shape[0], num_classes=logits.shape[-1])
        model = with_classes(model, logits.shape[-1])
    return model, images, tf.cast(labels, tf.int32)


def training_batch(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A batch that comes from `fit` as float32 images and (batch,) int32 labels; looks at types and shapes only.

    Raises:
        UserError: integer images, or labels that are not (batch,) or (batch, 1).
    """
    images, labels = tf.convert_to_tensor(images), tf.convert_to_tensor(labels)
    if not images.dtype.is_floating:
        raise UserError(
            f"Images must be numbers in [0, 1]. Received: images of type {images.dtype.name}. Divide 0-255 images by "
            "255, and put the normalisation inside the model."
        )
    if labels.shape.rank == 2 and labels.shape[1] == 1:  # as the data sets of Keras have them
        labels = labels[:, 0]
    if labels.shape.rank not in (None, 1):
        raise UserError(
            f"The attack needs one label for each image, (batch,). Received: labels of shape {labels.shape}. Make "
            "one-hot labels integers, and use SparseCategoricalCrossentropy."
        )
    return tf.cast(images, tf.float32), tf.cast(labels, tf.int32)


def check_images(images: np.ndarray) -> None:
    """Refuses images of an evaluation that are not (batch, height, width, channels) numbers in [0, 1]."""
    if images.ndim != 4:
        raise UserError(
            f"Images have the axes (batch, height, width, channels). Received: an array of shape {images.shape}."
        )
    if not images.size:
        raise UserError(f"There is nothing to attack. Received: images of shape {images.shape}.")
    low, high = float(images.min()), float(images.max())
    if not (low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):
        raise _not_pixels(low, high)


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


def check_logits(logits: np.ndarray, image_ids: np.ndarray | None = None) -> None:
    """Refuses logits that are not (batch, classes) of 2 classes or more, and NaN: no comparison with it holds."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(f"A classifier gives logits (batch, classes), 2 classes or more. Received: {logits.shape}.")
    wrong = np.flatnonzero(np.isnan(logits).any(axis=-1))
    if wrong.size:
        first = wrong[0] if image_ids is None else image_ids[wrong[0]]
        raise UserError(
            f"The classifier gives NaN for {wrong.size} of {len(logits)} images, the first is image {first}. "
            "Check its weights (a training that diverged?) and its precision."
        )


def _not_pixels(low: float, high: float) -> UserError:
    return UserError(
        f"Images must be in [0, 1]. Received: values from {low:g} to {high:g}. Divide 0-255 images by 255, and "
        "put the normalisation inside the model."
    )
