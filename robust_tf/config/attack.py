"""One PGD attack as a record that checks itself."""

import dataclasses
from typing import Literal

from robust_tf.config.checks import check_choice, check_epsilon
from robust_tf.errors import UserError

# The norms that PGD and FGSM support, and therefore training. Some attacks support all norms of `names.AttackNorm`.
Norm = Literal["l2", "linf"]
# Mode of the network in the attacks of training.
AttackMode = Literal["inference", "training"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """One PGD attack: a threat model (norm and epsilon) and the search within it.

    Example:
        >>> attack = AttackConfig(norm="linf", epsilon=8 / 255, step_size=2 / 255, steps=7)
        >>> attack.active
        True

    Attributes:
        norm: Norm of the perturbation, "linf" or "l2".
        epsilon: Radius of the ball, in [0, 1] pixel units. 0 means no attack.
        step_size: Length of a step, in the same norm and unit.
        steps: Number of gradient steps.
        random_start: Whether to start at a random point of the ball.
        use_best: Whether to keep the iterate of highest loss for each image, instead of the last one.
    """

    norm: Norm
    epsilon: float
    step_size: float
    steps: int
    random_start: bool = False
    use_best: bool = True

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, Norm)
        check_epsilon(self.norm, self.epsilon)
        if self.steps < 0:
            raise UserError(f"steps must be 0 or more. Received: steps={self.steps}.")
        if self.epsilon > 0 and self.steps > 0 and not self.step_size > 0:
            raise UserError(
                f"step_size must be more than 0 when there are steps. Received: step_size={self.step_size}, "
                f"steps={self.steps}. A usual choice is 2.5 * epsilon / steps = {2.5 * self.epsilon / self.steps:g}."
            )

    @property
    def active(self) -> bool:
        """Whether the attack can change the images at all."""
        return self.epsilon > 0 and self.steps > 0
