"""FAB, the fast adaptive boundary attack: the nearest wrong image (Croce and Hein 2020, arXiv 1907.02044)."""

import math
from typing import Literal, NamedTuple

import tensorflow as tf

from robust_tf.attacks.checks import check_at_least, check_threat_model, checked_batch
from robust_tf.attacks.loops import State, in_graph, repeat, repeat_while_resisting
from robust_tf.attacks.losses import LOSSES, Model, is_correct, likeliest_targets, logits_of, num_classes, slope_of
from robust_tf.attacks.seeds import Seed, as_seeds, fold_in
from robust_tf.attacks.threat_models import DUAL_NORMS, HYPERPLANE_PROJECTIONS, NORMS
from robust_tf.errors import UserError

_LARGEST_BIAS = 0.1  # alpha_max: how far a step may be drawn towards the clean image's own projection
_OVERSHOOT = 1.05  # eta: beyond the linearised boundary, so that the real one is crossed
_BACKWARD = 0.9  # beta: from a wrong image back towards the clean one


class _Boundary(NamedTuple):
    """A linearised decision boundary: {z: value + <gradient, z - points> = 0}.

    Attributes:
        value: (batch,) float32, logit of another class minus the label's.
        gradient: (batch, height, width, channels) float32.
        distance: (batch,) float32, of the points from it.
    """

    value: tf.Tensor
    gradient: tf.Tensor
    distance: tf.Tensor


