"""APGD: projected gradient ascent that chooses its own step sizes (Croce and Hein 2020, arXiv 2003.01690).

The L1 version, with sparse steps and a radius that shrinks in three phases: Croce and Hein 2021, arXiv 2103.01208.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
import tensorflow as tf

from robust_tf.attacks.checks import check_at_least, check_threat_model, checked_batch
from robust_tf.attacks.loops import State, in_graph, repeat, repeat_while_resisting
from robust_tf.attacks.losses import (
    Model,
    Slope,
    find_loss,
    is_correct,
    likeliest_targets,
    logits_of,
    mean_slope,
    num_classes,
)
from robust_tf.attacks.seeds import Seed, as_seeds, fold_in
from robust_tf.attacks.threat_models import NORMS, Norm

_MOMENTUM = 0.75  # weight of the new direction; alpha of algorithm 1
_MOST_RISES = 0.75  # rho: a step size that raised the loss in fewer of the steps is halved


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What happens at each of the evaluations of one run: one more than it has steps, in each phase.

    Attributes:
        radius: multiple of epsilon that the iterates keep to.
        first, last: of its phase.
        window: at a checkpoint the number of steps since the one before, else 0.
    """

    radius: np.ndarray
    first: np.ndarray
    last: np.ndarray
    window: np.ndarray

    @property
    def length(self) -> int:
        return len(self.radius)


