"""The attacks by name, each with its published settings.

To add an attack, write a function with the arguments of `Attack` (`fgsm.py` is the shortest example), add it to
`ATTACKS` below, and add its name to `ATTACK_NAMES` in `robust_tf/config/names.py`. Its entry says what the cascade, the
progress bar and the warnings need to know. `robust_tf.evaluate --attack=<name>` then runs the attack. The tests in
`tests/attacks/test_cascade.py` go through this table. The properties of the function itself are tested in
`tests/attacks/test_attacks.py`.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol

import tensorflow as tf

from robust_tf.attacks.apgd import apgd
from robust_tf.attacks.fab import fab
from robust_tf.attacks.fgsm import fgsm
from robust_tf.attacks.losses import Model
from robust_tf.attacks.pgd import pgd
from robust_tf.attacks.seeds import Seed
from robust_tf.attacks.square import SQUARE_NORMS, square
from robust_tf.attacks.threat_models import NORMS, PGD_NORMS
from robust_tf.errors import UserError, unknown_name


class Attack(Protocol):
    """The arguments that every attack of the table takes; the attack's own function describes them."""

    def __call__(
        self,
        model: Model,
        images: tf.Tensor,
        labels: tf.Tensor,
        *,
        norm: Any,
        epsilon: float | tf.Tensor,
        seed: Seed,
    ) -> tf.Tensor:
        """Returns adversarial images (batch, height, width, channels) float32, in the ball and in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedAttack:
    """An attack with all its settings fixed. It is called like the attack itself.

    Attributes:
        run: Function to call.
        forward_passes: Number of forward passes for an image that resists to the end, for a model with ten classes. A
            gradient counts as three. The progress bar estimates the remaining time from it. For APGD in l1 the true
            number differs.
        loss: Loss whose gradient the attack follows, a name of `LOSSES`; None if it follows no gradient.
        norms: Names of the norms that the attack supports.
        title: Name in tables and figures; by default the attack's name.

    Example:
        >>> from robust_tf.attacks import ATTACKS
        >>> ATTACKS["apgd-t"].loss, ATTACKS["apgd-t"].norms
        ('dlr', ('linf', 'l2', 'l1'))
    """

    run: Attack
    forward_passes: int
    loss: Literal["ce", "margin", "dlr"] | None
    norms: Collection[str] = tuple(NORMS)
    title: str = ""

    def __call__(
        self,
        model: Model,
        images: tf.Tensor,
        labels: tf.Tensor,
        *,
        norm: Any,
        epsilon: float | tf.Tensor,
        seed: Seed,
        **options: Any,
    ) -> tf.Tensor:
        """Runs the attack.

        Args:
            model: Callable from images to logits (batch, classes).
            images: Float images (batch, height, width, channels) in [0, 1].
            labels: Integer labels, (batch,) or (batch, 1).
            norm: Norm of the ball, one of `norms`.
            epsilon: Radius of the ball, in [0, 1] pixel units; a number or a scalar tensor.
            seed: Seed for the random numbers: an integer, or (batch, 2) integers with a pair for each image.
            **options: Further arguments of the attack's function, which replace its published settings.

        Returns:
            Adversarial images (batch, height, width, channels) float32, in the ball and in [0, 1].
        """
        return self.run(model, images, labels, norm=norm, epsilon=epsilon, seed=seed, **options)


def _apgd_ce(model: Model, images: tf.Tensor, labels: tf.Tensor, *, norm: Any, **arguments: Any) -> tf.Tensor:
    restarts = 5 if norm == "l1" else 1  # section 5 of 2103.01208
    return apgd(model, images, labels, norm=norm, **{"restarts": restarts, "early_stop": True, **arguments})


def _apgd_t(model: Model, images: tf.Tensor, labels: tf.Tensor, *, norm: Any, **arguments: Any) -> tf.Tensor:
    targets = 5 if norm == "l1" else 9
    settings = {"loss": "dlr", "targets": targets, "early_stop": True}
    return apgd(model, images, labels, norm=norm, **{**settings, **arguments})


_apgd = functools.partial(apgd, early_stop=True)
_APGD_PASSES = 3 * 101  # 100 steps and the start

# The iterative attacks stop working on an image as soon as its prediction is wrong. This is enough to measure a robust
# accuracy, but the loss may be lower than it could be.
#
# PGD counts an image as misclassified if the prediction is wrong at any iterate, and its title says so. The final test
# of a training job looks only at the iterate of highest loss, so its robust accuracy on the same images is never lower.
ATTACKS: dict[str, NamedAttack] = {
    "fgsm": NamedAttack(run=fgsm, forward_passes=3, loss="ce", norms=PGD_NORMS),
    # MadryLab/robustness evaluates with 20 steps of 2.5 * epsilon / steps, from the images themselves.
    "pgd": NamedAttack(
        run=functools.partial(pgd, steps=20, early_stop=True),
        forward_passes=3 * 20,
        loss="ce",
        norms=PGD_NORMS,
        title="PGD-20 (any wrong iterate)",
    ),
    "pgd-100x10": NamedAttack(
        run=functools.partial(pgd, steps=100, restarts=10, random_start=True, early_stop=True),
        forward_passes=3 * 100 * 10,
        loss="ce",
        norms=PGD_NORMS,
        title="PGD-100x10 (any wrong iterate)",
    ),
    # The settings of AutoAttack (2003.01690, section 6, and 2103.01208 for l1): 100 steps, 9 target classes.
    "apgd-ce": NamedAttack(run=_apgd_ce, forward_passes=_APGD_PASSES, loss="ce"),
    "apgd-dlr": NamedAttack(run=functools.partial(_apgd, loss="dlr"), forward_passes=_APGD_PASSES, loss="dlr"),
    "apgd-t": NamedAttack(run=_apgd_t, forward_passes=9 * _APGD_PASSES, loss="dlr"),
    "fab-t": NamedAttack(run=functools.partial(fab, early_stop=True), forward_passes=9 * 100 * (3 + 1), loss="margin"),
    "square": NamedAttack(run=square, forward_passes=5000, loss=None, norms=SQUARE_NORMS),
    # More attacks of AutoAttack, for its versions "plus" and "rand".
    "apgd-ce-x5": NamedAttack(run=functools.partial(_apgd, restarts=5), forward_passes=5 * _APGD_PASSES, loss="ce"),
    "apgd-dlr-x5": NamedAttack(
        run=functools.partial(_apgd, loss="dlr", restarts=5), forward_passes=5 * _APGD_PASSES, loss="dlr"
    ),
    "fab-x5": NamedAttack(
        run=functools.partial(fab, targets=0, restarts=5, early_stop=True),
        forward_passes=5 * 100 * (9 * 3 + 1),
        loss="margin",
    ),
    "apgd-ce-rand": NamedAttack(
        run=functools.partial(_apgd, gradient_draws=20), forward_passes=20 * _APGD_PASSES, loss="ce"
    ),
    "apgd-dlr-rand": NamedAttack(
        run=functools.partial(_apgd, loss="dlr", gradient_draws=20), forward_passes=20 * _APGD_PASSES, loss="dlr"
    ),
}


def title_of(names: str) -> str:
    """Returns what an attack, or a cascade such as pgd+square, is called in tables and figures."""
    titles = {name: attack.title for name, attack in ATTACKS.items() if attack.title}
    return "+".join(titles.get(name, name) for name in names.split("+"))


def check_attacks(names: Sequence[str], norm: str) -> None:
    """Refuses unknown attacks, attacks that do not support the norm, and duplicates.

    Args:
        names: Names of attacks.
        norm: Norm that all of them have to support.

    Raises:
        UserError: A name is not in `ATTACKS` or occurs twice, or its attack does not support the norm.

    Example:
        >>> from robust_tf.attacks import check_attacks
        >>> check_attacks(["apgd-ce", "square"], "l1")
        >>> check_attacks(["pgd"], "l1")
        Traceback (most recent call last):
        robust_tf.errors.UserError: The attack pgd supports the norms linf and l2. Received: norm='l1'.
    """
    for name in names:
        if name not in ATTACKS:
            raise unknown_name("attack", name, ATTACKS)
        known = [each for each in NORMS if each in ATTACKS[name].norms]
        if norm in NORMS and norm not in known:
            raise UserError(f"The attack {name} supports the norms {' and '.join(known)}. Received: norm={norm!r}.")
    if len(set(names)) < len(names):
        raise UserError(f"Each attack can run only once. Received: {', '.join(names)}.")
