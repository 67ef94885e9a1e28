"""FAB, the fast adaptive boundary attack: finds the nearest misclassified image (Croce and Hein 2020, 1907.02044)."""

import math
from typing import NamedTuple, cast

import tensorflow as tf

from robust_tf.attacks.checks import check_at_least, check_threat_model, checked_batch
from robust_tf.attacks.loops import State, in_graph, repeat, repeat_while_resisting, select_images, step_of_loop
from robust_tf.attacks.losses import LOSSES, Model, is_correct, likeliest_targets, logits_of, num_classes, slope_of
from robust_tf.attacks.seeds import Seed, as_seeds, fold_in
from robust_tf.attacks.threat_models import NORMS, Geometry
from robust_tf.config.names import AttackNorm
from robust_tf.errors import UserError

_LARGEST_BIAS = 0.1  # alpha_max: largest weight of the clean image's projection in a step
_OVERSHOOT = 1.05  # eta: goes a little beyond the linearized boundary, so that the real one is crossed
_BACKWARD = 0.9  # beta: moves a misclassified image back towards the clean one


class _Boundary(NamedTuple):
    """A linearized decision boundary: {z: value + <gradient, z - points> = 0}.

    Attributes:
        value: Logit of another class minus the label's logit, (batch,) float32.
        gradient: Gradient of this difference, (batch, height, width, channels) float32.
        distance: Distance of the points from the boundary, (batch,) float32.
    """

    value: tf.Tensor
    gradient: tf.Tensor
    distance: tf.Tensor


def fab(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    norm: AttackNorm,
    epsilon: float | tf.Tensor,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    early_stop: bool = False,
    seed: Seed = 0,
) -> tf.Tensor:
    """Returns minimal adversarial examples found by FAB: the nearest images that the model gets wrong.

    FAB minimizes ||images_adv - images|| over images_adv in [0, 1] with a wrong prediction. In each step it projects
    onto the linearized decision boundary. It therefore measures how far away the boundary is, while the other attacks
    only find out whether it lies within epsilon. It needs no step size, and the scale of the logits does not matter.

    The function runs eagerly and inside `tf.function`. An eager call traces a new graph each time, so wrap the call in
    a `tf.function` if there are many batches.

    Args:
        model: Callable from images to logits (batch, classes). A Keras model runs in inference mode. Normalization
            belongs inside the model.
        images: Float images (batch, height, width, channels) in [0, 1].
        labels: Integer labels, (batch,) or (batch, 1).
        norm: Norm in which the distance is measured, "linf", "l2" or "l1".
        epsilon: Largest distance that counts, in [0, 1] pixel units; a number or a scalar tensor. With `math.inf` every
            distance counts.
        steps: Number of projections in each run.
        restarts: Number of runs. The first one starts at the image, the others at random points within epsilon / 2.
        targets: Number of target classes. The attack runs towards the boundary of each of the classes with the highest
            logits on the clean image, or all other classes if there are fewer. With 0 each step goes towards the
            nearest of all boundaries, which takes one gradient for each class.
        early_stop: Whether an image stops at its first wrong prediction within epsilon and leaves the batch. This is
            enough to measure an accuracy, but does not find the nearest image.
        seed: Seed for the random starts: an integer, or (batch, 2) integers with a pair for each image.

    Returns:
        images_adv (batch, height, width, channels) float32 in [0, 1]. An image is returned unchanged if nothing was
        found within epsilon, or if its clean prediction is already wrong.

    Raises:
        UserError: An argument is out of range, or the model returns something other than logits, such as probabilities.
            In an eager call also: the images are not in [0, 1], or a label is not a class of the model.
        InvalidArgumentError: In a `tf.function`, the images are not in [0, 1].

    Warns:
        AttackWarning: In an eager call, the loss has no gradient at some of the images, or the images seem to be in
            another unit.

    Source: Croce and Hein 2020, arXiv 1907.02044, algorithm 1; with targets arXiv 2003.01690, section 5.

    Example:
        A model classifies images as bright if their mean is above 0.5. These images are 0.05 away from the boundary:

        >>> import math
        >>> import tensorflow as tf
        >>> from robust_tf.attacks import fab
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> images = tf.stack([tf.fill([8, 8, 3], 0.45), tf.fill([8, 8, 3], 0.55)])
        >>> labels = tf.constant([0, 1])
        >>> images_adv = fab(dark_or_bright, images, labels, norm="linf", epsilon=math.inf, steps=10)
        >>> tf.argmax(dark_or_bright(images_adv), axis=1).numpy().tolist()
        [1, 0]
        >>> round(float(tf.reduce_max(tf.abs(images_adv - images))), 2)
        0.05
    """
    check_at_least(1, steps=steps, restarts=restarts)
    check_at_least(0, targets=targets)
    anywhere = not isinstance(epsilon, tf.Tensor) and epsilon == math.inf
    check_threat_model(norm, 0.0 if anywhere else epsilon)
    if anywhere and restarts > 1:
        raise UserError(
            "Restarts begin at random points within epsilon / 2, so they need a finite epsilon. "
            f"Received: restarts={restarts}, epsilon=inf."
        )
    model, images, labels = checked_batch(model, images, labels, loss=LOSSES["margin"])
    clean = logits_of(model, images)
    targets = min(targets, num_classes(clean) - 1)
    geometry = NORMS[norm]
    seeds = as_seeds(seed, tf.shape(images)[0])

    def step(i: tf.Tensor, state: State) -> State:
        run, position = i // steps, i % steps
        points, images, labels = state["points"], state["images"], state["labels"]
        if targets:
            target = tf.gather(state["targets"], run // restarts, axis=1)
            boundary = _boundary_of(model, points, labels, target, geometry)
        else:
            boundary = _nearest_boundary(model, points, labels, geometry)
        to_boundary = geometry.to_hyperplane(points, boundary.gradient, boundary.value[:, None, None, None])
        offset = tf.reduce_sum(boundary.gradient * (images - points), axis=(1, 2, 3)) + boundary.value
        from_image = geometry.to_hyperplane(images, boundary.gradient, offset[:, None, None, None])
        near, far = (tf.maximum(geometry.length(part), 1e-8) for part in (to_boundary, from_image))
        bias = tf.minimum(near / (near + far), _LARGEST_BIAS)
        moved = (1.0 - bias) * (points + _OVERSHOOT * to_boundary) + bias * (images + _OVERSHOOT * from_image)
        moved = tf.clip_by_value(moved, 0.0, 1.0)
        wrong = ~is_correct(logits_of(model, moved), labels)
        distance = geometry.length(moved - images)[:, 0, 0, 0]
        nearer = wrong & (distance < state["distance"])
        state = {
            **state,
            "images_adv": select_images(nearer, moved, state["images_adv"]),
            "distance": tf.where(nearer, distance, state["distance"]),
        }
        state["fallen"] = state["fallen"] | (state["distance"] <= state["epsilon"])
        moved = select_images(wrong, images + _BACKWARD * (moved - images), moved)
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
        # If the clean prediction is wrong, nothing is nearer than the image itself.
        "distance": tf.where(right, float("inf"), 0.0),
        "fallen": ~right,
        "epsilon": tf.fill(tf.shape(labels), tf.cast(epsilon, tf.float32)),
    }
    if targets:
        state["targets"] = likeliest_targets(clean, labels, targets)
    loop = repeat_while_resisting if early_stop else repeat
    state = in_graph(loop, step, state, steps * restarts * max(targets, 1))
    within = state["distance"] <= epsilon
    return tf.stop_gradient(select_images(within, state["images_adv"], images))


