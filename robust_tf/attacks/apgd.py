"""APGD: projected gradient ascent that chooses its own step sizes (Croce and Hein 2020, arXiv 2003.01690).

The l1 version, with sparse steps and a radius that shrinks in three phases, is due to Croce and Hein 2021, arXiv
2103.01208.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
import tensorflow as tf

from robust_tf.attacks.checks import check_at_least, check_threat_model, checked_batch
from robust_tf.attacks.loops import State, in_graph, repeat, repeat_while_resisting, select_images
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
from robust_tf.attacks.threat_models import NORMS, Geometry
from robust_tf.config.names import AttackNorm

_MOMENTUM = 0.75  # weight of the new direction, alpha in algorithm 1
_MOST_RISES = 0.75  # rho: the step size is halved if at most this share of the steps raised the loss


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What happens at each evaluation of one run. Each phase has one evaluation more than it has steps.

    Attributes:
        radius: Multiple of epsilon that bounds the iterates.
        first: Whether the evaluation is the first one of its phase.
        last: Whether the evaluation is the last one of its phase.
        window: Number of steps since the previous checkpoint if the evaluation is a checkpoint, otherwise 0.
    """

    radius: np.ndarray
    first: np.ndarray
    last: np.ndarray
    window: np.ndarray

    @property
    def length(self) -> int:
        """Number of evaluations."""
        return len(self.radius)


def _schedule(norm: str, steps: int) -> _Schedule:
    if norm != "l1":
        windows = [_checkpoints(steps)]
        radii = [1.0]
    else:
        # Section 4.3 of 2103.01208: 30 % of the steps at 3 epsilon, 30 % at 2 epsilon and the rest at epsilon.
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
    """Returns the windows of section 3.2 of 2003.01690: 22 % of the steps, then 19 %, 16 % and so on, down to 6 %."""
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
    norm: AttackNorm,
    epsilon: float | tf.Tensor,
    steps: int = 100,
    restarts: int = 1,
    loss: Literal["ce", "margin", "dlr"] = "ce",
    targets: int = 0,
    gradient_draws: int = 1,
    early_stop: bool = False,
    seed: Seed = 0,
) -> tf.Tensor:
    """Returns adversarial examples found by APGD, a projected gradient ascent that needs no step size.

    APGD maximizes loss(model(images_adv), labels) over images_adv in [0, 1] with ||images_adv - images|| <= epsilon,
    like `pgd`. It adds momentum. When the loss of an image stops rising, it halves the step size and goes back to the
    best point found for this image. For l1 it changes only the pixels with the largest gradients. AutoAttack runs it
    first.

    The function runs eagerly and inside `tf.function`. An eager call traces a new graph each time, so wrap the call in
    a `tf.function` if there are many batches.

    Args:
        model: Callable from images to logits (batch, classes). A Keras model runs in inference mode. Normalization
            belongs inside the model.
        images: Float images (batch, height, width, channels) in [0, 1].
        labels: Integer labels, (batch,) or (batch, 1).
        norm: Norm of the ball, "linf", "l2" or "l1".
        epsilon: Radius of the ball, in [0, 1] pixel units; a number or a scalar tensor.
        steps: Number of gradient steps in each run.
        restarts: Number of runs from random points, for each target class if there are any.
        loss: Loss to raise: "ce" (cross-entropy), "margin" (best other logit minus the label's logit), or "dlr"
            (equation (6) of the paper, or (7) with targets).
        targets: Number of target classes. With 0 the attack raises the loss of the label. Otherwise it runs towards
            each of the classes with the highest logits on the clean image, or all other classes if there are fewer.
        gradient_draws: Number of gradients that are averaged in each step. Use more than 1 if the model is random
            (Athalye et al. 2018, arXiv 1802.00420).
        early_stop: Whether an image stops at its first wrong prediction and leaves the batch, which is enough to
            measure an accuracy.
        seed: Seed for the random starts: an integer, or (batch, 2) integers with a pair for each image.

    Returns:
        images_adv (batch, height, width, channels) float32, in the ball and in [0, 1]: the worst point found for each
        image, including the image itself. A wrong prediction is worse than a correct one, and among equals the higher
        loss is worse.

    Raises:
        UserError: An argument is out of range, or the model returns something other than logits, such as probabilities.
            In an eager call also: the images are not in [0, 1], or a label is not a class of the model.
        InvalidArgumentError: In a `tf.function`, the images are not in [0, 1].

    Warns:
        AttackWarning: In an eager call, the loss has no gradient at some of the images, or the images seem to be in
            another unit.

    Source: Croce and Hein 2020, arXiv 2003.01690, algorithm 1 and section 4; for l1 Croce and Hein 2021, arXiv
    2103.01208, algorithm 1.

    Example:
        A model classifies one image as dark and one as bright, and both change their class within epsilon:

        >>> import tensorflow as tf
        >>> from robust_tf.attacks import apgd
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> images = tf.stack([tf.fill([8, 8, 3], 0.45), tf.fill([8, 8, 3], 0.55)])
        >>> labels = tf.constant([0, 1])
        >>> images_adv = apgd(dark_or_bright, images, labels, norm="l2", epsilon=2.0, steps=10)
        >>> tf.argmax(dark_or_bright(images_adv), axis=1).numpy().tolist()
        [1, 0]
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
            # A new phase starts within its own radius, and a new run within the largest one.
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
        # The image itself is a candidate, so the result is never better for the model than no attack.
        state["worst_loss"] = loss_of(clean, labels, labels)
    if norm == "l1":
        state |= {"used": empty, "moved_pixels": empty}
    else:
        state |= {"loss": empty, "rises": empty, "checked_loss": empty, "halved": tf.zeros_like(empty, tf.bool)}
    loop = repeat_while_resisting if early_stop else repeat
    state = in_graph(loop, step, state, schedule.length * restarts * max(targets, 1))
    return tf.stop_gradient(state["images_adv"])


def _with_worst(state: State, slope: Slope, within: tf.Tensor) -> State:
    """Keeps the worst point so far, which the attack returns: a wrong prediction, and among equals the higher loss."""
    wrong, fallen = ~slope.correct, state["fallen"]
    worse = within & ((wrong & ~fallen) | ((wrong == fallen) & (slope.loss > state["worst_loss"])))
    return {
        **state,
        "images_adv": select_images(worse, state["points"], state["images_adv"]),
        "worst_loss": tf.where(worse, slope.loss, state["worst_loss"]),
        "fallen": fallen | (within & wrong),
    }


def _with_best(state: State, slope: Slope, first: tf.Tensor) -> State:
    """Keeps the iterate of highest loss in this phase. The search goes back to it when it stalls."""
    improved = first | (slope.loss > state["best_loss"])
    return {
        **state,
        "best": select_images(improved, state["points"], state["best"]),
        "best_gradient": select_images(improved, slope.gradient, state["best_gradient"]),
        "best_loss": tf.where(improved, slope.loss, state["best_loss"]),
    }


def _adapt_step_size(
    state: State, slope: Slope, first: tf.Tensor, window: tf.Tensor, radius: tf.Tensor
) -> tuple[State, tf.Tensor]:
    """Halves the step size and goes back to the best point if the search has stalled at a checkpoint (section 3.2).

    It has stalled if at most 75 % of the steps since the last checkpoint have raised the loss, or if neither the step
    size nor the highest loss has changed since then.

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
        "points": select_images(halve, state["best"], state["points"]),
    }, select_images(halve, state["best_gradient"], slope.gradient)


