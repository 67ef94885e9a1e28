"""What a classifier looks at: its input gradients, the images behind its features, its large perturbations."""

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from scipy import ndimage

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.attacks.losses import find_loss, slope_of
from robust_tf.models import features_of

# Keeps the small gradients of a confident network above the smallest number of its precision.
_GRADIENT_SCALE = 256.0


def input_gradients(classifier: keras.Model, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The gradient of each image's cross-entropy with respect to its pixels.

    Args:
        classifier: [0, 1] images to logits.
        images: (batch, height, width, 3) float32 in [0, 1].
        labels: (batch,) int.

    Returns:
        (batch, height, width, 3) float32.

    Source: Tsipras et al. 2019, arXiv 1805.12152, section 3.1.
    """
    loss = find_loss("ce")

    @tf.function
    def gradients(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return slope_of(classifier, images, lambda logits: loss(logits, labels, labels), labels).gradient

    return gradients(tf.constant(images, tf.float32), tf.constant(labels, tf.int32)).numpy()


def gradient_pictures(gradients: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Gradients as pictures: 0 is gray, three standard deviations are black and white. Shapes as in the arguments.

    The gradients of a gray image are summed over the channels: they move together.

    Source of the scaling: Tsipras et al. 2019, arXiv 1805.12152, appendix.
    """
    pictures = np.empty_like(gradients)
    for index, (gradient, image) in enumerate(zip(gradients, images, strict=True)):
        if is_gray(image):
            gradient = np.broadcast_to(gradient.sum(axis=-1, keepdims=True), gradient.shape)
        pictures[index] = np.clip(0.5 + 0.5 * gradient / (3.0 * gradient.std() or 1.0), 0.0, 1.0)
    return pictures


def edge_alignment(gradients: np.ndarray, images: np.ndarray) -> float:
    """Whether the gradients lie on the edges of what is seen: the mean over the images of the correlation, in [-1, 1],
    between the gradient's magnitude and that of the edges in each pixel.

    A figure of ours for what Tsipras et al. 2019 (arXiv 1805.12152) show in pictures. The cosine between image and
    gradient (Etmann et al. 2019, arXiv 1905.04172) would not do: a blob of gradient on a bright object has a high one.

    Args:
        gradients, images: (batch, height, width, 3).
    """
    # Less than a pixel of smoothing: the images are small.
    sigmas, gray = (0.0, 0.7, 0.7), images.mean(axis=-1)
    vertical, horizontal = (ndimage.gaussian_filter(gray, sigmas, order=order) for order in ((0, 1, 0), (0, 0, 1)))
    edges = np.hypot(vertical, horizontal).reshape(len(images), -1)
    magnitudes = np.abs(gradients.sum(axis=-1)).reshape(len(images), -1)
    edges = edges - edges.mean(axis=1, keepdims=True)
    magnitudes = magnitudes - magnitudes.mean(axis=1, keepdims=True)
    norms = np.sqrt((edges**2).sum(axis=1) * (magnitudes**2).sum(axis=1))
    return float(np.mean((edges * magnitudes).sum(axis=1) / np.maximum(norms, 1e-30)))


def invert_features(
    classifier: keras.Model,
    images: np.ndarray,
    start: np.ndarray,
    *,
    steps: int = 1000,
    step_size: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images that have the features of others: the start, moved until its representation is that of `images`.

    Solves min over points in [0, 1] of ||R(points) - R(images)|| / ||R(images)|| by normalized gradient descent whose
    step falls linearly to 0. A robust representation gives images that look like the target; a standard one does not.
    Where all the images are gray, the points stay as gray as they start.

    Args:
        classifier: [0, 1] images to logits; R is `features_of` it.
        images: (batch, height, width, 3) float32: the targets.
        start: same shape: where the descent starts; noise, or other images.
        steps: of the descent.
        step_size: L2 length of the first step, in [0, 1] pixel units. None takes 1/400 for each value of the image,
            which is about the source's 1 at 224 pixels.

    Returns:
        The images, same shape, and the distance that is left for each, (batch,).

    Source: Engstrom et al. 2019, arXiv 1906.00945, equation 4.
    """
    representation = features_of(classifier)
    gray = is_gray(images)
    first_length = math.sqrt(images[0].size) / 400 if step_size is None else step_size

    @tf.function
    def descend(points: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        wanted = _flat(representation(targets, training=False))
        size = tf.norm(wanted, axis=1) + 1e-12

        def distance(points: tf.Tensor) -> tf.Tensor:
            difference = _flat(representation(points, training=False)) - wanted
            return tf.sqrt(tf.reduce_sum(difference**2, axis=1) + 1e-20) / size

        def step(index: tf.Tensor, points: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(points)
                total = _GRADIENT_SCALE * tf.reduce_sum(distance(points))
            gradient = tape.gradient(total, points)
            if gray:
                gradient = tf.zeros_like(gradient) + tf.reduce_mean(gradient, axis=-1, keepdims=True)
            norm = tf.sqrt(tf.reduce_sum(gradient**2, axis=(1, 2, 3), keepdims=True))
            length = first_length * (1.0 - tf.cast(index, tf.float32) / steps)
            return index + 1, tf.clip_by_value(points - length * gradient / (norm + 1e-10), 0.0, 1.0)

        _, points = tf.while_loop(lambda index, _: index < steps, step, (0, points), maximum_iterations=steps)
        return points, distance(points)

    points, left = descend(tf.constant(start, tf.float32), tf.constant(images, tf.float32))
    return points.numpy(), left.numpy()


def large_perturbations(
    classifier: keras.Model, images: np.ndarray, labels: np.ndarray, *, attack: AttackConfig
) -> np.ndarray:
    """Adversarial examples of an epsilon far above what keeps an image's class: what the classifier takes for another.

    Source: Tsipras et al. 2019, arXiv 1805.12152, section 3.2.
    """
    run: Callable[..., tf.Tensor] = tf.function(lambda x, y: run_pgd(classifier, x, y, attack=attack).images_adv)
    return run(tf.constant(images), tf.constant(labels)).numpy()


def is_gray(images: np.ndarray) -> bool:
    """Whether the channels (the last axis) are equal everywhere."""
    return float(np.ptp(images, axis=-1).max()) == 0.0


def _flat(features: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.cast(features, tf.float32), (tf.shape(features)[0], -1))
