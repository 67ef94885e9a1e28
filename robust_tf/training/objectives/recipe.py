"""The objective that a training step minimizes, as one frozen dataclass."""

import dataclasses
import math

from robust_tf.config.attack import AttackMode
from robust_tf.config.checks import check_choice
from robust_tf.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How `AdversarialTrainer` trains with its attack. The default is Madry's adversarial training.

    Example:
        >>> Recipe(trades_beta=6.0).free_replays
        0

    Attributes:
        trades_beta: Weight of the divergence in TRADES, at least 0. None trains with Madry's loss.
        awp_gamma: Size of the adversarial weight perturbation relative to the weights, at least 0. None turns it off.
        awp_warmup_steps: Number of optimizer steps before the first weight perturbation.
        epsilon_warmup_steps: Number of optimizer steps over which epsilon and the step size rise linearly from 0.
        free_replays: Number of optimizer steps on each batch in free adversarial training. 0 turns it off.
        free_batch_size: Size of the largest batch in free adversarial training, which must be known beforehand.
        attack_mode: Mode of the network in the attack. "inference": BatchNorm uses its moving statistics and Dropout
            is off, as in MadryLab/robustness. "training": the network runs as it does in the update, and the attack's
            forward passes update the statistics too, as in the code of Wong et al. 2020 (locuslab/fast_adversarial).
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
                f"attack_mode='training' is for the loss of adversarial images, with or without AWP. Received: {self}."
            )
        others = (self.trades_beta, self.awp_gamma, self.epsilon_warmup_steps or None)
        if self.free_replays and any(value is not None for value in others):
            raise UserError(
                "Free adversarial training uses one gradient for the weights and the images, so it cannot be combined "
                f"with TRADES, AWP or a rising epsilon. Received: {self}."
            )
