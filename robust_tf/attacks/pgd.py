"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083), equal to the reference step by step."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from robust_tf.attacks.checks import check_at_least, check_threat_model, checked_batch, training_batch
from robust_tf.attacks.loops import State, repeat, repeat_while_resisting
from robust_tf.attacks.losses import LOSSES, Loss, Model, find_loss, is_correct, logits_of, margin_of, slope_of
from robust_tf.attacks.outputs import outputs_of
from robust_tf.attacks.seeds import Seed, as_seeds, fold_in
from robust_tf.attacks.threat_models import NORMS, Norm, Scale
from robust_tf.config.attack import AttackConfig

# Margin below which iterates are compared by it: the differences of the cross-entropy are smaller than its rounding.
_TINY_MARGIN = 1e-5


class AttackResult(NamedTuple):
    """What one run of PGD gives.

    Attributes:
        images_adv: (batch, height, width, channels) float32, in the ball and in [0, 1].
        start_loss: (batch,) float32, the loss at the start of the attack (the clean images when there is no
            random start), with the network in inference mode.
        start_correct: (batch,) bool, whether the prediction there is the label.
    """

    images_adv: tf.Tensor
    start_loss: tf.Tensor
    start_correct: tf.Tensor


def run_pgd(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    attack: AttackConfig,
    targeted: bool = False,
    strength: Scale = 1.0,
    seed: tf.Tensor | None = None,
) -> AttackResult:
    """`pgd` for a checked `AttackConfig`, with the loss and the hits at the start, which cost nothing extra.

    Args:
        labels: (batch,) or (batch, 1).
        strength: factor on epsilon and on the step size; a scalar tensor may change from call to call.
        seed: (2,) int32 or int64, for the random start; None draws one from TensorFlow's global generator.

    Raises:
        UserError, InvalidArgumentError: as `training_batch`.
    """
    images, labels = training_batch(images, labels, attacked=attack.active)
    return climb(
        model,
        images,
        loss=lambda logits: LOSSES["ce"](logits, labels, labels),
        correct=lambda logits: is_correct(logits, labels),
        margin=lambda logits: margin_of(logits, labels),
        attack=attack,
        targeted=targeted,
        strength=strength,
        seed=seed,
    )


def climb(
    model: Model,
    images: tf.Tensor,
    *,
    loss: Callable[[Any], tf.Tensor],
    correct: Callable[[Any], tf.Tensor],
    attack: AttackConfig,
    targeted: bool = False,
    strength: Scale = 1.0,
    seed: tf.Tensor | None = None,
    coupled: bool = False,
    margin: Callable[[Any], tf.Tensor] | None = None,
) -> AttackResult:
    """PGD on any loss of any outputs: `run_pgd` without labels, which the two functions know.

    Args:
        model: a callable from images to outputs (a tensor, or a structure of tensors, with the batch as first axis).
        images: (batch, height, width, channels) float32 in [0, 1].
        loss: outputs -> (batch,) float32, which the attack raises (with `targeted`: lowers).
        correct: outputs -> (batch,) bool, for `start_correct`.
        attack: the threat model and the search.
        targeted: lower the loss instead of raising it.
        strength: factor on epsilon and on the step size; a scalar tensor may change from call to call.
        seed: (2,) int32 or int64, for the random start; None draws one from TensorFlow's global generator.
        coupled: the model mixes the images of a batch, as BatchNorm in training mode does.
        margin: outputs -> (batch,), what decides between two iterates whose losses are equal up to rounding.
    """
    if not attack.active:
        outputs = outputs_of(model, images)
        return AttackResult(images, loss(outputs), correct(outputs))
    start, epsilon = images, attack.epsilon * strength
    if attack.random_start:
        if seed is None:
            seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
        start = NORMS[attack.norm].random_start(images, epsilon, seed)
    state = ascend(
        model,
        images,
        tf.zeros(tf.shape(images)[:1], tf.int32),
        start,
        norm=NORMS[attack.norm],
        epsilon=epsilon,
        step_size=attack.step_size * strength,
        steps=attack.steps,
        loss=lambda outputs, labels, targets: loss(outputs),
        correct_of=lambda outputs, labels: correct(outputs),
        coupled=coupled,
        margin_by=None if margin is None else lambda outputs, labels: margin(outputs),
        use_best=attack.use_best,
        targeted=targeted,
    )
    return AttackResult(tf.stop_gradient(state["images_adv"]), state["start_loss"], state["start_correct"])


