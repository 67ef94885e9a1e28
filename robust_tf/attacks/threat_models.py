"""The geometry of each norm: where an attack may start, how it steps, and how it gets back into the ball.

A threat model is a norm and an epsilon together. All functions here take and return float32 images of shape
(batch, height, width, channels) and treat every image separately. Epsilon and the step size are in [0, 1] pixel units,
either one number for all images or an array of shape (batch, 1, 1, 1).

To add a norm, write its `Geometry`, add it to `NORMS` at the end of this file, and add its name to `AttackNorm` in
`robust_tf/config/names.py`. APGD (with the kind of steps that it takes for linf and l2), FAB, the cascade of attacks
and `robust_tf.evaluate` then accept it. The other attacks refuse a norm until it is listed in one more place:

* PGD and FGSM, and therefore training, take the norms in `robust_tf.config.attack.Norm`. The only training objective
  with its own code for each norm is free adversarial training (`training/objectives/free.py`).
* Square takes the norms in `SQUARE_NORMS` in `square.py`, because it needs patches that suit the norm.
* The attack probe of an exported model takes the norms that are listed in `serving/publish/probe.py`.

The tests in `tests/attacks` run on every entry of `NORMS`. Add a radius for the new norm to their `EPSILONS`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, get_args

import tensorflow as tf

from robust_tf.attacks import seeds
from robust_tf.config.attack import Norm

_PER_IMAGE = (1, 2, 3)  # all axes except the batch

# Largest rounding error in a pixel when a perturbation is added to an image in float32: half a unit in the last place
# of numbers below 1. Where all pixels are equal they are all rounded the same way, and the errors add up.
_ROUNDING = 2.0**-25

# Gradients whose largest value is below this are scaled up before they are normalized.
_TINY_GRADIENT = 1e-6

Scale: TypeAlias = float | tf.Tensor


def l1_norm(values: tf.Tensor) -> tf.Tensor:
    """Returns the sum of the absolute values of each image, shape (batch, 1, 1, 1)."""
    return tf.reduce_sum(tf.abs(values), axis=_PER_IMAGE, keepdims=True)


def l2_norm(values: tf.Tensor) -> tf.Tensor:
    """Returns the Euclidean norm of each image, shape (batch, 1, 1, 1)."""
    return tf.sqrt(tf.reduce_sum(tf.square(values), axis=_PER_IMAGE, keepdims=True))


def linf_norm(values: tf.Tensor) -> tf.Tensor:
    """Returns the largest absolute value of each image, shape (batch, 1, 1, 1)."""
    return tf.reduce_max(tf.abs(values), axis=_PER_IMAGE, keepdims=True)


def _uniform(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws from [-1, 1]: for the whole batch at once if the seed is (2,), for each image if it is (batch, 2)."""
    if seed.shape.rank == 1:
        return tf.random.stateless_uniform(tf.shape(images), seed=seed, minval=-1.0, maxval=1.0)
    return tf.reshape(2.0 * seeds.uniform(seed, tf.shape(images)[1:]) - 1.0, tf.shape(images))


