"""Random numbers that depend on the image alone, not on the batch it comes in or on what ran before.

Seeds have the shape (batch, 2) int32, with one pair for each image. The same seeds give the same numbers on every
device, with and without XLA. They are the numbers that `tf.random.stateless_uniform` and `stateless_normal` draw for
each seed without XLA. These functions cannot be used here, because under XLA they draw other numbers (TensorFlow 2.21),
and because they take one seed at a time, which takes long on a GPU.

Source: Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math
import zlib
from collections.abc import Sequence
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


def uniform(seeds: tf.Tensor, shape: tf.Tensor | Sequence[int]) -> tf.Tensor:
    """Draws uniform numbers in [0, 1) of the given shape for each image, (batch, *shape) float32."""
    return _each(seeds, shape, tf.stack([_unit_interval(bits) for bits in _random_bits(seeds, shape)], axis=-1))


def normal(seeds: tf.Tensor, shape: tf.Tensor | Sequence[int]) -> tf.Tensor:
    """Draws standard normal numbers of the given shape for each image, (batch, *shape) float32."""
    numbers = [_unit_interval(bits) for bits in _random_bits(seeds, shape)]
    pairs = []
    for first, second in (numbers[:2], numbers[2:]):  # the method of Box and Muller
        length = tf.sqrt(-2.0 * tf.math.log(tf.maximum(first, 1e-7)))
        pairs += [length * tf.sin(2.0 * math.pi * second), length * tf.cos(2.0 * math.pi * second)]
    return _each(seeds, shape, tf.stack(pairs, axis=-1))


# All integers of 32 bits are held in int64, whose product of two of them is exact up to its sign, and which every
# device can shift, mask and multiply.
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def _random_bits(seeds: tf.Tensor, shape: tf.Tensor | Sequence[int]) -> list[tf.Tensor]:
    """Returns at least as many random numbers of 32 bits as `shape` holds, as four tensors (batch, numbers / 4) int64.

    The k-th number of an image is in tensor k % 4, at position k // 4.
    """
    seeds = tf.cast(seeds, tf.int64)  # keeps the sign, as TensorFlow does
    counter = [_low(seeds[:, 0]), _high(seeds[:, 0]), _low(seeds[:, 1]), _high(seeds[:, 1])]
    # As in TensorFlow, a fixed key scrambles the pair. The result is the key and the upper half of the counter.
    zero = tf.zeros_like(counter[0])
    *key, third, fourth = _philox(counter, [zero + 0x3EC8F720, zero + 0x02461E29])
    blocks = -(-tf.reduce_prod(tf.cast(shape, tf.int64)) // 4)
    position = tf.range(blocks)[None]  # below 2**32
    rest = tf.zeros_like(position)
    counter = [position + zero[:, None], rest + zero[:, None], rest + third[:, None], rest + fourth[:, None]]
    return _philox(counter, [part[:, None] for part in key])


def _philox(counter: list[tf.Tensor], key: list[tf.Tensor]) -> list[tf.Tensor]:
    """Returns four random numbers for each counter of four numbers and key of two, all of 32 bits."""
    for number in range(_ROUNDS):
        bumped = [_low(part + number * step) for part, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            _xor(_xor(_high(right), counter[1]), bumped[0]),
            _low(right),
            _xor(_xor(_high(left), counter[3]), bumped[1]),
            _low(left),
        ]
    return counter


def _low(values: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_and(values, tf.constant(_MASK, tf.int64))


def _high(values: tf.Tensor) -> tf.Tensor:
    return _low(tf.bitwise.right_shift(values, tf.constant(32, tf.int64)))


def _xor(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(left, right)


def _unit_interval(bits: tf.Tensor) -> tf.Tensor:
    """Returns floats in [0, 1) from the lower 23 of 32 random bits."""
    return tf.cast(tf.bitwise.bitwise_and(bits, tf.constant(0x7FFFFF, tf.int64)), tf.float32) * 2.0**-23


def _each(seeds: tf.Tensor, shape: tf.Tensor | Sequence[int], drawn: tf.Tensor) -> tf.Tensor:
    """Returns numbers (batch, blocks, 4) as (batch, *shape), without those that are left over."""
    flat = tf.reshape(drawn, [tf.shape(seeds)[0], 4 * tf.shape(drawn)[1]])
    count = tf.reduce_prod(tf.cast(shape, tf.int32))
    return tf.reshape(flat[:, :count], tf.concat([tf.shape(seeds)[:1], tf.cast(shape, tf.int32)], axis=0))
