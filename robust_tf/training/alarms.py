"""Alarms: signs that adversarial training has stopped making the network robust, sought on a few held images.

* Catastrophic overfitting: the network withstands one large step (FGSM) but not several small ones (PGD). Source: Wong
  et al. 2020, arXiv 2001.03994; Andriushchenko and Flammarion 2020, arXiv 2007.02617.
* Gradient masking: an attack that sees no gradient (Square) fells what PGD does not, or input gradients are zero.
  Source: Athalye et al. 2018, arXiv 1802.00420, section 3.1.
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
from robust_tf.training.callbacks import averages_in_place

NUM_IMAGES = 64
PGD_STEPS = 10
SQUARE_QUERIES = 50

# PGD leaves less than half of what FGSM leaves, and the gap is more than what 64 images show by chance.
_OVERFITTING_GAP = 0.2
# Square with few queries is far weaker than PGD where the gradient is worth anything; this is six images of 64.
_MASKING_GAP = 0.1
_ZERO_GRADIENTS = 0.1


class Reading(NamedTuple):
    """What was found on the held images; all are shares of them.

    Attributes:
        fgsm_accuracy, pgd_accuracy, square_accuracy: right both before and after the attack.
        zero_gradients: images whose input gradient is zero in every pixel.
    """

    fgsm_accuracy: float
    pgd_accuracy: float
    square_accuracy: float
    zero_gradients: float

    @property
    def figures(self) -> dict[str, float]:
        """What is charted."""
        return {
            "fgsm_pgd_gap": self.fgsm_accuracy - self.pgd_accuracy,
            "pgd_square_gap": self.pgd_accuracy - self.square_accuracy,
            "zero_gradients": self.zero_gradients,
        }

    @property
    def alarms(self) -> list[str]:
        """What is wrong, in words; empty when nothing is."""
        found = []
        gap = self.fgsm_accuracy - self.pgd_accuracy
        if gap >= _OVERFITTING_GAP and self.pgd_accuracy <= 0.5 * self.fgsm_accuracy:
            found.append(
                f"catastrophic overfitting: accuracy is {self.fgsm_accuracy:.0%} under FGSM but "
                f"{self.pgd_accuracy:.0%} under PGD-{PGD_STEPS}. Use more --attack_steps, --random_start, or a smaller "
                "--attack_step_size"
            )
        if self.pgd_accuracy - self.square_accuracy >= _MASKING_GAP:
            found.append(
                f"gradient masking: Square, which needs no gradient, leaves {self.square_accuracy:.0%} where "
                f"PGD-{PGD_STEPS} leaves {self.pgd_accuracy:.0%}. The robust accuracy is not real"
            )
        if self.zero_gradients >= _ZERO_GRADIENTS:
            found.append(
                f"the input gradient of {self.zero_gradients:.0%} of the images is zero: the attack cannot move them. "
                "Try --precision=float32, or a lower --learning_rate"
            )
        return found


class TrainingAlarm(Exception):
    """Ends `fit` after an epoch that raised an alarm, before its state is saved."""


class Alarms(keras.callbacks.Callback):
    """Looks for alarms after an epoch, warns in the log, and adds the figures to the epoch's validation logs.

    It looks at the weights that validation has measured and that may be saved: the moving averages, if there are any.

    Args:
        classifier: the one that is trained.
        held: images (count, height, width, 3) in [0, 1] and labels (count,) that are not trained on.
        attack: of training; its norm and epsilon are those of the attacks here.
        every_epochs: epochs between two looks.
        history: gets every warning.
        agree: whether any process of the job has found an alarm, from whether this one has.
    """

    def __init__(
        self,
        classifier: keras.Model,
        *,
        held: tuple[np.ndarray, np.ndarray],
        attack: AttackConfig,
        every_epochs: int,
        history: list[str],
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        super().__init__()
        self.raised = False  # in the last epoch
        self._agree = agree
        self._held = (tf.constant(held[0], tf.float32), tf.constant(held[1], tf.int32))
        self._every_epochs, self._history = every_epochs, history
        self._read = tf.function(lambda images, labels: look(classifier, images, labels, attack))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.raised = False
        if (epoch + 1) % self._every_epochs:
            return
        with averages_in_place(self.model):
            reading = self.reading()
        if logs is not None:  # Keras hands the same dictionary to the callbacks after this one
            logs.update({f"val_{name}": value for name, value in reading.figures.items()})
        for alarm in reading.alarms:
            message = f"WARNING after epoch {epoch + 1}: {alarm}. ({len(self._held[1])} held images)"
            self._history.append(message)
            console.print(message)
        self.raised = self._agree(bool(reading.alarms))

    def reading(self) -> Reading:
        """Attacks the held images."""
        return Reading(*(float(value) for value in self._read(*self._held)))


class EndOnAlarm(keras.callbacks.Callback):
    """Raises `TrainingAlarm` after an epoch with an alarm. Stands before the callback that saves the epoch.

    Args:
        alarms: the callback that looks for them.
        save_anyway: end after the epoch is saved instead; for the very first, when there is no better one.
    """

    def __init__(self, alarms: Alarms, *, save_anyway: bool) -> None:
        super().__init__()
        self._alarms, self._save_anyway = alarms, save_anyway

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._alarms.raised and self._save_anyway and epoch == 0:
            self.model.stop_training = True
        elif self._alarms.raised:
            raise TrainingAlarm


def look(model: Model, images: tf.Tensor, labels: tf.Tensor, attack: AttackConfig) -> tuple[tf.Tensor, ...]:
    """The fields of a `Reading`, as float32 scalars; inside tf.function or not.

    Args:
        model: [0, 1] images to logits.
        images: (count, height, width, 3) float32 in [0, 1].
        labels: (count,) int32.
        attack: its norm and epsilon count.
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
