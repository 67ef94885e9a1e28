"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083), following MadryLab/robustness step by step."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from robust_tf.attacks.ascent import ascend
from robust_tf.attacks.checks import check_at_least, check_threat_model, checked_batch, training_batch
from robust_tf.attacks.loops import State, repeat, repeat_while_resisting
from robust_tf.attacks.losses import LOSSES, Model, find_loss, is_correct, logits_of, margin_of
from robust_tf.attacks.outputs import outputs_of
from robust_tf.attacks.seeds import Seed, as_seeds, fold_in
from robust_tf.attacks.threat_models import NORMS, PGD_NORMS, Scale
from robust_tf.config.attack import AttackConfig, Norm


class AttackResult(NamedTuple):
    """The result of one run of PGD.

    Attributes:
        images_adv: Adversarial images (batch, height, width, channels) float32, in the ball and in [0, 1].
        start_loss: Loss at the start of the attack, (batch,) float32. Without a random start this is the loss of the
            clean images.
        start_correct: Whether the prediction at the start is the label, (batch,) bool.

    Example:
        >>> import tensorflow as tf
        >>> from robust_tf.attacks import AttackConfig, AttackResult, run_pgd
        >>> attack = AttackConfig(norm="linf", epsilon=0.1, step_size=0.05, steps=2)
        >>> images, labels = tf.fill([1, 4, 4, 1], 0.45), tf.constant([0])
        >>> result = run_pgd(lambda images: images[:, 0, 0] * [-1.0, 1.0], images, labels, attack=attack)
        >>> isinstance(result, AttackResult), result.start_loss.shape
        (True, TensorShape([1]))
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
    """Runs the PGD attack that an `AttackConfig` describes, as adversarial training does in each step.

    Unlike `pgd`, it also returns the loss and the correctness at the start, which cost nothing extra. It does not check
    whether the outputs of the model are logits.

    Args:
        model: Callable from images to logits (batch, classes). A Keras model runs in inference mode. Normalization
            belongs inside the model.
        images: Float images (batch, height, width, channels) in [0, 1].
        labels: Integer labels, (batch,) or (batch, 1): true classes, or target classes if `targeted`.
        attack: Norm, radius, step size and number of steps. If it is not active, the images are returned unchanged.
        targeted: Whether to lower the loss of the labels instead of raising it.
        strength: Factor for epsilon and the step size. A scalar tensor may change from call to call.
        seed: Seed for the random start, (2,) int32 or int64; None draws one from TensorFlow's global generator.

    Returns:
        The adversarial images, and the loss and the correctness at the start.

    Raises:
        UserError: The images are integers or not (batch, height, width, channels), or the labels are not (batch,) or
            (batch, 1). In an eager call also: the images are not in [0, 1].
        InvalidArgumentError: In a `tf.function`, the images are not in [0, 1].

    Source: Madry et al. 2018, arXiv 1706.06083, section 2.1.

    Example:
        >>> import tensorflow as tf
        >>> from robust_tf.attacks import AttackConfig, run_pgd
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> attack = AttackConfig(norm="l2", epsilon=0.5, step_size=0.2, steps=5)
        >>> result = run_pgd(dark_or_bright, tf.fill([2, 8, 8, 3], 0.45), tf.constant([0, 0]), attack=attack)
        >>> result.images_adv.shape
        TensorShape([2, 8, 8, 3])
        >>> result.start_correct.numpy().tolist()
        [True, True]
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
    """Runs PGD on any loss of any outputs.

    Unlike `run_pgd`, it takes no labels; the functions `loss` and `correct` hold whatever they need. With it you can
    attack a model with several outputs, a regression, or a loss that is not in this package.

    Args:
        model: Callable from images to outputs: a tensor, or a structure of tensors, whose first axis is the batch.
        images: Images (batch, height, width, channels) float32 in [0, 1].
        loss: Function of the outputs that returns the loss of each image, (batch,) float32. The attack raises it.
        correct: Function of the outputs that returns whether each prediction is correct, (batch,) bool.
        attack: Norm, radius, step size and number of steps. If it is not active, the images are returned unchanged.
        targeted: Whether to lower the loss instead of raising it.
        strength: Factor for epsilon and the step size. A scalar tensor may change from call to call.
        seed: Seed for the random start, (2,) int32 or int64; None draws one from TensorFlow's global generator.
        coupled: Whether the model mixes the images of a batch, as BatchNorm in training mode does.
        margin: Function of the outputs that returns the margin of each image, (batch,). If the margins of two iterates
            are so small that their losses differ only by rounding, the smaller margin is worse. With None the losses
            are always compared.

    Returns:
        The adversarial images, and the loss and the correctness at the start.

    Source: Madry et al. 2018, arXiv 1706.06083, section 2.1.

    Example:
        An attack on a regression, which pushes the estimated brightness away from its true value:

        >>> import tensorflow as tf
        >>> from robust_tf.attacks import AttackConfig, climb
        >>> result = climb(
        ...     lambda images: tf.reduce_mean(images, axis=(1, 2, 3)),
        ...     tf.fill([2, 8, 8, 3], 0.45),
        ...     loss=lambda brightness: tf.abs(brightness - 0.4),
        ...     correct=lambda brightness: tf.abs(brightness - 0.4) < 0.1,
        ...     attack=AttackConfig(norm="linf", epsilon=0.1, step_size=0.05, steps=3),
        ... )
        >>> round(float(result.images_adv[0, 0, 0, 0]), 3)
        0.55
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
        geometry=NORMS[attack.norm],
        epsilon=epsilon,
        step_size=attack.step_size * strength,
        steps=attack.steps,
        loss=lambda outputs, *_: loss(outputs),
        correct_of=lambda outputs, _: correct(outputs),
        coupled=coupled,
        margin_by=None if margin is None else lambda outputs, _: margin(outputs),
        use_best=attack.use_best,
        targeted=targeted,
    )
    return AttackResult(tf.stop_gradient(state["images_adv"]), state["start_loss"], state["start_correct"])


def pgd(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    norm: Norm,
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
    """Returns adversarial examples that projected gradient descent (PGD) finds in the ball around the images.

    PGD maximizes loss(model(images_adv), labels) over images_adv in [0, 1] with ||images_adv - images|| <= epsilon. It
    repeats a gradient step and a projection back into the ball. With `targeted` it minimizes the loss of target labels.

    The function runs eagerly and inside `tf.function`, which is faster if there are many batches.

    Args:
        model: Callable from images to logits (batch, classes). A Keras model runs in inference mode. Normalization
            belongs inside the model.
        images: Float images (batch, height, width, channels) in [0, 1].
        labels: Integer labels, (batch,) or (batch, 1): true classes, or target classes if `targeted`.
        norm: Norm of the ball, "linf" or "l2".
        epsilon: Radius of the ball, in [0, 1] pixel units. With 0 the images are returned unchanged. With a scalar
            tensor one graph serves many radii.
        step_size: Length of each step, in the same norm and unit. None means 2.5 * epsilon / steps.
        steps: Number of gradient steps.
        random_start: Whether to start at a random point of the ball (uniform for linf, on the sphere for l2) instead of
            at the images.
        restarts: Number of runs. All runs except the first start at random points, and each image keeps its worst
            result: a wrong prediction is worse than a correct one, and among equals the higher loss is worse.
        loss: Loss to raise: "ce" (cross-entropy), "margin" (best other logit minus the label's logit) or "dlr" (margin
            divided by the difference between the highest and third highest logit; equation (6) of arXiv 2003.01690).
        use_best: Whether to return each image's iterate of highest loss, including the start, instead of the last
            iterate. This takes one more forward pass.
        targeted: Whether to lower the loss of `labels` instead of raising it.
        early_stop: Whether an image stops at its first wrong prediction and leaves the batch. This is often many times
            faster, and enough to measure an accuracy, but the loss may be lower than it could be.
        seed: Seed for the random starts: an integer, or (batch, 2) integers with a pair for each image. None draws a
            new seed at each call.

    Returns:
        images_adv (batch, height, width, channels) float32, in the ball and in [0, 1].

    Raises:
        UserError: An argument is out of range, or the model returns something other than logits, such as probabilities.
            In an eager call also: the images are not in [0, 1], or a label is not a class of the model.
        InvalidArgumentError: In a `tf.function`, the images are not in [0, 1].

    Warns:
        AttackWarning: In an eager call, the loss has no gradient at some of the images, or the images seem to be in
            another unit.

    Source: Madry et al. 2018, arXiv 1706.06083, section 2.1; details follow MadryLab/robustness (attacker.py).

    Example:
        A model classifies one image as dark and one as bright, and both change their class within epsilon:

        >>> import tensorflow as tf
        >>> from robust_tf.attacks import pgd
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> images = tf.stack([tf.fill([8, 8, 3], 0.45), tf.fill([8, 8, 3], 0.55)])
        >>> labels = tf.constant([0, 1])
        >>> images_adv = pgd(dark_or_bright, images, labels, norm="linf", epsilon=0.1, steps=10)
        >>> tf.argmax(dark_or_bright(images_adv), axis=1).numpy().tolist()
        [1, 0]
        >>> round(float(tf.reduce_max(tf.abs(images_adv - images))), 3)
        0.1
    """
    check_threat_model(norm, epsilon, PGD_NORMS)
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
            geometry=geometry,
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
            start = tf.where(tf.reshape(tf.equal(r, 0), [1, 1, 1, 1]), images, start)
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
