"""Computes the logits of many images."""

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks.outputs import logits_of
from robust_tf.errors import UserError

# A function from images (count, size, size, 3) float32 to logits (count, num_classes) float32.
Predict = Callable[[np.ndarray], np.ndarray]


def batched_logits(classifier: keras.Model, *, batch_size: int) -> Predict:
    """Returns a function from images to logits, which processes the images in batches and is traced once.

    The function raises a UserError if the classifier does not return exactly one tensor, or if a logit is NaN or
    infinite.

    Args:
        classifier: Model that maps images in [0, 1] to logits.
        batch_size: Number of images in a batch.
    """
    signature = tf.TensorSpec([None, *classifier.input_shape[1:]], tf.float32)
    forward = tf.function(lambda images: logits_of(classifier, images), input_signature=[signature])

    def predict(images: np.ndarray) -> np.ndarray:
        parts = [forward(images[start : start + batch_size]).numpy() for start in range(0, len(images), batch_size)]
        logits = np.concatenate(parts).astype(np.float32)
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            raise UserError(
                "The logits of a classifier must be finite numbers. Received: NaN or infinity for "
                f"{(~finite).sum()} of {len(images)} images, {logits[~finite][0].tolist()} for the first of them. The "
                "weights may contain NaN, or the precision may be too low."
            )
        return logits

    return predict
