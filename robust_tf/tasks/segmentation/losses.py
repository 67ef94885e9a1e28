"""The loss of a segmenter: cross-entropy over the labeled pixels of each image."""

from collections.abc import Sequence
from typing import Any

import keras

from robust_tf.errors import UserError

IGNORED = -1  # in a mask: the pixel has no class and does not count


def labeled_pixels(masks: Any) -> tuple[Any, Any]:
    """Returns which pixels count, (batch, height, width) bool, and the classes, int32, with 0 for pixels that do not.

    Args:
        masks: Classes (batch, height, width), integers or whole floats. Negative numbers are ignored pixels.
    """
    classes = keras.ops.cast(masks, "int32")
    return keras.ops.greater_equal(classes, 0), keras.ops.maximum(classes, 0)


@keras.saving.register_keras_serializable(package="robust_tf")
class PixelCrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy of each image: the mean over its labeled pixels.

    The loss of an image does not depend on the other images of the batch, so every image counts equally, however many
    of its pixels are labeled. An image without labeled pixels has loss 0 and no gradient.

    Args:
        name: Name of the loss.
        class_weights: Factor for the loss of the pixels of each class, (num_classes,), at least 0. The mean is still
            divided by the number of labeled pixels. None means no factors.
        **kwargs: Further arguments of `keras.losses.Loss`.

    Raises:
        UserError: A factor is negative or not finite.

    Example:
        >>> import numpy
        >>> masks = numpy.array([[[0, 1], [-1, -1]], [[-1, -1], [-1, -1]]])
        >>> logits = numpy.zeros((2, 2, 2, 2), "float32")  # both classes are equally likely: the loss is log(2)
        >>> PixelCrossEntropy().call(masks, logits).numpy().round(3).tolist()
        [0.6930000185966492, 0.0]
    """

    def __init__(
        self, name: str = "pixel_cross_entropy", class_weights: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.class_weights = None if class_weights is None else tuple(map(float, class_weights))
        if self.class_weights is not None and not all(0 <= weight < float("inf") for weight in self.class_weights):
            raise UserError(
                f"`class_weights` must be finite numbers of at least 0. Received: class_weights={self.class_weights}."
            )

    from_logits = True  # named as in Keras's own losses

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each image, (batch,).

        Args:
            y_true: Classes (batch, height, width), with -1 for ignored pixels.
            y_pred: Logits (batch, height, width, num_classes).

        Raises:
            UserError: The shapes do not fit together, or there is not one factor for each class.
        """
        _check_shapes(y_true, y_pred)
        counted, classes = labeled_pixels(y_true)
        losses = keras.losses.sparse_categorical_crossentropy(classes, y_pred, from_logits=True)
        if self.class_weights is not None:
            if len(self.class_weights) != y_pred.shape[-1]:
                raise UserError(
                    f"`class_weights` needs one factor for each of the {y_pred.shape[-1]} classes. Received: "
                    f"{len(self.class_weights)} factors."
                )
            losses *= keras.ops.take(keras.ops.convert_to_tensor(self.class_weights, losses.dtype), classes, axis=0)
        # `where`, not a product: the loss of an ignored pixel may be infinite, and 0 times infinity is NaN.
        losses = keras.ops.where(counted, losses, keras.ops.zeros_like(losses))
        pixels = keras.ops.sum(keras.ops.cast(counted, losses.dtype), axis=(1, 2))
        return keras.ops.sum(losses, axis=(1, 2)) / keras.ops.maximum(pixels, 1.0)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "class_weights": self.class_weights}


def _check_shapes(masks: Any, logits: Any) -> None:
    ranks = len(masks.shape), len(logits.shape)
    sizes = zip(masks.shape, logits.shape, strict=False)
    if ranks != (3, 4) or any(None not in pair and pair[0] != pair[1] for pair in sizes):
        raise UserError(
            "Masks must be (batch, height, width), and logits (batch, height, width, num_classes). Received: masks of "
            f"shape {tuple(masks.shape)}, logits of shape {tuple(logits.shape)}."
        )
