"""Madry's adversarial training: the compiled loss on adversarial images.

Source: Madry et al. 2018, arXiv 1706.06083.
"""

from typing import Any

import tensorflow as tf

from robust_tf.attacks import climb
from robust_tf.config.attack import AttackMode
from robust_tf.training.objectives.base import Batch, Objective, Trainer


class AdversarialLoss(Objective):
    """The compiled loss on adversarial images, which PGD finds by maximizing the same loss.

    Args:
        attack_mode: Mode of the network during the attack, see `Recipe`. In training mode every forward pass of the
            attack updates BatchNorm's statistics, as in the code of Wong et al. 2020.
        attack_passes: Number of forward passes of the attack.
        random_start: Whether the attack starts at random points.
    """

    def __init__(self, *, attack_mode: AttackMode, attack_passes: int, random_start: bool) -> None:
        self._training = attack_mode == "training"
        self.inputs_train = self._training
        self.input_passes = attack_passes if self._training else 0
        # Without a random start the first forward pass of the attack is on the clean images. In training mode it
        # does not provide the clean metrics, which are defined for inference mode.
        self.knows_clean_figures = not (self._training or random_start)

    def inputs(self, trainer: Trainer, batch: Batch) -> tf.Tensor:
        """Returns the adversarial images."""
        result = climb(
            lambda images: batch.network(images, self._training),
            batch.images,
            loss=lambda outputs: trainer.compiled_loss(batch.labels, outputs),
            correct=lambda outputs: trainer.compiled_loss.hits(batch.labels, outputs),
            attack=trainer.attack,
            strength=trainer.strength(),
            seed=batch.seed,
            coupled=self._training,
        )
        if self.knows_clean_figures:
            trainer.update_clean(batch, result.start_loss, result.start_correct)
        return result.images_adv


class StandardLoss(Objective):
    """The compiled loss on the clean images: training without an attack."""

    def inputs(self, trainer: Trainer, batch: Batch) -> Any:
        """Returns the images unchanged."""
        return batch.images
