"""Adversarial training and the evaluation under attack, as a record that checks itself."""

import dataclasses
import math
from typing import Any, Literal

from robust_tf.config.attack import AttackConfig, AttackMode, Norm
from robust_tf.config.checks import check_choices, check_default, check_epsilon, check_ranges
from robust_tf.errors import UserError
from robust_tf.flags import flag

Objective = Literal["adversarial", "trades", "awp", "trades_awp"]
Fast = Literal["none", "fgsm", "free", "epsilon_warmup"]
OnAlarm = Literal["warn", "stop", "rollback"]

# PGD steps of the validation attack if the attack of training has only one gradient step.
_VALIDATION_STEPS = 3
# Flags whose values the recipe sets if they are left out.
_DECIDED = ("attack_step_size", "attack_steps", "random_start", "use_best", "attack_mode")
# Flags that make training differ from standard training.
_RECIPE = (
    *("objective", "trades_beta", "awp_gamma", "awp_warmup_epochs"),
    *("fast", "free_replays", "epsilon_warmup_epochs", "attack_mode"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The attacks of training and evaluation, and the loss that training minimizes. See `--help` for each field.

    A field whose value is None is left to the recipe that `fast` and `objective` choose. `resolved` fills it in, and
    the properties return the values that training uses.

    Example:
        >>> adversarial = AdversarialConfig(norm="l2", epsilon=0.5, fast="fgsm")
        >>> adversarial.training_attack.step_size, adversarial.network_mode
        (0.625, 'training')
    """

    norm: Norm = flag("l2", "Norm of every attack of the job.")
    epsilon: float = flag(
        0.0,
        "Radius of the attack in training, in [0, 1] pixel units; fractions such as 8/255 are allowed. 0 is standard "
        "training.",
    )
    attack_step_size: float | None = flag(
        None,
        "Length of an attack step in training, in the same unit. If it is left out, --fast decides: normally "
        "2.5 * epsilon / steps.",
    )
    attack_steps: int | None = flag(
        None, "Number of PGD steps in training. If it is left out, --fast decides: normally 7."
    )
    random_start: bool | None = flag(
        None,
        "Start the attack in training at a random point of the ball, which Salman et al. (2020) do not do. If it is "
        "left out, --fast decides: normally false.",
    )
    use_best: bool | None = flag(
        None,
        "Train on the iterate of highest loss for each image instead of the last one. If it is left out, --objective "
        "and --fast decide: normally true, but false for TRADES and for fgsm and free.",
    )
    attack_mode: AttackMode | None = flag(
        None,
        "Mode of the network during the attacks in training. inference: BatchNorm uses its moving statistics, as in "
        "the code of Salman et al. (2020). training: the network runs as it does in a weight update, so the attack "
        "also updates the moving statistics, as in the code of Wong et al. (2020). If it is left out, --fast decides: "
        "normally inference.",
    )
    objective: Objective = flag(
        "adversarial",
        "Loss that training minimizes. adversarial: the loss of adversarial images (Madry et al. 2018). trades: the "
        "loss of clean images + beta * KL(clean || adversarial) (Zhang et al. 2019). awp and trades_awp: the same two "
        "losses, but at nearby weights for which they are high (adversarial weight perturbation, Wu et al. 2020).",
    )
    trades_beta: float = flag(6.0, "Weight of the divergence in TRADES.")
    awp_gamma: float = flag(5e-3, "Size of the adversarial weight perturbation, relative to the weights of each layer.")
    awp_warmup_epochs: float = flag(0.0, "Number of epochs before the first adversarial weight perturbation.")
    fast: Fast = flag(
        "none",
        "Cheap recipe for adversarial training. It sets the attack flags that are left out. fgsm: one step of "
        "1.25 * epsilon from a random start (Wong et al. 2020). free: --free_replays training steps on each batch, "
        "which keep and improve one perturbation, and correspondingly fewer passes over the data (Shafahi et al. "
        "2019). epsilon_warmup: PGD with an epsilon that rises from 0.",
    )
    free_replays: int = flag(4, "Number of optimizer steps on each batch with --fast=free.")
    epsilon_warmup_epochs: float | None = flag(
        None,
        "Number of epochs over which epsilon and the step size rise with --fast=epsilon_warmup. If it is left out, "
        "they rise over half of --epochs.",
    )
    eval_epsilon: float | None = flag(
        None, "Radius of the attack in the final evaluation. If it is left out, --epsilon is used."
    )
    eval_steps: int = flag(20, "Number of PGD steps in the final evaluation, each of length 2.5 * epsilon / steps.")
    on_alarm: OnAlarm = flag(
        "warn",
        "What to do when training no longer makes the network robust. warn: print a warning and go on. stop: end the "
        "training and keep the best earlier epoch. rollback: go back to the previous epoch and continue with a tenth "
        "of the learning rate, at most 3 times, and then stop.",
    )
    alarm_every_epochs: int = flag(
        1,
        "Number of epochs between two checks for alarms. A check compares FGSM with PGD and PGD with Square, and looks "
        "for zero gradients, on 64 validation images. 0 never checks.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, ("free_replays",), lowest=1)
        check_ranges(self, ("attack_steps", "eval_steps", "alarm_every_epochs"), lowest=0)
        # Checked here as well as in the attacks, whose messages could only name their arguments.
        for name in ("epsilon", "eval_epsilon"):
            if getattr(self, name) is not None:
                check_epsilon(self.norm, getattr(self, name), name=f"--{name}")
        if self.epsilon > 0 and self.attack_step_size is not None and not self.attack_step_size > 0:
            raise UserError(
                f"--attack_step_size must be more than 0. Received: --attack_step_size={self.attack_step_size}. Leave "
                "it out for the usual step size."
            )
        attack = self.training_attack
        if self.epsilon > 0 and attack.steps < 1:
            raise UserError(
                f"An attack of --epsilon={self.epsilon:g} needs 1 step or more. Received: "
                f"--attack_steps={attack.steps}. Use --epsilon=0 for standard training."
            )
        self._check_recipe(attack)
        if self.on_alarm != "warn" and not attack.active:
            raise UserError(
                f"--on_alarm={self.on_alarm} needs an attack in training: without one there is nothing to check. "
                "Received: --epsilon=0."
            )

    def _check_recipe(self, attack: AttackConfig) -> None:
        if (self.objective != "adversarial" or self.fast != "none") and not attack.active:
            raise UserError(
                f"{self.recipe_flags} needs an attack in training. Received: --epsilon={self.epsilon:g} "
                f"--attack_steps={attack.steps}."
            )
        for name in ("trades_beta", "awp_gamma", "awp_warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"--{name} must be a number of 0 or more. Received: {value}.")
        if not self.uses_trades:
            check_default(self, ("trades_beta",), "--objective=trades and trades_awp")
        if not self.uses_awp:
            check_default(self, ("awp_gamma", "awp_warmup_epochs"), "--objective=awp and trades_awp")
        if self.fast != "free":
            check_default(self, ("free_replays",), "--fast=free")
        if self.fast != "epsilon_warmup":
            check_default(self, ("epsilon_warmup_epochs",), "--fast=epsilon_warmup")
        if (self.single_step and self.uses_trades) or (self.fast == "free" and self.uses_awp):
            raise UserError(
                f"--fast={self.fast} works only with the loss of adversarial images. Received: {self.recipe_flags}. "
                "Use --objective=adversarial, or --fast=none."
            )
        if self.uses_trades and attack.random_start:
            raise UserError(
                "TRADES always starts its attack close to the image. Received: --random_start with "
                f"{self.recipe_flags}. Leave it out."
            )
        if self.single_step and attack.steps != 1:
            raise UserError(
                f"--fast={self.fast} has one attack step. Received: --attack_steps={attack.steps}. Leave it out, "
                "or use --fast=none."
            )
        if self.network_mode == "training" and (self.fast == "free" or self.uses_trades or not attack.active):
            raise UserError(
                "--attack_mode=training works only for attacks on the loss of adversarial images. Received: "
                f"--attack_mode=training with {self.recipe_flags} and --epsilon={self.epsilon:g}. Leave it out."
            )
        for name in ("random_start", "use_best"):
            if self.fast == "free" and getattr(attack, name):
                raise UserError(
                    "Free adversarial training starts from the perturbation of the previous step, and uses every one. "
                    f"Received: --{name} with --fast=free. Leave it out."
                )

    @property
    def _preset(self) -> dict[str, Any]:
        """Values of the flags that were left out.

        A random start for l2 lies on the sphere, because in many dimensions nearly all of the ball's volume lies there.
        """
        usual = {"attack_steps": 7, "random_start": False, "use_best": not self.uses_trades, "attack_mode": "inference"}
        one_step = {"attack_steps": 1, "use_best": False}
        by_recipe: dict[str, dict[str, Any]] = {
            "none": {},
            "fgsm": {
                **one_step,
                "attack_step_size": 1.25 * self.epsilon,
                "random_start": True,
                "attack_mode": "training",
            },
            "free": {**one_step, "attack_step_size": self.epsilon},
            "epsilon_warmup": {},
        }
        return {**usual, **by_recipe[self.fast]}

    def _value(self, name: str) -> Any:
        given = getattr(self, name)
        return self._preset.get(name) if given is None else given

    def resolved(self, *, epochs: int) -> "AdversarialConfig":
        """Returns a copy in which every flag that was left to the recipe has its value.

        Args:
            epochs: Length of the training, in epochs.
        """
        decided = {name: self._value(name) for name in _DECIDED}
        return dataclasses.replace(self, **decided, epsilon_warmup_epochs=self.warmup_epochs(epochs=epochs))

    def warmup_epochs(self, *, epochs: int) -> float | None:
        """Returns the number of epochs over which epsilon rises, or None if it does not rise."""
        if self.fast == "epsilon_warmup" and self.epsilon_warmup_epochs is None:
            return epochs / 2
        return self.epsilon_warmup_epochs

    def standard(self) -> "AdversarialConfig":
        """Returns the record for standard training with an evaluation under the same attack."""
        defaults: dict[str, Any] = {name: getattr(AdversarialConfig, name) for name in _RECIPE}
        eval_epsilon = self.evaluation_attack.epsilon
        return dataclasses.replace(self, epsilon=0.0, eval_epsilon=eval_epsilon, on_alarm="warn", **defaults)

    @property
    def training_attack(self) -> AttackConfig:
        """The attack that training uses."""
        steps, step_size = self._value("attack_steps"), self._value("attack_step_size")
        return AttackConfig(
            norm=self.norm,
            epsilon=self.epsilon,
            step_size=2.5 * self.epsilon / max(steps, 1) if step_size is None else step_size,
            steps=steps,
            random_start=self._value("random_start"),
            use_best=self._value("use_best"),
        )

    @property
    def validation_attack(self) -> AttackConfig:
        """The attack after each epoch: the training attack at full epsilon, or PGD if training uses a single step.

        A network that has overfitted to a single-step attack looks best under that very attack.
        """
        if not self.single_step:
            return self.training_attack
        step_size = 2.5 * self.epsilon / _VALIDATION_STEPS
        return AttackConfig(norm=self.norm, epsilon=self.epsilon, step_size=step_size, steps=_VALIDATION_STEPS)

    @property
    def evaluation_attack(self) -> AttackConfig:
        """The attack of the final evaluation. Source of the step size: MadryLab/robustness, README."""
        epsilon = self.epsilon if self.eval_epsilon is None else self.eval_epsilon
        step_size = 2.5 * epsilon / max(self.eval_steps, 1)
        return AttackConfig(norm=self.norm, epsilon=epsilon, step_size=step_size, steps=self.eval_steps)

    @property
    def network_mode(self) -> AttackMode:
        """Mode of the network during the attacks of training."""
        mode: AttackMode = self._value("attack_mode")
        return mode

    @property
    def uses_trades(self) -> bool:
        """Whether the loss includes the divergence of TRADES."""
        return self.objective in ("trades", "trades_awp")

    @property
    def uses_awp(self) -> bool:
        """Whether training perturbs the weights."""
        return self.objective in ("awp", "trades_awp")

    @property
    def single_step(self) -> bool:
        """Whether the recipe attacks with a single gradient step."""
        return self.fast in ("fgsm", "free")

    @property
    def replays(self) -> int:
        """Number of optimizer steps on each batch."""
        return self.free_replays if self.fast == "free" else 1

    @property
    def recipe_flags(self) -> str:
        """The two flags that choose the recipe, for messages."""
        return f"--objective={self.objective} --fast={self.fast}"

    def gradients_per_image(self, *, epochs: int) -> float:
        """Returns the mean number of forward and backward passes for each image in one pass over the data.

        Args:
            epochs: Length of the training, in epochs.
        """
        if self.fast == "free":
            return self.free_replays
        of_loss = 2.0 if self.uses_trades else 1.0
        if self.uses_awp:  # the weight perturbation needs one more gradient of the loss
            of_loss *= 2 - self.awp_warmup_epochs / epochs
        attack = self.training_attack
        return of_loss + (attack.steps if attack.active else 0)
