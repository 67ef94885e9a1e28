"""The geometry of the norms: where an attack may start, how it steps, and back into the ball.

A threat model is a norm and an epsilon together. All functions take and give images of shape
(batch, height, width, channels), float32, and treat every image on its own. Epsilon and step size are in [0, 1] pixel
units, one number for all images or (batch, 1, 1, 1).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import tensorflow as tf

from robust_tf.attacks import seeds as random

_PER_IMAGE = (1, 2, 3)  # all axes but the batch

# The float32 sum of an image and a perturbation is rounded, in each pixel by up to this: half a unit in the last place
# of numbers below 1. Where all pixels are alike they are all rounded the same way, which adds up.
_ROUNDING = 2.0**-25

# Largest value below which a gradient is scaled before it is normalised.
_TINY_GRADIENT = 1e-6

Scale: TypeAlias = float | tf.Tensor


def l1_norm(values: tf.Tensor) -> tf.Tensor:
    """Sum of the absolute values of each image, shape (batch, 1, 1, 1)."""
    return tf.reduce_sum(tf.abs(values), axis=_PER_IMAGE, keepdims=True)


def l2_norm(values: tf.Tensor) -> tf.Tensor:
    """Euclidean norm of each image, shape (batch, 1, 1, 1)."""
    return tf.sqrt(tf.reduce_sum(tf.square(values), axis=_PER_IMAGE, keepdims=True))


def linf_norm(values: tf.Tensor) -> tf.Tensor:
    """Largest absolute value of each image, shape (batch, 1, 1, 1)."""
    return tf.reduce_max(tf.abs(values), axis=_PER_IMAGE, keepdims=True)


def _uniform(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Uniform in [-1, 1]. A seed (2,) draws for the batch in one go, (batch, 2) for each image on its own."""
    if seed.shape.rank == 1:
        return tf.random.stateless_uniform(tf.shape(images), seed=seed, minval=-1.0, maxval=1.0)
    return tf.reshape(2.0 * random.uniform(seed, tf.shape(images)[1:]) - 1.0, tf.shape(images))


