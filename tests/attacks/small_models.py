"""Small models for which the best attack is known, and faulty models."""

import numpy as np
import tensorflow as tf

from robust_tf.attacks import NORMS


def linear_model(weights: np.ndarray, bias: np.ndarray | float = 0.0):
    """Returns a model with the logits <weights[k], image> + bias[k]; weights (classes, height, width, channels)."""
    matrix = tf.constant(weights.reshape(len(weights), -1).T, tf.float32)
    offset = tf.constant(bias, tf.float32)

    def logits(images: tf.Tensor) -> tf.Tensor:
        return tf.reshape(images, (tf.shape(images)[0], matrix.shape[0])) @ matrix + offset

    return logits


def two_classes(seed: int = 0, side: int = 4):
    """Returns a linear model and its weights: the logit of class 1 is <weights, image>, the logit of class 0 is 0."""
    weights = np.random.default_rng(seed).standard_normal((side, side, 1)).astype(np.float32)
    return linear_model(np.stack([np.zeros_like(weights), weights])), weights


def best_score(weights: np.ndarray, image: np.ndarray, norm: str, epsilon: float) -> float:
    """Returns min <weights, z> over z in [0, 1] with ||z - image|| <= epsilon, by a slow method in float64."""
    weights, image = weights.astype(np.float64).ravel(), image.astype(np.float64).ravel()
    room = np.where(weights > 0, image, 1 - image)
    if norm == "linf":
        move = np.minimum(room, epsilon)
    elif norm == "l1":
        move, left = np.zeros_like(room), epsilon
        for index in np.argsort(-np.abs(weights)):
            move[index] = min(room[index], left)
            left -= move[index]
    else:
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (
                (middle, high)
                if np.linalg.norm(np.minimum(room, middle * np.abs(weights))) < epsilon
                else (low, middle)
            )
        move = np.minimum(room, low * np.abs(weights))
    return float(weights @ image - np.abs(weights) @ move)


def small_network(classes: int = 5, seed: int = 0):
    """Returns a smooth, nonlinear network for images (batch, 8, 8, 1) with fixed random weights."""
    rng = np.random.default_rng(seed)
    first = tf.constant(rng.standard_normal((64, 24)) / 4, tf.float32)
    second = tf.constant(rng.standard_normal((24, classes)), tf.float32)

    def logits(images: tf.Tensor) -> tf.Tensor:
        return tf.tanh((tf.reshape(images, (tf.shape(images)[0], 64)) - 0.5) @ first) @ second

    return logits


def small_batch(model, count: int = 24, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns images for `small_network` and the labels that it predicts for them."""
    images = np.random.default_rng(seed).random((count, 8, 8, 1)).astype(np.float32)
    return images, model(images).numpy().argmax(axis=1).astype(np.int32)


def without_gradients(model):
    """Returns a model with nearly the same predictions, rounded to steps, so that the gradient is zero everywhere."""

    def logits(images: tf.Tensor) -> tf.Tensor:
        return tf.round(model(images) * 8.0) / 8.0

    return logits


def assert_in_ball(images_adv, images: np.ndarray, norm: str, epsilon: float) -> None:
    images_adv = np.asarray(images_adv, np.float64)
    lengths = NORMS[norm].length(tf.constant(images_adv - images)).numpy()
    assert lengths.max() <= epsilon + 1e-6
    assert images_adv.min() >= 0 and images_adv.max() <= 1
