"""AutoAttack, the standard way to compare robust accuracies (Croce and Hein 2020, arXiv 2003.01690)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from robust_tf.attacks.cascade import cascade
from robust_tf.attacks.compiled import CompiledAttacks
from robust_tf.attacks.losses import Model
from robust_tf.attacks.warning_flags import issue
from robust_tf.config.names import AttackNorm
from robust_tf.errors import UserError, unknown_name

# The attacks of each version, in the order in which they run.
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce-x5", "apgd-dlr-x5", "fab-x5", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce-rand", "apgd-dlr-rand"),
}


class AutoAttackResult(NamedTuple):
    """The result of AutoAttack.

    Attributes:
        images_adv: Adversarial images (num_images, height, width, channels) float32, in the ball and in [0, 1]. If an
            attack made the prediction wrong, this is the image with which it did so, otherwise the last attempt.
        robust: Whether the prediction is correct on the clean image and under all attacks, (num_images,) bool.
        felled_by: For each image, the name of the attack that made its prediction wrong, "clean" if the prediction for
            the clean image is wrong already, or "" if the image resists all attacks.
        warnings: Signs that the robust accuracy is an overestimate, as a sentence for each. Empty if there are none.

    Example:
        >>> import numpy as np
        >>> from robust_tf.attacks import AutoAttackResult
        >>> result = AutoAttackResult(
        ...     images_adv=np.zeros((3, 8, 8, 3), np.float32),
        ...     robust=np.array([True, False, True]),
        ...     felled_by=("", "apgd-ce", ""),
        ...     warnings={},
        ... )
        >>> print(f"robust accuracy {result.robust.mean():.1%}")
        robust accuracy 66.7%
    """

    images_adv: np.ndarray
    robust: np.ndarray
    felled_by: tuple[str, ...]
    warnings: dict[str, str]


def attacks_of_version(version: str, attacks: Sequence[str] | None = None) -> tuple[str, ...]:
    """Returns the names of the attacks that a version of AutoAttack runs, in order.

    Args:
        version: "standard", "plus", "rand" or "custom".
        attacks: Names of the attacks, for the version "custom" only.

    Raises:
        UserError: The version is unknown, "custom" comes without attacks, or another version comes with them.

    Example:
        >>> from robust_tf.attacks import attacks_of_version
        >>> attacks_of_version("standard")
        ('apgd-ce', 'apgd-t', 'fab-t', 'square')
    """
    if version == "custom":
        if not attacks:
            raise UserError("The version 'custom' needs attacks, e.g. apgd-ce and square. Received: none.")
        return tuple(attacks)
    if version not in VERSIONS:
        raise unknown_name("version of AutoAttack", version, [*VERSIONS, "custom"])
    if attacks is not None:
        raise UserError(f"Attacks can be given only for the version 'custom'. Received: version={version!r}.")
    return VERSIONS[version]


def autoattack(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: AttackNorm,
    epsilon: float,
    version: Literal["standard", "plus", "rand", "custom"] = "standard",
    attacks: Sequence[str] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    jit_compile: bool | Literal["auto"] = False,
) -> AutoAttackResult:
    """Measures the robustness of a model with AutoAttack, an ensemble of attacks without free parameters.

    The attacks run one after the other, each on the images that still resist. An image counts as robust if the model
    is correct on the clean image and under every attack. The version "standard" is what RobustBench reports.

    Args:
        model: Callable from images to logits (batch, classes). A Keras model runs in inference mode. Normalization
            belongs inside the model.
        images: Float images (num_images, height, width, channels) in [0, 1].
        labels: Integer labels, (num_images,) or (num_images, 1).
        norm: Norm of the ball, "linf", "l2" or "l1".
        epsilon: Radius of the ball, in [0, 1] pixel units.
        version: "standard" (APGD-CE, targeted APGD-DLR, targeted FAB and Square), "plus" (more restarts, and the
            untargeted attacks as well), "rand" (for random models, with averaged gradients), or "custom".
        attacks: Names in `ATTACKS`, for the version "custom" only.
        batch_size: Largest number of images in a batch. The result does not depend on it.
        seed: Seed for all random numbers.
        jit_compile: Whether XLA compiles the attacks, which makes them much faster on a GPU. "auto" uses XLA if there
            is a GPU and XLA can compile the model.

    Returns:
        The adversarial images, which images resist, which attack felled each of the others, and warnings.

    Raises:
        UserError: An argument is out of range, the model does not return finite logits of classes, or XLA cannot
            compile it although `jit_compile` is True.

    Warns:
        AttackWarning: There are signs that the robust accuracy is an overestimate. They are also in the result's
            `warnings`.

    Source: Croce and Hein 2020, arXiv 2003.01690.

    Example:
        A model tells dark from bright images by their mean. The first two images can cross its threshold of 0.5 within
        epsilon, but the third one cannot:

        >>> import numpy as np
        >>> import tensorflow as tf
        >>> from robust_tf.attacks import autoattack
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> images = np.full((3, 8, 8, 3), 0.5, np.float32)
        >>> images += np.array([-0.05, 0.05, 0.3], np.float32)[:, None, None, None]
        >>> labels = np.array([0, 1, 1])
        >>> attack = {"version": "custom", "attacks": ["fgsm"]}  # "standard" takes longer
        >>> result = autoattack(dark_or_bright, images, labels, norm="linf", epsilon=0.1, **attack)
        >>> result.felled_by
        ('fgsm', 'fgsm', '')
        >>> result.robust.tolist()
        [False, False, True]
    """
    names = attacks_of_version(version, attacks)
    images = np.asarray(images)
    states = cascade(
        CompiledAttacks(model, norm, jit_compile=jit_compile),
        images,
        labels,
        attacks=names,
        norm=norm,
        epsilon=epsilon,
        batch_size=batch_size,
        seed=seed,
        keep=range(len(images)),
        randomized=version == "rand",
    )
    for state in states:  # noqa: B007  # only the last one counts
        pass
    issue(state.warnings.values(), stacklevel=2)
    images_adv = np.stack([state.kept[number] for number in range(len(images))])
    return AutoAttackResult(images_adv, state.robust, state.felled_by, state.warnings)
