"""Madry's adversarial training: the compiled loss on adversarial images (Madry et al. 2018, arXiv 1706.06083)."""

from typing import Any

import tensorflow as tf

from robust_tf.attacks import climb
from robust_tf.config.attack import AttackMode
from robust_tf.training.objectives.base import Batch, Objective, Trainer


class AdversarialLoss(Objective):
    """The compiled loss on the images that PGD on the same loss finds.

    Args:
        attack_mode: mode of the network in the attack; see `Recipe`. In training mode every forward pass of the attack
            moves BatchNorm's statistics, as in the code of Wong et al. 2020.
        attack_passes: number of forward passes of the attack.
        random_start: whether the attack starts at random points.
    """

    def __init__(self, *, attack_mode: AttackMode, attack_passes: int, random_start: bool) -> None:
        self._training = attack_mode == "training"
        self.passes = 1 + (attack_passes if self._training else 0)
        # The attack's first forward pass is on the clean images in inference mode, or it says nothing about them.
        self.knows_clean_figures = not (self._training or random_start)

    def inputs(self, trainer: Trainer, batch: Batch) -> tf.Tensor:
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
    """The compiled loss on the images as they are: training without an attack."""

    def inputs(self, trainer: Trainer, batch: Batch) -> Any:
        return batch.images
