"""AutoAttack, the cascade that robust accuracies are compared by (Croce and Hein 2020, arXiv 2003.01690)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from robust_tf.attacks.cascade import cascade
from robust_tf.attacks.losses import Model
from robust_tf.attacks.warning_flags import issue
from robust_tf.errors import UserError, unknown_name

# version -> its attacks, in their order
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce-x5", "apgd-dlr-x5", "fab-x5", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce-rand", "apgd-dlr-rand"),
}


class AutoAttackResult(NamedTuple):
    """What AutoAttack leaves behind.

    Attributes:
        images_adv: (num_images, height, width, channels) float32, the image that felled it where one did, else the
            last attempt; in the ball and in [0, 1].
        robust: (num_images,) bool, right on the clean image and under all attacks.
        felled_by: for each image "clean", the name of the attack that felled it, or "" if it resists.
        warnings: flag -> sentence: signs that the figure is too good; empty when there are none.
    """

    images_adv: np.ndarray
    robust: np.ndarray
    felled_by: tuple[str, ...]
    warnings: dict[str, str]


def attacks_of(version: str, attacks: Sequence[str] | None = None) -> tuple[str, ...]:
    """The attacks of a version of AutoAttack; those given for "custom"."""
    if version == "custom":
        if not attacks:
            raise UserError("The version 'custom' needs attacks, e.g. apgd-ce,square. Received: none.")
        return tuple(attacks)
    if version not in VERSIONS:
        raise unknown_name("version of AutoAttack", version, [*VERSIONS, "custom"])
    if attacks is not None:
        raise UserError(f"Attacks are given with the version 'custom' only. Received: version={version!r}.")
    return VERSIONS[version]


def autoattack(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: Literal["linf", "l2", "l1"],
    epsilon: float,
    version: Literal["standard", "plus", "rand", "custom"] = "standard",
    attacks: Sequence[str] | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> AutoAttackResult:
    """Robust accuracy by the worst of several attacks, each run on the images that still resist.

    Args:
        model: any callable from [0, 1] images to logits.
        images: (num_images, height, width, channels), float, in [0, 1].
        labels: (num_images,) or (num_images, 1) integers.
        norm: "linf", "l2" or "l1".
        epsilon: radius, in [0, 1] pixel units.
        version: "standard" (APGD-CE, targeted APGD-DLR, targeted FAB, Square), "plus" (more restarts, and the
            untargeted variants), "rand" (for random models: averaged gradients), or "custom" with `attacks`.
        attacks: names of `ATTACKS`, for "custom".
        batch_size: most images at once.
        seed: of all random numbers; the result doesn't depend on the batch size.

    Returns:
        The adversarial images, what resists, what felled the rest, and warnings. The latter are also issued as Python
        warnings of the class `AttackWarning`.

    Raises:
        UserError: an argument is out of its range, or the model gives NaN or no logits of classes.

    Source: Croce and Hein 2020, arXiv 2003.01690.
    """
    names = attacks_of(version, attacks)
    images = np.asarray(images)
    states = cascade(
        model,
        images,
        labels,
        attacks=names,
        norm=norm,
        epsilon=epsilon,
        batch_size=batch_size,
        seed=seed,
        keep=range(len(images)),
        randomised=version == "rand",
    )
    for state in states:  # noqa: B007  # the last one is what counts
        pass
    issue(state.warnings.values(), stacklevel=2)
    images_adv = np.stack([state.kept[number] for number in range(len(images))])
    return AutoAttackResult(images_adv, state.robust, state.felled_by, state.warnings)