def _normal(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    if seed.shape.rank == 1:
        return tf.random.stateless_normal(tf.shape(images), seed=seed)
    return tf.reshape(seeds.normal(seed, tf.shape(images)[1:]), tf.shape(images))


def _linf_start(images: tf.Tensor, epsilon: Scale, seed: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(images + epsilon * _uniform(images, seed), 0.0, 1.0)


def _linf_step(gradient: tf.Tensor, step_size: Scale) -> tf.Tensor:
    return step_size * tf.sign(gradient)


def _linf_project(images_adv: tf.Tensor, images: tf.Tensor, epsilon: Scale) -> tf.Tensor:
    return tf.clip_by_value(images + tf.clip_by_value(images_adv - images, -epsilon, epsilon), 0.0, 1.0)


def _l2_start(images: tf.Tensor, epsilon: Scale, seed: tf.Tensor) -> tf.Tensor:
    direction = _normal(images, seed)
    # The reference, too, draws from the sphere rather than from the ball.
    return tf.clip_by_value(images + epsilon * direction / l2_norm(direction), 0.0, 1.0)


def _l2_step(gradient: tf.Tensor, step_size: Scale) -> tf.Tensor:
    # The reference adds 1e-10, which would shorten the steps along tiny gradients, and their squares would vanish in
    # float32. Such gradients are therefore scaled up first. For all other gradients the result equals the reference
    # bit by bit, and the 1e-10 shortens the step by less than 1e-4.
    largest = linf_norm(gradient)
    # One division, by 1 where nothing is scaled, is faster than a choice between two results for each pixel.
    gradient = gradient / tf.where((largest > 0.0) & (largest < _TINY_GRADIENT), largest, tf.ones_like(largest))
    return step_size * gradient / (l2_norm(gradient) + 1e-10)


def _l2_project(images_adv: tf.Tensor, images: tf.Tensor, epsilon: Scale) -> tf.Tensor:
    perturbation = images_adv - images
    length = l2_norm(perturbation)
    # Points inside the ball stay where they are. Points outside are moved to slightly less than the radius, so that
    # rounding cannot take them out again. The first term covers the rounding of the sum below, the second covers the
    # rounding of the norm and the division.
    pixels = tf.cast(tf.reduce_prod(tf.shape(images)[1:]), tf.float32)
    radius = tf.maximum(epsilon - _ROUNDING * tf.sqrt(pixels) - 4e-7 * epsilon, 0.0)
    scale = tf.where(length > epsilon, radius / (length + 1e-7), tf.ones_like(length))
    # Clipping comes last: it moves every pixel towards the clean image, so the point stays in the ball.
    return tf.clip_by_value(images + scale * perturbation, 0.0, 1.0)


def _l1_start(images: tf.Tensor, epsilon: Scale, seed: tf.Tensor) -> tf.Tensor:
    return _l1_project(images + _normal(images, seed), images, epsilon)


def _l1_step(gradient: tf.Tensor, step_size: Scale) -> tf.Tensor:
    # The steepest ascent would move a single pixel, which is far too slow. Here all pixels with a gradient move by the
    # same amount, and the attack chooses which pixels keep their gradient.
    signs = tf.sign(gradient)
    return step_size * signs / (l1_norm(signs) + 1e-10)


def _l1_project(images_adv: tf.Tensor, images: tf.Tensor, epsilon: Scale) -> tf.Tensor:
    """Returns the nearest point, in Euclidean distance, of the intersection of the L1 ball and [0, 1].

    The solution moves the perturbation towards 0 by a threshold and then limits it to the room that the pixel range
    leaves (proposition 2.1 of arXiv 2103.01208). Its L1 norm falls as the threshold rises, so bisection finds the
    threshold.
    """
    perturbation = images_adv - images
    size = tf.abs(perturbation)
    room = tf.where(perturbation > 0, 1.0 - images, images)

    def shrunk(threshold: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(size - threshold, 0.0, room)

    def is_inside(threshold: tf.Tensor) -> tf.Tensor:
        # In float64, because the rounding error of a float32 sum over an image exceeds the tolerance for the ball.
        return l1_norm(tf.cast(shrunk(threshold), tf.float64)) <= tf.cast(epsilon, tf.float64)

    def halve(i: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        middle = (low + high) / 2
        inside = is_inside(middle)
        return i + 1, tf.where(inside, low, middle), tf.where(inside, middle, high)

    # 26 halvings, because float32 has 24 bits. The upper end always lies inside the ball.
    high = linf_norm(perturbation)
    _, _, high = tf.while_loop(lambda i, *_: i < 26, halve, (0, tf.zeros_like(high), high), maximum_iterations=26)
    moved = shrunk(tf.where(is_inside(tf.zeros_like(high)), tf.zeros_like(high), high))
    points = tf.clip_by_value(images + tf.sign(perturbation) * moved, 0.0, 1.0)
    # In this norm rounding errors add up over all pixels, so a pixel that was rounded outwards is moved back to the
    # next float32 number.
    return tf.where(tf.abs(points - images) > moved, tf.math.nextafter(points, images), points)


class _Hyperplane(NamedTuple):
    """What each pixel can contribute to bringing the value of a linear function to 0.

    Attributes:
        direction: Direction in which the pixel lowers |value|: -1, 0 or 1.
        room: Distance to the end of [0, 1] in this direction.
        weight: Decrease of |value| for each unit that the pixel moves, scaled so that the largest weight is 1.
        needed: |value| in the same scale, (batch, 1, 1, 1).
    """

    direction: tf.Tensor
    room: tf.Tensor
    weight: tf.Tensor
    needed: tf.Tensor


def _hyperplane(points: tf.Tensor, normal: tf.Tensor, value: tf.Tensor) -> _Hyperplane:
    direction = -tf.where(value >= 0, tf.ones_like(value), -tf.ones_like(value)) * tf.sign(normal)
    room = tf.where(direction > 0, 1.0 - points, tf.where(direction < 0, points, tf.zeros_like(points)))
    scale = linf_norm(normal)  # without it, the squares of tiny gradients would be 0 in float32
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

    The gain, the sum of weight * min(speed * time, room), is concave and piecewise linear in time. Newton's method from
    time 0 therefore never overshoots and ends after finitely many pieces.
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

    # A few steps are enough; the limit of 30 only ends a search that rounding keeps from converging.
    start = (tf.constant(0), tf.zeros_like(plane.needed), plane.needed)
    _, time, _ = tf.while_loop(unfinished, newton, start, maximum_iterations=30)
    return plane.direction * tf.minimum(speed * time, plane.room)


def _l1_to_hyperplane(points: tf.Tensor, normal: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """Moves pixels to the end of their room, starting with the largest weights, until the value is 0."""
    plane = _hyperplane(points, normal, value)
    flat = (tf.shape(points)[0], -1)
    weight, room = tf.reshape(plane.weight, flat), tf.reshape(plane.room, flat)
    order = tf.argsort(weight, axis=1, direction="DESCENDING", stable=True)
    weight, room = tf.gather(weight, order, batch_dims=1), tf.gather(room, order, batch_dims=1)
    left = plane.needed[:, :, 0, 0] - tf.cumsum(weight * room, axis=1, exclusive=True)
    moved = tf.minimum(room, tf.math.divide_no_nan(tf.maximum(left, 0.0), weight))
    moved = tf.gather(moved, tf.argsort(order, axis=1), batch_dims=1)
    return plane.direction * tf.reshape(moved, tf.shape(points))


class Geometry(NamedTuple):
    """What an attack needs to know about one norm.

    Attributes:
        length: Function of values (batch, height, width, channels) that returns their norm, (batch, 1, 1, 1).
        dual_length: The same for the dual norm. The dual norm of a gradient is the largest change that a perturbation
            of length 1 can make to a linear function with this gradient.
        random_start: Function of (images, epsilon, seed) that returns a random point of the ball within [0, 1]. A seed
            of shape (2,) draws for the whole batch at once, one of shape (batch, 2) for each image separately.
        step: Function of (gradient, step_size) that returns the steepest ascent of length step_size in this norm.
        project: Function of (images_adv, images, epsilon) that returns the nearest point of the ball around the images,
            clipped to [0, 1].
        to_hyperplane: Function of (points, normal, value) with a value of shape (batch, 1, 1, 1). It returns the
            shortest move within [0, 1] onto the hyperplane {z: value + <normal, z - points> = 0}. Where the pixel range
            does not reach the hyperplane, the move goes to the corner that comes nearest.

    Example:
        >>> import tensorflow as tf
        >>> from robust_tf.attacks import NORMS
        >>> images = tf.fill([1, 2, 2, 1], 0.5)
        >>> images_adv = NORMS["l2"].project(images + 1.0, images, 0.5)
        >>> tf.round(100.0 * images_adv[0, :, :, 0]).numpy().tolist()
        [[75.0, 75.0], [75.0, 75.0]]
        >>> round(float(NORMS["l2"].length(images_adv - images)[0, 0, 0, 0]), 3)
        0.5
    """

    length: Callable[[tf.Tensor], tf.Tensor]
    dual_length: Callable[[tf.Tensor], tf.Tensor]
    random_start: Callable[[tf.Tensor, Scale, tf.Tensor], tf.Tensor]
    step: Callable[[tf.Tensor, Scale], tf.Tensor]
    project: Callable[[tf.Tensor, tf.Tensor, Scale], tf.Tensor]
    to_hyperplane: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


# Sources: linf and l2 follow MadryLab/robustness (attack_steps.py), as described in Engstrom et al. 2019; l1 follows
# Croce and Hein 2021, arXiv 2103.01208; the moves to a hyperplane follow Croce and Hein 2020, arXiv 1907.02044,
# section 2.2.
NORMS: dict[str, Geometry] = {
    "linf": Geometry(linf_norm, l1_norm, _linf_start, _linf_step, _linf_project, _linf_to_hyperplane),
    "l2": Geometry(l2_norm, l2_norm, _l2_start, _l2_step, _l2_project, _l2_to_hyperplane),
    "l1": Geometry(l1_norm, linf_norm, _l1_start, _l1_step, _l1_project, _l1_to_hyperplane),
}

# The norms for which the plain gradient step of PGD and FGSM works well. It does not for l1, where an attack has to
# choose which pixels to move.
PGD_NORMS: tuple[str, ...] = get_args(Norm)
