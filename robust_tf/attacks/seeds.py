"""Random numbers that depend on the image alone, not on the batch it comes in or on what ran before.

Seeds have the shape (batch, 2) int32, with one pair for each image. The same seeds give the same numbers on every
device. Under XLA they give other numbers, because XLA has a different implementation of Philox (TensorFlow 2.21).
"""

import zlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from robust_tf.errors import UserError

Seed: TypeAlias = int | tf.Tensor


def image_seeds(seed: int, stream: str, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns a pair of seeds for each image.

    Args:
        seed: Seed for the whole evaluation.
        stream: Purpose of the numbers, e.g. the name of an attack. Different streams are independent.
        image_ids: Numbers of the images in their data set, (batch,) integers.

    Returns:
        Seeds (batch, 2) int32.
    """
    # Philox scrambles the pair, so neighboring pairs give unrelated numbers.
    first = zlib.crc32(f"{stream}/{seed}".encode()) & 0x7FFFFFFF
    return np.stack([np.full(len(image_ids), first), np.asarray(image_ids)], axis=1).astype(np.int32)


def as_seeds(seed: Seed, batch: tf.Tensor) -> tf.Tensor:
    """Returns seeds (batch, 2) int32. From an integer, the image at position i gets the pair (seed, i)."""
    if isinstance(seed, int | np.integer):
        seed = int(seed) % 2**31  # any integer is a seed
        return tf.stack([tf.fill([batch], seed), tf.range(batch)], axis=1)
    seeds = tf.cast(seed, tf.int32)
    if seeds.shape.rank != 2 or seeds.shape[1] != 2:
        raise UserError(
            "A seed must be an integer, or (batch, 2) integers with a pair for each image. "
            f"Received: an array of shape {seeds.shape}."
        )
    return seeds


def fold_in(seeds: tf.Tensor, number: tf.Tensor | int) -> tf.Tensor:
    """Returns new seeds for one part of the work, such as the restart with this number."""
    return seeds + tf.stack([tf.cast(number, tf.int32) * 0x3C6EF35F, 0])  # an overflow does no harm


def uniform(seeds: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Draws uniform numbers in [0, 1) of the given shape for each image, (batch, *shape) float32."""
    return _each(seeds, shape, tf.random.stateless_uniform)


def normal(seeds: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Draws standard normal numbers of the given shape for each image, (batch, *shape) float32."""
    return _each(seeds, shape, tf.random.stateless_normal)


def _each(seeds: tf.Tensor, shape: tf.Tensor, draw: Callable[..., tf.Tensor]) -> tf.Tensor:
    drawn = tf.map_fn(lambda seed: draw(shape, seed), seeds, fn_output_signature=tf.float32)
    return tf.reshape(
        drawn, tf.concat([tf.shape(seeds)[:1], shape], axis=0)
    )  # map_fn over an empty batch loses the shape
