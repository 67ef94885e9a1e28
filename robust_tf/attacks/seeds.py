"""Random numbers that belong to an image, whatever batch it comes in and whatever ran before.

A seed is (batch, 2) int32: one pair for each image. The same seed gives the same numbers on every device;
compiled by XLA it gives others, since that has a Philox of its own (TensorFlow 2.21).
"""

import zlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from robust_tf.errors import UserError

Seed: TypeAlias = int | tf.Tensor


def image_seeds(seed: int, stream: str, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """A pair of seeds for each image.

    Args:
        seed: of the whole evaluation.
        stream: what the numbers are for, e.g. the attack's name; different streams are independent.
        image_ids: (batch,) integers, the images' numbers in the data set.

    Returns:
        (batch, 2) int32.
    """
    # Philox scrambles the pair, so neighbouring pairs give unrelated numbers.
    first = zlib.crc32(f"{stream}/{seed}".encode()) & 0x7FFFFFFF
    return np.stack([np.full(len(image_ids), first), np.asarray(image_ids)], axis=1).astype(np.int32)


def as_seeds(seed: Seed, batch: tf.Tensor) -> tf.Tensor:
    """(batch, 2) int32; of an integer, the image at position i gets the pair (seed, i)."""
    if isinstance(seed, int | np.integer):
        seed = int(seed) % 2**31  # any integer is a seed
        return tf.stack([tf.fill([batch], seed), tf.range(batch)], axis=1)
    seeds = tf.cast(seed, tf.int32)
    if seeds.shape.rank != 2 or seeds.shape[1] != 2:
        raise UserError(
            "A seed is an integer, or (batch, 2) integers with a pair for each image. "
            f"Received: an array of shape {seeds.shape}."
        )
    return seeds


def fold_in(seeds: tf.Tensor, number: tf.Tensor | int) -> tf.Tensor:
    """New seeds for part `number` of the work (a restart, a target class)."""
    return seeds + tf.stack([tf.cast(number, tf.int32) * 0x3C6EF35F, 0])  # wraps around, which is harmless


def uniform(seeds: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Numbers in [0, 1) of this shape for each image, (batch, *shape) float32."""
    return _each(seeds, shape, tf.random.stateless_uniform)


def normal(seeds: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Standard normal numbers of this shape for each image, (batch, *shape) float32."""
    return _each(seeds, shape, tf.random.stateless_normal)


def _each(seeds: tf.Tensor, shape: tf.Tensor, draw: Callable[..., tf.Tensor]) -> tf.Tensor:
    drawn = tf.map_fn(lambda seed: draw(shape, seed), seeds, fn_output_signature=tf.float32)
    return tf.reshape(drawn, tf.concat([tf.shape(seeds)[:1], shape], axis=0))  # of no images at all it has no shape