def _schedule(norm: str, steps: int) -> _Schedule:
    if norm != "l1":
        windows = [_checkpoints(steps)]
        radii = [1.0]
    else:
        # Section 4.3 of 2103.01208: 30 % of the steps at 3 epsilon, 30 % at 2 epsilon, the rest at epsilon.
        opening = min(math.ceil(0.3 * steps), (steps - 1) // 2)
        lengths = [opening, opening, steps - 2 * opening]
        windows = [_every(length, max(int(0.04 * length), 1)) for length in lengths]
        radii = [3.0, 2.0, 1.0]
    lengths = [len(window) for window in windows]
    return _Schedule(
        radius=np.repeat(np.array(radii, np.float32), lengths),
        first=np.concatenate([np.arange(length) == 0 for length in lengths]),
        last=np.concatenate([np.arange(length) == length - 1 for length in lengths]),
        window=np.concatenate(windows).astype(np.int32),
    )


def _checkpoints(steps: int) -> np.ndarray:
    """Section 3.2 of 2003.01690: the first after 22 % of the steps, each next window 3 % shorter, down to 6 %."""
    window, shortest, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    windows = np.zeros(steps + 1, int)
    position = window
    while position <= steps:
        windows[position] = window
        window = max(window - shorter, shortest)
        position += window
    return windows


def _every(steps: int, window: int) -> np.ndarray:
    position = np.arange(steps + 1)
    return np.where((position > 0) & (position % window == 0), window, 0)


def apgd(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    norm: Literal["linf", "l2", "l1"],
    epsilon: float | tf.Tensor,
    steps: int = 100,
    restarts: int = 1,
    loss: Literal["ce", "margin", "dlr"] = "ce",
    targets: int = 0,
    gradient_draws: int = 1,
    early_stop: bool = False,
    seed: Seed = 0,
) -> tf.Tensor:
    """Adversarial examples by gradient ascent with momentum and a step size that is halved where it doesn't help.

    Runs eagerly (traced anew at each call) and inside tf.function (wrap the call when there are many batches).

    Args:
        model: any callable from images to logits; a Keras model is run in inference mode. Normalisation belongs
            inside it.
        images: (batch, height, width, channels), float, in [0, 1].
        labels: (batch,) or (batch, 1) integers.
        norm: "linf", "l2" or "l1".
        epsilon: radius of the ball, in [0, 1] pixel units; a number or a scalar tensor.
        steps: gradient steps of each run.
        restarts: runs from random points (for each target class).
        loss: "ce", "margin", or "dlr" (equation (6), with targets (7)).
        targets: 0 raises the loss of the label; a number runs once towards each of so many classes, those with the
            highest logits on the clean image (at most all other classes).
        gradient_draws: gradients averaged in each step: more than 1 for a model that is random (Athalye et al.
            2018, arXiv 1802.00420).
        early_stop: an image stops at its first wrong prediction and leaves the batch: all that an accuracy needs.
        seed: of the random starts: an integer, or (batch, 2) integers with a pair for each image.

    Returns:
        images_adv: (batch, height, width, channels) float32, in the ball and in [0, 1]: for each image the worst point
            met, the image itself included. A wrong prediction is worse than a right one, then the higher loss counts.

    Raises:
        UserError: an argument is out of its range, or the model gives something else than logits of classes
            (probabilities, say), or (eagerly) images are not in [0, 1] or a label is no class.
        InvalidArgumentError: in a tf.function, images are not in [0, 1].

    Warns:
        AttackWarning: (eagerly) the loss has no gradient at some of the images, or they look like another unit.

    Source: Croce and Hein 2020, arXiv 2003.01690, algorithm 1 and section 4; L1: 2021, arXiv 2103.01208, algorithm 1.
    """
    check_threat_model(norm, epsilon)
    check_at_least(1, steps=steps, restarts=restarts, gradient_draws=gradient_draws)
    check_at_least(0, targets=targets)
    loss_of = find_loss(loss, targeted=targets > 0)
    model, images, labels = checked_batch(model, images, labels, loss=loss_of)
    clean = logits_of(model, images)
    targets = min(targets, num_classes(clean) - 1)
    geometry, schedule = NORMS[norm], _schedule(norm, steps)
    adapt, move = (_adapt_sparsity, _sparse_step) if norm == "l1" else (_adapt_step_size, _momentum_step)
    seeds = as_seeds(seed, tf.shape(images)[0])

    def start_of(run: tf.Tensor, state: State) -> tf.Tensor:
        radius = float(schedule.radius[0]) * epsilon
        return geometry.random_start(state["images"], radius, fold_in(state["seeds"], run))

    def step(i: tf.Tensor, state: State) -> State:
        run, position = i // schedule.length, i % schedule.length
        radius = tf.gather(schedule.radius, position) * epsilon
        first, last = tf.gather(schedule.first, position), tf.gather(schedule.last, position)
        window = tf.gather(schedule.window, position)
        labels = state["labels"]
        target = tf.gather(state["targets"], run // restarts, axis=1) if targets else labels
        slope = mean_slope(
            model, state["points"], lambda logits: loss_of(logits, labels, target), labels, draws=gradient_draws
        )
        state = _with_worst(state, slope, within=tf.gather(schedule.radius, position) == 1.0)
        state = _with_best(state, slope, first)
        state, gradient = adapt(state, slope, first, window, radius)
        moved = move(state, gradient, first, radius, geometry)

        def next_phase() -> tf.Tensor:
            if norm != "l1":
                return start_of(run + 1, state)
            # The next radius is the next evaluation's; a new run starts at its widest.
            next_radius = tf.gather(schedule.radius, (position + 1) % schedule.length) * epsilon
            shrunk = geometry.project(state["best"], state["images"], next_radius)
            return tf.cond(position + 1 < schedule.length, lambda: shrunk, lambda: start_of(run + 1, state))

        return {**state, "old": state["points"], "points": tf.cond(last, next_phase, lambda: moved)}

    empty = tf.zeros(tf.shape(images)[:1])
    state = {
        "images": images,
        "labels": labels,
        "seeds": seeds,
        "images_adv": images,
        "worst_loss": tf.fill(tf.shape(empty), -float("inf")),
        "fallen": ~is_correct(clean, labels),
        "old": images,
        "best": images,
        "best_gradient": images,
        "best_loss": empty,
        "step_size": empty,
    }
    state["points"] = start_of(tf.constant(0), state)
    if targets:
        state["targets"] = likeliest_targets(clean, labels, targets)
    else:
        # The image itself is a candidate: the result is never better for the model than no attack.
        state["worst_loss"] = loss_of(clean, labels, labels)
    if norm == "l1":
        state |= {"share": empty, "moved_pixels": empty}
    else:
        state |= {"loss": empty, "rises": empty, "checked_loss": empty, "halved": tf.zeros_like(empty, tf.bool)}
    loop = repeat_while_resisting if early_stop else repeat
    state = in_graph(loop, step, state, schedule.length * restarts * max(targets, 1))
    return tf.stop_gradient(state["images_adv"])


def _where(condition: tf.Tensor, images: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """tf.where with a condition (batch,) for whole images."""
    return tf.where(condition[:, None, None, None], images, others)


def _with_worst(state: State, slope: Slope, within: tf.Tensor) -> State:
    """Keeps what the attack will return: a wrong prediction goes before a right one, then the higher loss."""
    wrong, fallen = ~slope.correct, state["fallen"]
    worse = within & ((wrong & ~fallen) | ((wrong == fallen) & (slope.loss > state["worst_loss"])))
    return {
        **state,
        "images_adv": _where(worse, state["points"], state["images_adv"]),
        "worst_loss": tf.where(worse, slope.loss, state["worst_loss"]),
        "fallen": fallen | (within & wrong),
    }


def _with_best(state: State, slope: Slope, first: tf.Tensor) -> State:
    """Keeps the iterate of highest loss of this phase, which the search goes back to."""
    improved = first | (slope.loss > state["best_loss"])
    return {
        **state,
        "best": _where(improved, state["points"], state["best"]),
        "best_gradient": _where(improved, slope.gradient, state["best_gradient"]),
        "best_loss": tf.where(improved, slope.loss, state["best_loss"]),
    }


def _adapt_step_size(
    state: State, slope: Slope, first: tf.Tensor, window: tf.Tensor, radius: tf.Tensor
) -> tuple[State, tf.Tensor]:
    """Section 3.2: at a checkpoint, halves the step size and goes back to the best point where it got no further.

    That is, where fewer than 75 % of the steps since the last checkpoint have raised the loss, or where neither the
    step size nor the highest loss has changed since.

    Returns:
        The state, and the gradient at its points.
    """
    rises = tf.where(first, 0.0, state["rises"] + tf.cast(slope.loss > state["loss"], tf.float32))
    checked_loss = tf.where(first, state["best_loss"], state["checked_loss"])
    halved_before = first | state["halved"]
    step_size = tf.where(first, 2.0 * radius, state["step_size"])
    checkpoint = window > 0
    stuck = (rises <= _MOST_RISES * tf.cast(window, tf.float32)) | (
        ~halved_before & (checked_loss >= state["best_loss"])
    )
    halve = checkpoint & stuck
    return {
        **state,
        "loss": slope.loss,
        "rises": tf.where(checkpoint, 0.0, rises),
        "checked_loss": tf.where(checkpoint, state["best_loss"], checked_loss),
        "halved": tf.where(checkpoint, stuck, halved_before),
        "step_size": tf.where(halve, step_size / 2.0, step_size),
        "points": _where(halve, state["best"], state["points"]),
    }, _where(halve, state["best_gradient"], slope.gradient)


def _momentum_step(state: State, gradient: tf.Tensor, first: tf.Tensor, radius: tf.Tensor, norm: Norm) -> tf.Tensor:
    """Equation (2) of algorithm 1: a projected step, then 3/4 of it and 1/4 of the step before, projected again."""
    points, images = state["points"], state["images"]
    weight = tf.where(first, 1.0, _MOMENTUM)
    stepped = norm.project(points + norm.step(gradient, state["step_size"][:, None, None, None]), images, radius)
    mixed = points + weight * (stepped - points) + (1.0 - weight) * (points - state["old"])
    return norm.project(mixed, images, radius)


def _adapt_sparsity(
    state: State, slope: Slope, first: tf.Tensor, window: tf.Tensor, radius: tf.Tensor
) -> tuple[State, tf.Tensor]:
    """Section 4.2 of 2103.01208: at a checkpoint, the pixels that move and the step size follow the best point.

    Where the best perturbation has become sparser by 5 %, the search starts from it again with the full step size;
    elsewhere the step size falls by a factor of 1.5, down to a tenth. The share of pixels that the next steps may
    move is two thirds of those in which the best perturbation isn't 0.
    """
    pixels = tf.cast(tf.reduce_prod(tf.shape(slope.gradient)[1:]), tf.float32)
    used = tf.cast(tf.math.count_nonzero(state["best"] - state["images"], axis=(1, 2, 3)), tf.float32)
    checkpoint = window > 0
    before = tf.where(first, used, state["moved_pixels"])
    step_size = tf.where(first, radius, state["step_size"])
    sparser = checkpoint & (used < 0.95 * before)
    slower = tf.where(sparser, radius, tf.maximum(step_size / 1.5, radius / 10.0))
    return {
        **state,
        "share": tf.where(first | checkpoint, used / pixels / 1.5, state["share"]),
        "moved_pixels": tf.where(checkpoint, used, before),
        "step_size": tf.where(checkpoint, slower, step_size),
        "points": _where(sparser, state["best"], state["points"]),
    }, _where(sparser, state["best_gradient"], slope.gradient)


def _sparse_step(state: State, gradient: tf.Tensor, first: tf.Tensor, radius: tf.Tensor, norm: Norm) -> tf.Tensor:
    """A step of the pixels with the largest gradients only, all by the same amount."""
    del first
    size = tf.reshape(tf.abs(gradient), (tf.shape(gradient)[0], -1))
    pixels = tf.shape(size)[1]
    position = tf.cast((1.0 - state["share"]) * tf.cast(pixels, tf.float32), tf.int32)
    smallest = tf.gather(tf.sort(size, axis=1), tf.clip_by_value(position, 0, pixels - 1), batch_dims=1)
    sparse = tf.where(tf.abs(gradient) >= smallest[:, None, None, None], gradient, 0.0)
    moved = state["points"] + norm.step(sparse, state["step_size"][:, None, None, None])
    return norm.project(moved, state["images"], radius)
