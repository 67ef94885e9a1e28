"""The attacks by name, each in its published settings."""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

from robust_tf.attacks.apgd import apgd
from robust_tf.attacks.fab import fab
from robust_tf.attacks.fgsm import fgsm
from robust_tf.attacks.losses import Model
from robust_tf.attacks.pgd import pgd
from robust_tf.attacks.seeds import Seed
from robust_tf.attacks.square import square
from robust_tf.errors import UserError, unknown_name


class Attack(Protocol):
    """What every attack of the table is called like; see the attack's own function for the arguments."""

    def __call__(
        self,
        model: Model,
        images: tf.Tensor,
        labels: tf.Tensor,
        *,
        norm: Any,
        epsilon: float | tf.Tensor,
        seed: Seed,
    ) -> tf.Tensor: ...


def _apgd_ce(model: Model, images: tf.Tensor, labels: tf.Tensor, *, norm: Any, **arguments: Any) -> tf.Tensor:
    restarts = 5 if norm == "l1" else 1  # section 5 of 2103.01208
    return apgd(model, images, labels, norm=norm, restarts=restarts, early_stop=True, **arguments)


def _apgd_t(model: Model, images: tf.Tensor, labels: tf.Tensor, *, norm: Any, **arguments: Any) -> tf.Tensor:
    targets = 5 if norm == "l1" else 9
    return apgd(model, images, labels, norm=norm, loss="dlr", targets=targets, early_stop=True, **arguments)


_apgd = functools.partial(apgd, early_stop=True)

# They stop for an image as soon as its prediction is wrong: what an accuracy needs, not the highest loss.
ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    # MadryLab/robustness evaluates with 20 steps of 2.5 * epsilon / steps, from the images themselves.
    "pgd": functools.partial(pgd, steps=20, early_stop=True),
    "pgd-100x10": functools.partial(pgd, steps=100, restarts=10, random_start=True, early_stop=True),
    # The settings of AutoAttack (2003.01690, section 6, and 2103.01208 for l1): 100 steps, 9 target classes.
    "apgd-ce": _apgd_ce,
    "apgd-dlr": functools.partial(_apgd, loss="dlr"),
    "apgd-t": _apgd_t,
    "fab-t": functools.partial(fab, early_stop=True),
    "square": square,
    # Its versions "plus" and "rand".
    "apgd-ce-x5": functools.partial(_apgd, restarts=5),
    "apgd-dlr-x5": functools.partial(_apgd, loss="dlr", restarts=5),
    "fab-x5": functools.partial(fab, targets=0, restarts=5, early_stop=True),
    "apgd-ce-rand": functools.partial(_apgd, gradient_draws=20),
    "apgd-dlr-rand": functools.partial(_apgd, loss="dlr", gradient_draws=20),
}

# Forward passes for an image that resists to the end, a gradient counted as three, of ten classes (in L1 APGD differs):
# what the attacks take beside each other, for the remaining time that a progress bar shows.
_APGD = 3 * 101
PASSES = {
    "fgsm": 3,
    "pgd": 3 * 20,
    "pgd-100x10": 3 * 100 * 10,
    "apgd-ce": _APGD,
    "apgd-dlr": _APGD,
    "apgd-t": 9 * _APGD,
    "fab-t": 9 * 100 * (3 + 1),
    "square": 5000,
    "apgd-ce-x5": 5 * _APGD,
    "apgd-dlr-x5": 5 * _APGD,
    "fab-x5": 5 * 100 * (9 * 3 + 1),
    "apgd-ce-rand": 20 * _APGD,
    "apgd-dlr-rand": 20 * _APGD,
}

# How PGD counts here: an image has fallen when any of its iterates is wrong. The test of a training job looks at the
# iterate of highest loss alone ("highest-loss iterate"), so that on the same images its figure is never the lower one.
_TITLES = {"pgd": "PGD-20 (any wrong iterate)", "pgd-100x10": "PGD-100x10 (any wrong iterate)"}

# These have no L1 version.
_LINF_AND_L2 = {"fgsm", "pgd", "pgd-100x10"}


def title_of(names: str) -> str:
    """What an attack, or a cascade such as pgd+square, is called in tables and pictures."""
    return "+".join(_TITLES.get(name, name) for name in names.split("+"))


def check_attacks(names: Sequence[str], norm: str) -> None:
    """Refuses names that are no attack, an attack named twice, and an attack that this norm doesn't have."""
    for name in names:
        if name not in ATTACKS:
            raise unknown_name("attack", name, ATTACKS)
        if norm == "l1" and name in _LINF_AND_L2:
            raise UserError(f"The attack {name} has the norms linf and l2. Received: norm={norm!r}.")
    if len(set(names)) < len(names):
        raise UserError(f"Each attack can run once. Received: {', '.join(names)}.")