def ascend(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    start: tf.Tensor,
    *,
    norm: Norm,
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
    """Projected gradient ascent from `start`; descent towards `labels` with `targeted`.

    Args:
        images, start: (batch, height, width, channels) float32.
        labels: (batch,) int32.
        loss: a name of LOSSES, or a function like those there, of the whole batch (so not with `early_stop`).
        correct_of: (logits, labels) -> (batch,) bool, whether the prediction is right.
        coupled: the model mixes the images of a batch.
        margin_by: (logits, labels) -> (batch,), what decides between two iterates whose losses are equal up to
            rounding; by default the margin of the logits for the cross-entropy, and nothing for other losses.
        early_stop: an image stops at the first point where the prediction is wrong (targeted: is the target).

    Returns:
        images_adv, (batch,) start_loss and start_correct, and (batch,) fallen: whether an iterate reached the aim.
    """
    ascent = -1.0 if targeted else 1.0  # a targeted attack goes down the loss of the target
    loss_of = find_loss(loss) if isinstance(loss, str) else loss

    if margin_by is None and loss_of is LOSSES["ce"]:
        margin_by = margin_of

    def margin(logits: Any, labels: tf.Tensor) -> tf.Tensor:
        # Other losses tell tiny logits apart by themselves.
        return tf.fill(tf.shape(labels), float("inf")) if margin_by is None else margin_by(logits, labels)

    def is_worse(loss: tf.Tensor, margin: tf.Tensor, state: State) -> tf.Tensor:
        # The cross-entropy of tiny logits is log(classes) and rounding, in float32; their margins differ all the same.
        tiny = tf.maximum(tf.abs(margin), tf.abs(state["best_margin"])) < _TINY_MARGIN
        # Strictly: of two equal iterates the earlier one stays, as in the reference.
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
        moved = points + norm.step(ascent * slope.gradient, step_size)
        new["points"] = norm.project(moved, state["images"], epsilon)
        if early_stop:
            reached = slope.correct if targeted else ~slope.correct
            new["fallen"] = state["fallen"] | reached
            new["points"] = tf.where(new["fallen"][:, None, None, None], points, new["points"])
            if use_best:  # the point that reached the aim counts, not the one of highest loss before it
                new["best"] = tf.where(new["fallen"][:, None, None, None], points, new["best"])
        return new

    zeros = tf.zeros(tf.shape(images)[:1])
    state = {
        "images": images,
        "labels": labels,
        "points": start,
        "start_loss": zeros,
        "start_correct": tf.zeros_like(zeros, tf.bool),
        "fallen": tf.zeros_like(zeros, tf.bool),
    }
    if use_best:
        worst = tf.fill(tf.shape(zeros), -ascent * float("inf"))
        state |= {"best": start, "best_loss": worst, "best_margin": -worst}
    state = (repeat_while_resisting if early_stop else repeat)(step, state, steps)
    images_adv = state["points"]
    fallen = state["fallen"]
    if use_best or early_stop:
        # The last iterate is a candidate too: one more forward pass.
        logits = outputs_of(model, images_adv)
        if early_stop:
            fallen |= correct_of(logits, labels) == targeted
        if use_best:
            better = is_worse(loss_of(logits, labels, labels), margin(logits, labels), state)
            last = (better & ~state["fallen"]) | (fallen & ~state["fallen"])
            images_adv = tf.where(last[:, None, None, None], images_adv, state["best"])
    return {**state, "images_adv": images_adv, "fallen": fallen}


def pgd(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    norm: Literal["linf", "l2"],
    epsilon: float | tf.Tensor,
    step_size: float | tf.Tensor | None = None,
    steps: int,
    random_start: bool = False,
    restarts: int = 1,
    loss: Literal["ce", "margin", "dlr"] = "ce",
    use_best: bool = True,
    targeted: bool = False,
    early_stop: bool = False,
    seed: Seed | None = None,
) -> tf.Tensor:
    """Adversarial examples: the images in the epsilon ball that projected gradient ascent on the loss ends at.

    Solves max over images_adv of loss(model(images_adv), labels) subject to
    ||images_adv - images|| <= epsilon and images_adv in [0, 1]; with `targeted`, the minimum for target labels.
    Runs eagerly and inside tf.function (faster: wrap the call when there are many batches).

    Args:
        model: any callable from images to logits; a Keras model is run in inference mode. Normalisation belongs
            inside it.
        images: (batch, height, width, channels), float, in [0, 1].
        labels: (batch,) or (batch, 1) integers: the true classes, or the target classes with `targeted`.
        norm: "linf" or "l2".
        epsilon: radius of the ball, in [0, 1] pixel units; 0 gives the images back. A scalar tensor lets one graph
            serve many radii.
        step_size: length of each step in the same norm and unit; None is 2.5 * epsilon / steps.
        steps: number of gradient steps.
        random_start: start at a random point of the ball (linf: uniform; l2: on the sphere) instead of the images.
        restarts: further runs from random points; each image keeps its worst: one that is wrong goes before
            one that is right, then the higher loss (with `use_best` or not, the loss of what the run returned).
        loss: "ce" (cross-entropy), "margin" (best other logit minus the label's) or "dlr" (the margin in units of
            the 1st minus the 3rd logit, equation (6) of arXiv 2003.01690).
        use_best: return, for each image, the iterate of highest loss (the start included), at the price of one more
            forward pass, instead of the last one.
        targeted: lower the loss of `labels` instead of raising it.
        early_stop: an image stops at its first wrong prediction and leaves the batch: all that an accuracy needs,
            and often many times faster. Its loss may then be lower than it could be.
        seed: of the random starts: an integer, or (batch, 2) integers with a pair for each image; None draws a new
            one at each call.

    Returns:
        images_adv: (batch, height, width, channels) float32.

    Raises:
        UserError: an argument is out of its range, or the model gives something else than logits of classes
            (probabilities, say), or (eagerly) images are not in [0, 1] or a label is no class.
        InvalidArgumentError: in a tf.function, images are not in [0, 1].

    Warns:
        AttackWarning: (eagerly) the loss has no gradient at some of the images, or they look like another unit.

    Source: Madry et al. 2018, arXiv 1706.06083, section 2.1; details as in MadryLab/robustness (attacker.py).
    """
    check_threat_model(norm, epsilon, ("linf", "l2"))
    check_at_least(1, restarts=restarts)
    check_at_least(0, steps=steps)
    model, images, labels = checked_batch(model, images, labels, loss=find_loss(loss), targeted=targeted)
    if isinstance(epsilon, tf.Tensor):
        check_at_least(1, steps=steps)
    else:
        size = 2.5 * epsilon / max(steps, 1) if step_size is None else step_size
        if not AttackConfig(norm=norm, epsilon=epsilon, step_size=size, steps=steps).active:
            return images
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    geometry = NORMS[norm]

    def run(images: tf.Tensor, labels: tf.Tensor, start: tf.Tensor) -> State:
        return ascend(
            model,
            images,
            labels,
            start,
            norm=geometry,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            loss=loss,
            use_best=use_best,
            targeted=targeted,
            early_stop=early_stop,
        )

    if seed is None:
        seeds = tf.random.uniform([tf.shape(images)[0], 2], minval=1, maxval=tf.int32.max, dtype=tf.int32)
    else:
        seeds = as_seeds(seed, tf.shape(images)[0])
    if restarts == 1:
        start = geometry.random_start(images, epsilon, seeds) if random_start else images
        return tf.stop_gradient(run(images, labels, start)["images_adv"])

    def restart(r: tf.Tensor, state: State) -> State:
        images, labels = state["images"], state["labels"]
        start = geometry.random_start(images, epsilon, fold_in(state["seeds"], r))
        if not random_start:
            start = tf.where(tf.equal(r, 0), images, start)
        images_adv = run(images, labels, start)["images_adv"]
        logits = logits_of(model, images_adv)
        loss_now = (-1.0 if targeted else 1.0) * find_loss(loss)(logits, labels, labels)
        reached = is_correct(logits, labels) == targeted
        worse = ~state["fallen"] & (reached | (loss_now > state["loss"]))
        worse |= state["fallen"] & reached & (loss_now > state["loss"])
        return {
            **state,
            "images_adv": tf.where(worse[:, None, None, None], images_adv, state["images_adv"]),
            "loss": tf.where(worse, loss_now, state["loss"]),
            "fallen": state["fallen"] | reached,
        }

    state = {
        "images": images,
        "labels": labels,
        "seeds": seeds,
        "images_adv": images,
        "loss": tf.fill([tf.shape(images)[0]], -float("inf")),
        "fallen": tf.zeros([tf.shape(images)[0]], tf.bool),
    }
    loop = repeat_while_resisting if early_stop else repeat
    return tf.stop_gradient(loop(restart, state, restarts)["images_adv"])