def _normal(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    if seed.shape.rank == 1:
        return tf.random.stateless_normal(tf.shape(images), seed=seed)
    return tf.reshape(random.normal(seed, tf.shape(images)[1:]), tf.shape(images))


def _linf_start(images: tf.Tensor, epsilon: Scale, seed: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(images + epsilon * _uniform(images, seed), 0.0, 1.0)


def _linf_step(gradient: tf.Tensor, step_size: Scale) -> tf.Tensor:
    return step_size * tf.sign(gradient)


def _linf_project(images_adv: tf.Tensor, images: tf.Tensor, epsilon: Scale) -> tf.Tensor:
    return tf.clip_by_value(images + tf.clip_by_value(images_adv - images, -epsilon, epsilon), 0.0, 1.0)


def _l2_start(images: tf.Tensor, epsilon: Scale, seed: tf.Tensor) -> tf.Tensor:
    direction = _normal(images, seed)
    # On the sphere, not uniform in the ball: what the reference draws.
    return tf.clip_by_value(images + epsilon * direction / l2_norm(direction), 0.0, 1.0)


def _l2_step(gradient: tf.Tensor, step_size: Scale) -> tf.Tensor:
    # The 1e-10 is the reference's. It would shorten the steps along tiny gradients, and their squares would be 0 in
    # float32: those are scaled first. From 1e-6 on the shortening is below 1e-4, and every bit is as in the reference.
    largest = linf_norm(gradient)
    gradient = tf.where(largest < _TINY_GRADIENT, tf.math.divide_no_nan(gradient, largest), gradient)
    return step_size * gradient / (l2_norm(gradient) + 1e-10)


def _l2_project(images_adv: tf.Tensor, images: tf.Tensor, epsilon: Scale) -> tf.Tensor:
    perturbation = images_adv - images
    norm = l2_norm(perturbation)
    # Inside the ball nothing is scaled. From outside it goes to where no rounding, of the sum below (first term) or of
    # the norm and the division (the others), can end outside again.
    pixels = tf.cast(tf.reduce_prod(tf.shape(images)[1:]), tf.float32)
    radius = tf.maximum(epsilon - _ROUNDING * tf.sqrt(pixels) - 4e-7 * epsilon, 0.0)
    scale = tf.where(norm > epsilon, radius / (norm + 1e-7), 1.0)
    # The clip comes after the scaling: it moves every pixel towards the clean image, so it can't leave the ball.
    return tf.clip_by_value(images + scale * perturbation, 0.0, 1.0)


def _l1_start(images: tf.Tensor, epsilon: Scale, seed: tf.Tensor) -> tf.Tensor:
    return _l1_project(images + _normal(images, seed), images, epsilon)


def _l1_step(gradient: tf.Tensor, step_size: Scale) -> tf.Tensor:
    # The steepest ascent moves one pixel only, which is hopelessly slow; all pixels with a gradient move alike. Which
    # ones keep theirs is the attack's choice.
    signs = tf.sign(gradient)
    return step_size * signs / (l1_norm(signs) + 1e-10)


def _l1_project(images_adv: tf.Tensor, images: tf.Tensor, epsilon: Scale) -> tf.Tensor:
    """Nearest point (Euclidean) of the L1 ball cut with [0, 1].

    The solution is the perturbation moved towards 0 by a threshold, then cut to the room that the pixel range leaves
    (proposition 2.1 of arXiv 2103.01208); its L1 norm falls as the threshold rises, so bisection finds the threshold.
    """
    perturbation = images_adv - images
    size = tf.abs(perturbation)
    room = tf.where(perturbation > 0, 1.0 - images, images)

    def shrunk(threshold: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(size - threshold, 0.0, room)

    def is_inside(threshold: tf.Tensor) -> tf.Tensor:
        # In float64: a float32 sum over an image is off by more than the ball may be missed by.
        return l1_norm(tf.cast(shrunk(threshold), tf.float64)) <= tf.cast(epsilon, tf.float64)

    def halve(i: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        middle = (low + high) / 2
        inside = is_inside(middle)
        return i + 1, tf.where(inside, low, middle), tf.where(inside, middle, high)

    # float32 has 24 bits; the upper end always lies inside the ball.
    high = linf_norm(perturbation)
    _, _, high = tf.while_loop(lambda i, *_: i < 26, halve, (0, tf.zeros_like(high), high), maximum_iterations=26)
    moved = shrunk(tf.where(is_inside(tf.zeros_like(high)), 0.0, high))
    points = tf.clip_by_value(images + tf.sign(perturbation) * moved, 0.0, 1.0)
    # Rounding errors add up over all pixels in this norm: a pixel that was rounded outwards goes one number back.
    return tf.where(tf.abs(points - images) > moved, tf.math.nextafter(points, images), points)


class Norm(NamedTuple):
    """One norm's parts of projected gradient ascent.

    Attributes:
        length: values -> their norm, (batch, 1, 1, 1).
        random_start: (images, epsilon, seed) -> a random point of the ball within [0, 1]; a seed of shape (2,) draws
            for the whole batch, (batch, 2) for each image on its own.
        step: (gradient, step_size) -> the steepest ascent of length step_size in this norm.
        project: (images_adv, images, epsilon) -> nearest point of the ball around images, then clipped to [0, 1].
    """

    length: Callable[[tf.Tensor], tf.Tensor]
    random_start: Callable[[tf.Tensor, Scale, tf.Tensor], tf.Tensor]
    step: Callable[[tf.Tensor, Scale], tf.Tensor]
    project: Callable[[tf.Tensor, tf.Tensor, Scale], tf.Tensor]


# Source of linf and l2: MadryLab/robustness, attack_steps.py, as described in Engstrom et al. 2019; of l1: Croce and
# Hein 2021, arXiv 2103.01208.
NORMS = {
    "linf": Norm(linf_norm, _linf_start, _linf_step, _linf_project),
    "l2": Norm(l2_norm, _l2_start, _l2_step, _l2_project),
    "l1": Norm(l1_norm, _l1_start, _l1_step, _l1_project),
}


class _Hyperplane(NamedTuple):
    """What each pixel can do to bring the value of a linear function to 0; the largest weight is 1.

    Attributes:
        direction: -1, 0 or 1: which way it lowers |value|.
        room: how far it is to the end of [0, 1] there.
        weight: by how much |value| falls for each unit of the way, >= 0.
        needed: (batch, 1, 1, 1), |value| in the same scale.
    """

    direction: tf.Tensor
    room: tf.Tensor
    weight: tf.Tensor
    needed: tf.Tensor


def _hyperplane(points: tf.Tensor, normal: tf.Tensor, value: tf.Tensor) -> _Hyperplane:
    direction = -tf.where(value >= 0, 1.0, -1.0) * tf.sign(normal)
    room = tf.where(direction > 0, 1.0 - points, tf.where(direction < 0, points, 0.0))
    scale = linf_norm(normal)  # squares of tiny gradients would be 0 in float32
    weight, needed = (tf.math.divide_no_nan(tf.abs(part), scale) for part in (normal, value))
    return _Hyperplane(direction, room, weight, needed)


def _l2_to_hyperplane(points: tf.Tensor, normal: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    plane = _hyperplane(points, normal, value)
    return _move_together(plane, speed=plane.weight)


def _linf_to_hyperplane(points: tf.Tensor, normal: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    plane = _hyperplane(points, normal, value)
    return _move_together(plane, speed=tf.abs(plane.direction))


def _move_together(plane: _Hyperplane, *, speed: tf.Tensor) -> tf.Tensor:
    """Moves each pixel by min(speed * time, its room), for the shortest time that brings the value to 0.

    What is gained, sum weight * min(speed * time, room), is concave and piecewise linear in time: Newton's method from
    time 0 never overshoots and ends after finitely many pieces.
    """

    def left_after(time: tf.Tensor) -> tf.Tensor:
        gained = plane.weight * tf.minimum(speed * time, plane.room)
        return plane.needed - tf.reduce_sum(gained, axis=_PER_IMAGE, keepdims=True)

    def rate_at(time: tf.Tensor) -> tf.Tensor:
        moving = tf.cast(speed * time < plane.room, tf.float32)
        return tf.reduce_sum(plane.weight * speed * moving, axis=_PER_IMAGE, keepdims=True)

    def unfinished(i: tf.Tensor, time: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
        del i
        return tf.reduce_any((left > 1e-6 * plane.needed) & (rate_at(time) > 0))

    def newton(i: tf.Tensor, time: tf.Tensor, left: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        time += tf.math.divide_no_nan(tf.maximum(left, 0.0), rate_at(time))
        return i + 1, time, left_after(time)

    # Images pass a handful of pieces; 30 is a limit for the rounding of the last one.
    start = (tf.constant(0), tf.zeros_like(plane.needed), plane.needed)
    _, time, _ = tf.while_loop(unfinished, newton, start, maximum_iterations=30)
    return plane.direction * tf.minimum(speed * time, plane.room)


def _l1_to_hyperplane(points: tf.Tensor, normal: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """Moves the pixels of the largest weights to the end of their room, one after the other, until the value is 0."""
    plane = _hyperplane(points, normal, value)
    flat = (tf.shape(points)[0], -1)
    weight, room = tf.reshape(plane.weight, flat), tf.reshape(plane.room, flat)
    order = tf.argsort(weight, axis=1, direction="DESCENDING", stable=True)
    weight, room = tf.gather(weight, order, batch_dims=1), tf.gather(room, order, batch_dims=1)
    left = plane.needed[:, :, 0, 0] - tf.cumsum(weight * room, axis=1, exclusive=True)
    moved = tf.minimum(room, tf.math.divide_no_nan(tf.maximum(left, 0.0), weight))
    moved = tf.gather(moved, tf.argsort(order, axis=1), batch_dims=1)
    return plane.direction * tf.reshape(moved, tf.shape(points))


# (points, normal, value (batch, 1, 1, 1)) -> the shortest move within [0, 1] onto the hyperplane
# {z: value + <normal, z - points> = 0}; where the pixel range doesn't reach it, to the corner that comes nearest.
# Source: Croce and Hein 2020, arXiv 1907.02044, section 2.2.
HYPERPLANE_PROJECTIONS = {"linf": _linf_to_hyperplane, "l2": _l2_to_hyperplane, "l1": _l1_to_hyperplane}

# The norm that measures gradients: |value| / it is the distance from the hyperplane.
DUAL_NORMS = {"linf": l1_norm, "l2": l2_norm, "l1": linf_norm}