def fab(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    norm: Literal["linf", "l2", "l1"],
    epsilon: float | tf.Tensor,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    early_stop: bool = False,
    seed: Seed = 0,
) -> tf.Tensor:
    """Minimal adversarial examples: the nearest image found that the model gets wrong.

    Solves min ||images_adv - images|| subject to a wrong prediction and images_adv in [0, 1], by projections onto the
    linearised decision boundary within [0, 1]. It needs no step size and is invariant to a scaling of the logits.
    Runs eagerly (traced anew at each call) and inside tf.function (wrap the call when there are many batches).

    Args:
        model: any callable from images to logits; a Keras model is run in inference mode. Normalisation belongs
            inside it.
        images: (batch, height, width, channels), float, in [0, 1].
        labels: (batch,) or (batch, 1) integers.
        norm: "linf", "l2" or "l1".
        epsilon: an image that is farther away doesn't count, in [0, 1] pixel units; a number or a scalar tensor;
            math.inf: however far.
        steps: projections of each run.
        restarts: runs; all but the first start at a random point at epsilon / 2.
        targets: runs towards each of so many classes, those with the highest logits on the clean image (at most all
            other classes); 0: towards the nearest boundary of all in each step, at the price of one gradient for each
            class.
        early_stop: an image stops at its first wrong prediction within epsilon and leaves the batch: all that an
            accuracy needs, but not the nearest image.
        seed: of the random starts: an integer, or (batch, 2) integers with a pair for each image.

    Returns:
        images_adv: (batch, height, width, channels) float32; the images themselves where none was found within
            epsilon and where the clean prediction is wrong.

    Raises:
        UserError: an argument is out of its range, or the model gives something else than logits of classes
            (probabilities, say), or (eagerly) images are not in [0, 1] or a label is no class.
        InvalidArgumentError: in a tf.function, images are not in [0, 1].

    Warns:
        AttackWarning: (eagerly) the loss has no gradient at some of the images, or they look like another unit.

    Source: Croce and Hein 2020, arXiv 1907.02044, algorithm 1; targeted: arXiv 2003.01690, section 5.
    """
    check_at_least(1, steps=steps, restarts=restarts)
    check_at_least(0, targets=targets)
    anywhere = not isinstance(epsilon, tf.Tensor) and epsilon == math.inf
    check_threat_model(norm, 0.0 if anywhere else epsilon)
    if anywhere and restarts > 1:
        raise UserError(f"Random restarts start at epsilon / 2. Received: restarts={restarts}, epsilon=inf.")
    model, images, labels = checked_batch(model, images, labels, loss=LOSSES["margin"])
    clean = logits_of(model, images)
    targets = min(targets, num_classes(clean) - 1)
    geometry, project = NORMS[norm], HYPERPLANE_PROJECTIONS[norm]
    seeds = as_seeds(seed, tf.shape(images)[0])

    def step(i: tf.Tensor, state: State) -> State:
        run, position = i // steps, i % steps
        points, images, labels = state["points"], state["images"], state["labels"]
        if targets:
            target = tf.gather(state["targets"], run // restarts, axis=1)
            boundary = _boundary_of(model, points, labels, target, norm)
        else:
            boundary = _nearest_boundary(model, points, labels, norm)
        to_boundary = project(points, boundary.gradient, boundary.value[:, None, None, None])
        offset = tf.reduce_sum(boundary.gradient * (images - points), axis=(1, 2, 3)) + boundary.value
        from_image = project(images, boundary.gradient, offset[:, None, None, None])
        near, far = (tf.maximum(geometry.length(part), 1e-8) for part in (to_boundary, from_image))
        bias = tf.minimum(near / (near + far), _LARGEST_BIAS)
        moved = (1.0 - bias) * (points + _OVERSHOOT * to_boundary) + bias * (images + _OVERSHOOT * from_image)
        moved = tf.clip_by_value(moved, 0.0, 1.0)
        wrong = ~is_correct(logits_of(model, moved), labels)
        distance = geometry.length(moved - images)[:, 0, 0, 0]
        nearer = wrong & (distance < state["distance"])
        state = {
            **state,
            "images_adv": _where(nearer, moved, state["images_adv"]),
            "distance": tf.where(nearer, distance, state["distance"]),
        }
        state["fallen"] = state["fallen"] | (state["distance"] <= state["epsilon"])
        moved = _where(wrong, images + _BACKWARD * (moved - images), moved)
        state["points"] = tf.cond(position < steps - 1, lambda: moved, lambda: next_start(run + 1, state))
        return state

    def next_start(run: tf.Tensor, state: State) -> tf.Tensor:
        if restarts == 1:
            return state["images"]
        start = geometry.random_start(state["images"], epsilon / 2.0, fold_in(state["seeds"], run))
        return tf.cond(run % restarts == 0, lambda: state["images"], lambda: start)

    right = is_correct(clean, labels)
    state = {
        "images": images,
        "labels": labels,
        "seeds": seeds,
        "points": images,
        "images_adv": images,
        # Where the clean prediction is wrong, nothing is nearer than the image itself.
        "distance": tf.where(right, float("inf"), 0.0),
        "fallen": ~right,
        "epsilon": tf.fill(tf.shape(labels), tf.cast(epsilon, tf.float32)),
    }
    if targets:
        state["targets"] = likeliest_targets(clean, labels, targets)
    loop = repeat_while_resisting if early_stop else repeat
    state = in_graph(loop, step, state, steps * restarts * max(targets, 1))
    within = state["distance"] <= epsilon
    return tf.stop_gradient(_where(within, state["images_adv"], images))


def _where(condition: tf.Tensor, images: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """tf.where with a condition (batch,) for whole images."""
    return tf.where(condition[:, None, None, None], images, others)


def _boundary_of(model: Model, points: tf.Tensor, labels: tf.Tensor, other: tf.Tensor, norm: str) -> _Boundary:
    """The boundary between the label and the class `other` (batch,), linearised at the points."""

    def difference(logits: tf.Tensor) -> tf.Tensor:
        return tf.gather(logits, other, batch_dims=1) - tf.gather(logits, labels, batch_dims=1)

    slope = slope_of(model, points, difference, labels)
    steepness = DUAL_NORMS[norm](slope.gradient)[:, 0, 0, 0]
    # No constant beside the steepness: the logits may be tiny.
    distance = tf.where(steepness > 0.0, tf.math.divide_no_nan(tf.abs(slope.loss), steepness), float("inf"))
    return _Boundary(slope.loss, slope.gradient, distance)


def _nearest_boundary(model: Model, points: tf.Tensor, labels: tf.Tensor, norm: str) -> _Boundary:
    """The nearest of the boundaries to all other classes, equation (7) of 1907.02044."""
    classes = num_classes(logits_of(model, points))

    # One class after the other: all gradients at once would take the memory of `classes` batches.
    def nearer(k: tf.Tensor, nearest: _Boundary) -> tuple[tf.Tensor, _Boundary]:
        # Counted from the label on, so that each image passes all other classes.
        new = _boundary_of(model, points, labels, (labels + k) % classes, norm)
        better = new.distance < nearest.distance
        return k + 1, _Boundary(
            tf.where(better, new.value, nearest.value),
            _where(better, new.gradient, nearest.gradient),
            tf.where(better, new.distance, nearest.distance),
        )

    zeros = tf.zeros(tf.shape(points)[:1])
    start = _Boundary(zeros, tf.zeros_like(points), tf.fill(tf.shape(zeros), float("inf")))
    _, nearest = tf.while_loop(
        lambda k, _: k < classes, nearer, (tf.constant(1), start), maximum_iterations=classes - 1
    )
    return nearest
