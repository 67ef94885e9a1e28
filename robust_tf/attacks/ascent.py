"""Projected gradient ascent on any loss: the loop that PGD, adversarial training and TRADES share."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from robust_tf.attacks.loops import State, repeat, repeat_while_resisting
from robust_tf.attacks.losses import LOSSES, Loss, Model, find_loss, is_correct, margin_of, slope_of
from robust_tf.attacks.outputs import outputs_of
from robust_tf.attacks.threat_models import Geometry, Scale

# Below this margin, iterates are compared by their margins, because rounding hides how their cross-entropies differ.
_TINY_MARGIN = 1e-5


def ascend(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    start: tf.Tensor,
    *,
    geometry: Geometry,
    epsilon: Scale,
    step_size: Scale,
    steps: int,
    loss: str | Loss = "ce",
    correct_of: Callable[[Any, tf.Tensor], tf.Tensor] = is_correct,
    coupled: bool = False,
    margin_by: Callable[[Any, tf.Tensor], tf.Tensor] | None = None,
    use_best: bool = True,
    targeted: bool = False,
    early_stop: bool = False,
) -> State:
    """Runs projected gradient ascent from a given start, without any checks.

    Args:
        model: Callable from images to logits (batch, classes), or to any outputs that `loss` and `correct_of` can read.
        images: Clean images (batch, height, width, channels) float32, the center of the ball.
        labels: Labels (batch,) int32: true classes, or target classes if `targeted`.
        start: First iterate, (batch, height, width, channels) float32.
        geometry: Geometry of the norm, one of `NORMS`.
        epsilon: Radius of the ball, in [0, 1] pixel units.
        step_size: Length of each step, in the same norm and unit.
        steps: Number of gradient steps.
        loss: Name in `LOSSES`, or a function like the ones there. A function that closes over the whole batch cannot be
            used with `early_stop`.
        correct_of: Function of (logits, labels) that returns whether each prediction is correct, (batch,) bool.
        coupled: Whether the model mixes the images of a batch.
        margin_by: Function of (logits, labels) that returns the margin of each image, (batch,). If the margins of two
            iterates are so small that their losses differ only by rounding, the smaller margin is worse. By default
            this is the margin of the logits for the cross-entropy; for other losses the losses are compared.
        use_best: Whether to return each image's iterate of highest loss instead of the last one.
        targeted: Whether to lower the loss instead of raising it.
        early_stop: Whether an image stops at the first point where the prediction is wrong, or is the target if
            `targeted`.

    Returns:
        A state with the keys "images_adv", "start_loss" and "start_correct" (batch,), which are the loss and the
        correctness at the start, and "fallen" (batch,) bool, which says whether some iterate reached the goal.
        "fallen" is only meaningful with `early_stop`.
    """
    ascent = -1.0 if targeted else 1.0  # a targeted attack descends the loss of the target class
    loss_of = find_loss(loss) if isinstance(loss, str) else loss

    if margin_by is None and loss_of is LOSSES["ce"]:
        margin_by = margin_of

    def margin(logits: Any, labels: tf.Tensor) -> tf.Tensor:
        # For other losses rounding hides nothing. An infinite margin makes sure that only the losses are compared.
        return tf.fill(tf.shape(labels), float("inf")) if margin_by is None else margin_by(logits, labels)

    def is_worse(loss: tf.Tensor, margin: tf.Tensor, state: State) -> tf.Tensor:
        # In float32 the cross-entropy of tiny logits is log(classes) plus rounding, but their margins still differ.
        tiny = tf.maximum(tf.abs(margin), tf.abs(state["best_margin"])) < _TINY_MARGIN
        # Strictly higher: of two equal iterates the earlier one is kept, as in the reference.
        higher = ascent * loss > ascent * state["best_loss"]
        return tf.where(tiny, ascent * margin < ascent * state["best_margin"], higher)

    def step(i: tf.Tensor, state: State) -> State:
        points, labels = state["points"], state["labels"]
        slope = slope_of(
            model,
            points,
            lambda logits: loss_of(logits, labels, labels),
            labels,
            correct_of=correct_of,
            coupled=coupled,
        )
        first = tf.equal(i, 0)
        new = {
            **state,
            "start_loss": tf.where(first, slope.loss, state["start_loss"]),
            "start_correct": tf.where(first, slope.correct, state["start_correct"]),
        }
        if use_best:
            margin_now = margin(slope.logits, labels)
            improved = is_worse(slope.loss, margin_now, state)
            new["best"] = tf.where(improved[:, None, None, None], points, state["best"])
            new["best_loss"] = tf.where(improved, slope.loss, state["best_loss"])
            new["best_margin"] = tf.where(improved, margin_now, state["best_margin"])
        moved = points + geometry.step(ascent * slope.gradient, step_size)
        new["points"] = geometry.project(moved, state["images"], epsilon)
        if early_stop:
            reached = slope.correct if targeted else ~slope.correct
            new["fallen"] = state["fallen"] | reached
            new["points"] = tf.where(new["fallen"][:, None, None, None], points, new["points"])
            if use_best:  # the point that reached the goal counts, not an earlier one of higher loss
                new["best"] = tf.where(new["fallen"][:, None, None, None], points, new["best"])
        return new

    # Plain constants where the batch size is known: TensorFlow gives constants that it folds itself one of several
    # names, and XLA's cache would not find the program again.
    count = [tf.shape(images)[0] if images.shape[0] is None else images.shape[0]]
    zeros, no_image = tf.zeros(count), tf.zeros(count, tf.bool)
    state = {
        "images": images,
        "labels": labels,
        "points": start,
        "start_loss": zeros,
        "start_correct": no_image,
        "fallen": no_image,
    }
    if use_best:
        worst = tf.fill(tf.shape(zeros), -ascent * float("inf"))
        state |= {"best": start, "best_loss": worst, "best_margin": -worst}
    state = (repeat_while_resisting if early_stop else repeat)(step, state, steps)
    images_adv = state["points"]
    fallen = state["fallen"]
    if use_best or early_stop:
        # The last iterate is a candidate too, which takes one more forward pass.
        logits = outputs_of(model, images_adv)
        if early_stop:
            fallen |= correct_of(logits, labels) == targeted
        if use_best:
            better = is_worse(loss_of(logits, labels, labels), margin(logits, labels), state)
            # One negation, not two equal ones: TensorFlow would merge them, keep the source line of either, and XLA's
            # cache would not find the program again.
            last = (better | fallen) & ~state["fallen"]
            images_adv = tf.where(last[:, None, None, None], images_adv, state["best"])
    return {**state, "images_adv": images_adv, "fallen": fallen}
