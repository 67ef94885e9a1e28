"""Shows what a classifier looks at, with input gradients, images with given features, and large perturbations."""

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from scipy import ndimage

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.attacks.loops import step_of_loop
from robust_tf.attacks.losses import find_loss, slope_of
from robust_tf.models import features_of

# Factor that scales the loss, so that the small gradients of a confident network are not rounded to zero.
_GRADIENT_SCALE = 256.0


def input_gradients(classifier: keras.Model, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the gradient of the cross-entropy of each image with respect to its pixels.

    Args:
        classifier: Model that maps images in [0, 1] to logits.
        images: Images, (batch, height, width, 3) float32 in [0, 1].
        labels: Labels, (batch,) int.

    Returns:
        Gradients, (batch, height, width, 3) float32.

    Source: Tsipras et al. 2019, arXiv 1805.12152, section 3.1.
    """
    loss = find_loss("ce")

    @tf.function
    def gradients(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return slope_of(classifier, images, lambda logits: loss(logits, labels, labels), labels).gradient

    found: np.ndarray = gradients(tf.constant(images, tf.float32), tf.constant(labels, tf.int32)).numpy()
    return found


def gradient_pictures(gradients: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Returns gradients as pictures, in which 0 is gray and three standard deviations are black or white.

    The gradients of a gray image are summed over the channels, because its channels change together.

    Args:
        gradients: Gradients, (batch, height, width, 3).
        images: Images, (batch, height, width, 3).

    Returns:
        Pictures, (batch, height, width, 3) in [0, 1].

    Source: Tsipras et al. 2019, arXiv 1805.12152, appendix, for the scaling.
    """
    pictures = np.empty_like(gradients)
    for index, (gradient, image) in enumerate(zip(gradients, images, strict=True)):
        if is_gray(image):
            gradient = np.broadcast_to(gradient.sum(axis=-1, keepdims=True), gradient.shape)
        pictures[index] = np.clip(0.5 + 0.5 * gradient / (3.0 * gradient.std() or 1.0), 0.0, 1.0)
    return pictures


def edge_alignment(gradients: np.ndarray, images: np.ndarray) -> float:
    """Returns how well the gradients agree with the edges in the images.

    The result is the correlation between the magnitude of the gradient and the strength of the edges over all pixels
    of an image, averaged over the images. It is our own measure of what Tsipras et al. 2019 (arXiv 1805.12152) show in
    pictures. The cosine between image and gradient (Etmann et al. 2019, arXiv 1905.04172) is less suitable, because it
    is high for any blob of gradient on a bright object.

    Args:
        gradients: Gradients, (batch, height, width, 3).
        images: Images, (batch, height, width, 3).

    Returns:
        Correlation in [-1, 1].
    """
    # Smooths by less than a pixel, because the images are small.
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
    """Returns images that have nearly the same features as the given images.

    Minimizes ||R(points) - R(images)|| / ||R(images)|| over points in [0, 1] by normalized gradient descent with a step
    size that decreases linearly to 0. With a robust representation R, the result looks like the given images; with a
    standard one it does not. If all images are gray, the channels of a point change together.

    Args:
        classifier: Model that maps images in [0, 1] to logits. Its features are those of `features_of`.
        images: Target images, (batch, height, width, 3) float32 in [0, 1].
        start: Points at which the descent starts, for example noise or other images, in the same shape.
        steps: Number of steps.
        step_size: L2 length of the first step, in [0, 1] pixel units. None uses the square root of the number of values
            of an image divided by 400, which is about 1 at 224 pixels, as in the source.

    Returns:
        Images of the same shape, and the remaining relative distance of each, (batch,).

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

        @step_of_loop
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
    """Returns adversarial examples with an epsilon so large that a robust classifier shows objects of other classes.

    Args:
        classifier: Model that maps images in [0, 1] to logits.
        images: Images, (batch, height, width, 3) float32 in [0, 1].
        labels: Labels, (batch,) int.
        attack: Attack with a large epsilon.

    Returns:
        Adversarial images, (batch, height, width, 3) float32 in [0, 1].

    Source: Tsipras et al. 2019, arXiv 1805.12152, section 3.2.
    """
    run: Callable[..., tf.Tensor] = tf.function(lambda x, y: run_pgd(classifier, x, y, attack=attack).images_adv)
    images_adv: np.ndarray = run(tf.constant(images), tf.constant(labels)).numpy()
    return images_adv


def is_gray(images: np.ndarray) -> bool:
    """Returns whether all channels (the last axis) are equal in every pixel."""
    return float(np.ptp(images, axis=-1).max()) == 0.0


def _flat(features: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.cast(features, tf.float32), (tf.shape(features)[0], -1))
