"""Alarms: signs that adversarial training no longer makes the network robust, measured on a few held-out images.

* Catastrophic overfitting: the network withstands one large step (FGSM) but not several small ones (PGD). Source: Wong
  et al. 2020, arXiv 2001.03994; Andriushchenko and Flammarion 2020, arXiv 2007.02617.
* Gradient masking: Square, an attack without gradients, succeeds where PGD fails, or the gradients with respect to the
  images are zero. Source: Athalye et al. 2018, arXiv 1802.00420, section 3.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks import NORMS, AttackConfig, run_pgd
from robust_tf.attacks.losses import Model, find_loss, is_correct, logits_of, slope_of
from robust_tf.attacks.square import square
from robust_tf.console import console
from robust_tf.sharing import MOST_TRAINERS, shared
from robust_tf.training.callbacks import averages_in_place

NUM_IMAGES = 64
PGD_STEPS = 10
SQUARE_QUERIES = 50

# Catastrophic overfitting: the accuracy under PGD is at most half the accuracy under FGSM, and lower by at least this
# gap, which is too large to be chance with 64 images.
_OVERFITTING_GAP = 0.2
# With useful gradients, PGD is much stronger than Square with few queries. A gap of 0.1 is about six images out of 64.
_MASKING_GAP = 0.1
_ZERO_GRADIENTS = 0.1


class Reading(NamedTuple):
    """Measurements on the held-out images. Each is a share of these images.

    Attributes:
        fgsm_accuracy: Share of images classified correctly both before and after FGSM.
        pgd_accuracy: Share of images classified correctly both before and after PGD.
        square_accuracy: Share of images classified correctly both before and after Square.
        zero_gradients: Share of images whose gradient is zero in every pixel.
    """

    fgsm_accuracy: float
    pgd_accuracy: float
    square_accuracy: float
    zero_gradients: float

    @property
    def figures(self) -> dict[str, float]:
        """The values to chart, by name."""
        return {
            "fgsm_pgd_gap": self.fgsm_accuracy - self.pgd_accuracy,
            "pgd_square_gap": self.pgd_accuracy - self.square_accuracy,
            "zero_gradients": self.zero_gradients,
        }

    @property
    def alarms(self) -> list[str]:
        """One sentence for each problem found."""
        found = []
        gap = self.fgsm_accuracy - self.pgd_accuracy
        if gap >= _OVERFITTING_GAP and self.pgd_accuracy <= 0.5 * self.fgsm_accuracy:
            found.append(
                f"catastrophic overfitting: accuracy is {self.fgsm_accuracy:.0%} under FGSM but "
                f"{self.pgd_accuracy:.0%} under PGD-{PGD_STEPS}. Increase attack_steps, set random_start, or reduce "
                "attack_step_size"
            )
        if self.pgd_accuracy - self.square_accuracy >= _MASKING_GAP:
            found.append(
                f"gradient masking: accuracy is {self.square_accuracy:.0%} under Square, an attack without gradients, "
                f"but {self.pgd_accuracy:.0%} under PGD-{PGD_STEPS}. The robust accuracy is not real"
            )
        if self.zero_gradients >= _ZERO_GRADIENTS:
            found.append(
                f"zero gradients: the attack cannot change {self.zero_gradients:.0%} of the images, because their "
                "gradients are zero. Try precision=float32, or a lower learning_rate"
            )
        return found


class TrainingAlarm(Exception):
    """Raised to end `fit` when an epoch raised an alarm, before the state after that epoch is saved."""


class Alarms(keras.callbacks.Callback):
    """Checks for alarms after an epoch, prints warnings, and adds the measurements to the epoch's validation logs.

    The check uses the same weights as the validation, which are also the weights that may be saved: the moving
    averages, if the optimizer keeps any.

    Args:
        classifier: Classifier that is being trained.
        held_out: Images (count, height, width, 3) in [0, 1] and labels (count,) that are not used for training.
        attack: Attack that is used in training. The check uses its norm and epsilon.
        every_epochs: Number of epochs from one check to the next.
        history: List to which every warning is appended.
        agree: Function that is called with True if this process has found an alarm, else False. It returns whether any
            process of the job has found one.
        share_trace: Whether later alarms of the same classifier object, which may have other weights by then, use the
            traced function again. This needs `robust_tf.sharing.sharing`.
    """

    def __init__(
        self,
        classifier: keras.Model,
        *,
        held_out: tuple[np.ndarray, np.ndarray],
        attack: AttackConfig,
        every_epochs: int,
        history: list[str],
        agree: Callable[[bool], bool] = bool,
        share_trace: bool = False,
    ) -> None:
        super().__init__()
        self.raised = False  # whether the last epoch raised an alarm
        self._agree = agree
        self._held_out = (tf.constant(held_out[0], tf.float32), tf.constant(held_out[1], tf.int32))
        self._every_epochs, self._history = every_epochs, history
        measured = tf.function(lambda images, labels: measure(classifier, images, labels, attack))
        key = ("alarms", classifier, attack)
        self._measure: Any = shared(key, lambda: measured, most=MOST_TRAINERS) if share_trace else measured

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Checks for alarms after every `every_epochs` epochs."""
        self.raised = False
        if (epoch + 1) % self._every_epochs:
            return
        with averages_in_place(self.model):
            reading = self.reading()
        if logs is not None:  # Keras passes the same dictionary to the callbacks after this one
            logs.update({f"val_{name}": value for name, value in reading.figures.items()})
        for alarm in reading.alarms:
            message = f"WARNING after epoch {epoch + 1}: {alarm}. ({len(self._held_out[1])} held-out images)"
            self._history.append(message)
            console.print(message)
        self.raised = self._agree(bool(reading.alarms))

    def reading(self) -> Reading:
        """Attacks the held-out images and returns the measurements."""
        return Reading(*(float(value) for value in self._measure(*self._held_out)))


