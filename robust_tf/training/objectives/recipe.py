"""Which objective a training step minimizes, as one frozen record."""

import dataclasses
import math

from robust_tf.config.attack import AttackMode
from robust_tf.config.checks import check_choice
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.training.schedules import optimizer_steps_per_epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How `AdversarialTrainer` trains with its attack. The default is Madry's adversarial training.

    Attributes:
        trades_beta: weight of the divergence in TRADES, at least 0. None trains with Madry's loss.
        awp_gamma: size of the adversarial weight perturbation relative to the weights, at least 0. None leaves it out.
        awp_warmup_steps: number of optimizer steps before the first weight perturbation.
        epsilon_warmup_steps: number of optimizer steps over which epsilon and the step size rise linearly from 0.
        free_replays: number of optimizer steps on each batch in free adversarial training; 0 trains in another way.
        free_batch_size: size of the largest batch in free adversarial training, which must be known beforehand.
        attack_mode: mode of the network in the attack. "inference": BatchNorm uses its moving statistics and Dropout
            is off, as in MadryLab/robustness. "training": as in the update, and the attack's forward passes move the
            statistics too, as in the code of Wong et al. 2020 (locuslab/fast_adversarial).
    """

    trades_beta: float | None = None
    awp_gamma: float | None = None
    awp_warmup_steps: float = 0.0
    epsilon_warmup_steps: float = 0.0
    free_replays: int = 0
    free_batch_size: int = 0
    attack_mode: AttackMode = "inference"

    def __post_init__(self) -> None:
        for name in ("trades_beta", "awp_gamma", "awp_warmup_steps", "epsilon_warmup_steps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a number of 0 or more. Received: {name}={value}.")
        if min(self.free_replays, self.free_batch_size) < 0 or bool(self.free_replays) != bool(self.free_batch_size):
            raise UserError(
                "Free adversarial training needs free_replays and free_batch_size, both 1 or more. Received: "
                f"free_replays={self.free_replays}, free_batch_size={self.free_batch_size}."
            )
        check_choice("attack_mode", self.attack_mode, AttackMode)
        if self.attack_mode == "training" and (self.free_replays or self.trades_beta is not None):
            raise UserError(
                "attack_mode='training' belongs to the loss of adversarial images, with or without AWP. "
                f"Received: {self}."
            )
        others = (self.trades_beta, self.awp_gamma, self.epsilon_warmup_steps or None)
        if self.free_replays and any(value is not None for value in others):
            raise UserError(
                "Free adversarial training takes one gradient for the weights and the images, so it goes with neither "
                f"TRADES nor AWP nor a rising epsilon. Received: {self}."
            )


def recipe_of(config: JobConfig, steps_per_epoch: int) -> Recipe:
    """The recipe that a job's flags describe; `steps_per_epoch` are batches in one pass over the training part."""
    steps = optimizer_steps_per_epoch(config, steps_per_epoch)
    free = config.fast == "free"
    return Recipe(
        trades_beta=config.trades_beta if config.uses_trades else None,
        awp_gamma=config.awp_gamma if config.uses_awp else None,
        awp_warmup_steps=config.awp_warmup_epochs * steps,
        epsilon_warmup_steps=(config.epsilon_warmup_epochs or 0.0) * steps,
        free_replays=config.free_replays if free else 0,
        free_batch_size=config.batch_size if free else 0,
        attack_mode=config.attack_mode,
    )