def _boundary_of(model: Model, points: tf.Tensor, labels: tf.Tensor, other: tf.Tensor, geometry: Geometry) -> _Boundary:
    """Returns the boundary between the label and the class `other` (batch,), linearized at the points."""

    def difference(logits: tf.Tensor) -> tf.Tensor:
        return tf.gather(logits, other, batch_dims=1) - tf.gather(logits, labels, batch_dims=1)

    slope = slope_of(model, points, difference, labels)
    steepness = geometry.dual_length(slope.gradient)[:, 0, 0, 0]
    # No constant is added to the steepness, because the logits may be tiny.
    distance = tf.where(steepness > 0.0, tf.math.divide_no_nan(tf.abs(slope.loss), steepness), float("inf"))
    return _Boundary(slope.loss, slope.gradient, distance)


def _nearest_boundary(model: Model, points: tf.Tensor, labels: tf.Tensor, geometry: Geometry) -> _Boundary:
    """Returns the nearest of the boundaries to all other classes, equation (7) of 1907.02044."""
    classes = num_classes(logits_of(model, points))

    # One class after the other, because all gradients at once would take the memory of `classes` batches.
    @step_of_loop
    def nearer(k: tf.Tensor, nearest: _Boundary) -> tuple[tf.Tensor, _Boundary]:
        # For each image, label + k runs through all other classes.
        new = _boundary_of(model, points, labels, (labels + k) % classes, geometry)
        better = new.distance < nearest.distance
        return k + 1, _Boundary(
            tf.where(better, new.value, nearest.value),
            select_images(better, new.gradient, nearest.gradient),
            tf.where(better, new.distance, nearest.distance),
        )

    zeros = tf.zeros(tf.shape(points)[:1])
    start = _Boundary(zeros, tf.zeros_like(points), tf.fill(tf.shape(zeros), float("inf")))
    _, nearest = tf.while_loop(
        lambda k, _: k < classes, nearer, (tf.constant(1), start), maximum_iterations=classes - 1
    )
    return cast(_Boundary, nearest)