class EndOnAlarm(keras.callbacks.Callback):
    """Raises `TrainingAlarm` after an epoch with an alarm. Place it before the callback that saves the epoch.

    Args:
        alarms: Callback that checks for alarms.
        save_anyway: Whether to save the very first epoch even if it raised an alarm, since there is no earlier state.
    """

    def __init__(self, alarms: Alarms, *, save_anyway: bool) -> None:
        super().__init__()
        self._alarms, self._save_anyway = alarms, save_anyway

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Ends `fit` if the epoch raised an alarm."""
        if self._alarms.raised and self._save_anyway and epoch == 0:
            self.model.stop_training = True
        elif self._alarms.raised:
            raise TrainingAlarm


def measure(model: Model, images: tf.Tensor, labels: tf.Tensor, attack: AttackConfig) -> tuple[tf.Tensor, ...]:
    """Attacks the images with FGSM, PGD and Square. Works eagerly and inside a tf.function.

    Args:
        model: Callable that maps images in [0, 1] to logits.
        images: Images (count, height, width, 3), float32 in [0, 1].
        labels: Labels (count,), int32.
        attack: Attack whose norm and epsilon are used.

    Returns:
        The fields of a `Reading` as float32 scalars.
    """
    epsilon = attack.epsilon
    pgd = AttackConfig(norm=attack.norm, epsilon=epsilon, step_size=2.5 * epsilon / PGD_STEPS, steps=PGD_STEPS)
    correct = is_correct(logits_of(model, images), labels)

    def accuracy(images_adv: tf.Tensor) -> tf.Tensor:
        right = correct & is_correct(logits_of(model, images_adv), labels)
        return tf.reduce_mean(tf.cast(right, tf.float32))

    loss = find_loss("ce")
    gradient = slope_of(model, images, lambda logits: loss(logits, labels, labels), labels).gradient
    zero = tf.reduce_all(gradient == 0, axis=(1, 2, 3))
    geometry = NORMS[attack.norm]
    by_fgsm = geometry.project(images + geometry.step(gradient, epsilon), images, epsilon)
    by_square = square(model, images, labels, norm=attack.norm, epsilon=epsilon, queries=SQUARE_QUERIES, seed=0)
    return (
        accuracy(by_fgsm),
        accuracy(run_pgd(model, images, labels, attack=pgd).images_adv),
        accuracy(by_square),
        tf.reduce_mean(tf.cast(zero, tf.float32)),
    )