def _momentum_step(
    state: State, gradient: tf.Tensor, first: tf.Tensor, radius: tf.Tensor, geometry: Geometry
) -> tf.Tensor:
    """Takes 3/4 of a projected step plus 1/4 of the previous step, projected again (equation (2), algorithm 1)."""
    points, images = state["points"], state["images"]
    weight = tf.where(first, 1.0, _MOMENTUM)
    moved = points + geometry.step(gradient, state["step_size"][:, None, None, None])
    stepped = geometry.project(moved, images, radius)
    mixed = points + weight * (stepped - points) + (1.0 - weight) * (points - state["old"])
    return geometry.project(mixed, images, radius)


def _adapt_sparsity(
    state: State, slope: Slope, first: tf.Tensor, window: tf.Tensor, radius: tf.Tensor
) -> tuple[State, tf.Tensor]:
    """Adapts the step size and the number of moving pixels to the best point at a checkpoint (2103.01208, section 4.2).

    If the best perturbation has become sparser by 5 %, the search starts from it again with the full step size.
    Otherwise the step size falls by a factor of 1.5, down to a tenth. The next steps may move two thirds as many pixels
    as the best perturbation has changed.

    Returns:
        The state, and the gradient at its points.
    """
    used = tf.cast(tf.math.count_nonzero(state["best"] - state["images"], axis=(1, 2, 3)), tf.float32)
    checkpoint = window > 0
    before = tf.where(first, used, state["moved_pixels"])
    step_size = tf.where(first, radius, state["step_size"])
    sparser = checkpoint & (used < 0.95 * before)
    slower = tf.where(sparser, radius, tf.maximum(step_size / 1.5, radius / 10.0))
    return {
        **state,
        "used": tf.where(first | checkpoint, used, state["used"]),
        "moved_pixels": tf.where(checkpoint, used, before),
        "step_size": tf.where(checkpoint, slower, step_size),
        "points": select_images(sparser, state["best"], state["points"]),
    }, select_images(sparser, state["best_gradient"], slope.gradient)


def _sparse_step(
    state: State, gradient: tf.Tensor, first: tf.Tensor, radius: tf.Tensor, geometry: Geometry
) -> tf.Tensor:
    """Moves only the pixels with the largest gradients, all by the same amount."""
    del first
    size = tf.reshape(tf.abs(gradient), (tf.shape(gradient)[0], -1))
    pixels = tf.shape(size)[1]
    # Two thirds of the pixels that the best perturbation has changed. In integers, because XLA rounds a division by 1.5
    # in another way, and the position would then differ where it is a whole number.
    position = pixels - (2 * tf.cast(state["used"], tf.int32) + 2) // 3
    smallest = tf.gather(tf.sort(size, axis=1), tf.clip_by_value(position, 0, pixels - 1), batch_dims=1)
    sparse = tf.where(tf.abs(gradient) >= smallest[:, None, None, None], gradient, tf.zeros_like(gradient))
    moved = state["points"] + geometry.step(sparse, state["step_size"][:, None, None, None])
    return geometry.project(moved, state["images"], radius)
