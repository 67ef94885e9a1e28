"""What the flags of a job, and the numbers of an attack, have to satisfy."""

import dataclasses
import math
import numbers
import typing
from typing import TYPE_CHECKING, Any, Literal

from robust_tf.errors import UserError, unknown_name
from robust_tf.flags import parse_amount, to_text

if TYPE_CHECKING:
    from robust_tf.config.job import JobConfig


def check_epsilon(norm: str, epsilon: float) -> None:
    """Refuses a radius that is negative or not finite, or with linf more than the pixel range."""
    if not isinstance(epsilon, numbers.Real) and getattr(epsilon, "shape", None) != ():
        raise UserError(f"epsilon must be one number, in [0, 1] pixel units. Received: epsilon={epsilon!r}.")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise UserError(f"epsilon must be 0 or more, in [0, 1] pixel units. Received: epsilon={epsilon}.")
    if norm == "linf" and epsilon > 1:
        raise UserError(
            "epsilon of the linf norm must be in [0, 1], since pixels are. "
            f"Received: epsilon={epsilon:g}. Did you mean {epsilon:g}/255?"
        )


def check_job(job: "JobConfig") -> None:
    """Checks every flag of a job, and that they fit together.

    Raises:
        UserError: names the flag, what it got, and the way out.
    """
    for name in (
        "epochs",
        "batch_size",
        "lr_step_epochs",
        "log_every_steps",
        "views",
        "accumulate_steps",
        "free_replays",
        "alarm_every_epochs",
    ):
        check_range(name, getattr(job, name), lowest=1)
    for name in ("image_size", "examples_per_class", "downscale", "checkpoint_every_steps", "base_batch_size"):
        if getattr(job, name) is not None:
            check_range(name, getattr(job, name), lowest=1)
    for name in ("seed", "split_seed", "hidden_layers", "momentum", "weight_decay", "warmup_epochs", "eval_steps"):
        check_range(name, getattr(job, name), lowest=0)
    for name in ("clip_norm", "checkpoint_every_minutes", "restarts", "patience"):
        check_range(name, getattr(job, name), lowest=0)
    if not 0 <= job.ema_decay < 1:
        raise UserError(f"--ema_decay must lie in [0, 1). Received: {job.ema_decay}.")
    if job.profile_steps and not (len(job.profile_steps) == 2 and 1 <= job.profile_steps[0] <= job.profile_steps[1]):
        raise UserError(
            "--profile_steps takes the first and the last step, counted from 1, e.g. 10,15. Received: "
            f"{to_text(job.profile_steps)}."
        )
    _check_optimisation(job)
    if not 0 < job.validation_fraction < 1:
        raise UserError(f"--validation_fraction must be between 0 and 1. Received: {job.validation_fraction}.")
    _check_distribution(job)
    for name in ("workdir", "cache_dir", "export_dir"):
        if "://" in getattr(job, name):
            raise UserError(
                f"--{name} is a folder of this machine, or one that is mounted here; only --data_dir may be in a "
                f"store. Received: --{name}={getattr(job, name)}."
            )
    _check_plan(job)
    _check_data(job)
    _check_transfer(job)
    _check_features(job)
    _ = job.attack, job.evaluation_attack, job.multipliers  # checks their values
    if job.epsilon > 0 and job.attack_steps < 1:
        raise UserError(
            f"An attack of --epsilon={job.epsilon:g} needs 1 step or more. Received: "
            f"--attack_steps={job.attack_steps}. Standard training is --epsilon=0."
        )
    _check_recipe(job)
    if job.select_by == "robust_accuracy" and not job.attack.active:
        raise UserError("--select_by=robust_accuracy needs an attack in training. Received: --epsilon=0.")
    if job.select_by == "last" and job.patience:
        raise UserError(
            "--patience needs a validation figure that chooses the epoch: with --select_by=last every epoch is the "
            f"best so far. Received: --patience={job.patience} --select_by=last. Use --select_by=auto."
        )
    if job.on_alarm != "warn" and not job.attack.active:
        raise UserError(
            f"--on_alarm={job.on_alarm} needs an attack in training: without one nothing is looked at. "
            "Received: --epsilon=0."
        )
    if job.on_alarm != "warn" and job.alarm_every_epochs > job.passes:
        raise UserError(
            f"--on_alarm={job.on_alarm} needs a look for alarms within the {job.passes} epochs. Received: "
            f"--alarm_every_epochs={job.alarm_every_epochs}."
        )
    if job.deterministic and job.jit_compile == "true":
        raise UserError(
            "Keras compiles nothing by XLA under determinism. Received: --deterministic --jit_compile=true."
        )


def _check_optimisation(job: "JobConfig") -> None:
    if job.seed >= 2**32:  # what NumPy's global generator takes
        raise UserError(f"--seed must be below 2**32. Received: {job.seed}.")
    if not 0 < job.learning_rate < math.inf:
        raise UserError(f"--learning_rate must be more than 0. Received: {job.learning_rate}.")
    if not job.momentum < 1:
        raise UserError(f"--momentum must be below 1. Received: {job.momentum}.")
    if not 0 < job.lr_decay <= 1:
        raise UserError(f"--lr_decay must be more than 0 and at most 1. Received: {job.lr_decay}.")
    if not 0 < job.lr_peak < 1:
        raise UserError(f"--lr_peak must be between 0 and 1. Received: {job.lr_peak}.")
    if job.lr_schedule == "piecewise" and not job.lr_milestones:
        raise UserError("--lr_schedule=piecewise needs --lr_milestones, e.g. 30,60. Received: none.")
    if any(milestone < 1 for milestone in job.lr_milestones):
        raise UserError(f"--lr_milestones are epochs from 1 on. Received: {to_text(job.lr_milestones)}.")


def _check_distribution(job: "JobConfig") -> None:
    if job.distribution == "none":
        return
    for name, value, instead in (("precision", "mixed_float16", "mixed_bfloat16"), ("jit_compile", "true", "auto")):
        if getattr(job, name) == value:
            raise UserError(
                f"--{name}={value} works on one device only, --{name}={instead} on several. Received: "
                f"--{name}={value} --distribution={job.distribution}."
            )
    if job.accumulate_steps > 1:
        raise UserError(
            "--accumulate_steps works on one device only: with several, each has a share of the batch anyway. "
            f"Received: --accumulate_steps={job.accumulate_steps} --distribution={job.distribution}."
        )
    if job.fast == "free":
        raise UserError(
            "Free adversarial training keeps one perturbation for the batch, on one device. Received: --fast=free "
            f"--distribution={job.distribution}."
        )
    if job.features == "cached":
        raise UserError(
            "--features=cached trains a head on one device, which takes seconds. Received: --features=cached "
            f"--distribution={job.distribution}."
        )


def _check_recipe(job: "JobConfig") -> None:
    recipe = f"--objective={job.objective} --fast={job.fast}"
    if (job.objective != "adversarial" or job.fast != "none") and not job.attack.active:
        raise UserError(
            f"{recipe} needs an attack in training. Received: --epsilon={job.epsilon:g} "
            f"--attack_steps={job.attack_steps}."
        )
    for name in ("trades_beta", "awp_gamma", "awp_warmup_epochs"):
        value = getattr(job, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name} must be a number of 0 or more. Received: {value}.")
    used = {
        "trades_beta": (job.uses_trades, "--objective=trades and trades_awp"),
        "awp_gamma": (job.uses_awp, "--objective=awp and trades_awp"),
        "awp_warmup_epochs": (job.uses_awp, "--objective=awp and trades_awp"),
        "free_replays": (job.fast == "free", "--fast=free"),
        "epsilon_warmup_epochs": (job.fast == "epsilon_warmup", "--fast=epsilon_warmup"),
    }
    for name, (is_used, where) in used.items():
        if not is_used and getattr(job, name) != getattr(type(job), name):
            raise UserError(f"--{name} is for {where}. Received: --{name}={getattr(job, name)} with {recipe}.")
    if job.uses_awp and not job.awp_warmup_epochs < job.epochs:
        raise UserError(
            f"--awp_warmup_epochs must be less than the {job.epochs} epochs, or no weight is ever perturbed. "
            f"Received: {job.awp_warmup_epochs:g}."
        )
    rise = job.epsilon_warmup_epochs
    if rise is not None and not 0 < rise <= job.epochs:
        raise UserError(
            f"--epsilon_warmup_epochs must be above 0 and at most the {job.epochs} epochs. Received: {rise:g}."
        )
    if job.uses_trades and job.class_weight != "none":
        raise UserError(
            "TRADES has a divergence that no class weight acts on. Received: "
            f"--class_weight={job.class_weight} with {recipe}. Use --objective=adversarial or awp, or "
            "--class_weight=none."
        )
    if job.uses_trades and job.random_start:
        raise UserError("TRADES has a start of its own. Received: --random_start with " + recipe + ".")
    if job.fast in ("fgsm", "free") and job.attack_steps != 1:
        raise UserError(
            f"--fast={job.fast} has one attack step. Received: --attack_steps={job.attack_steps}. Leave it out, "
            "or use --fast=none."
        )
    if job.fast in ("fgsm", "free") and job.uses_trades or job.fast == "free" and job.uses_awp:
        raise UserError(
            f"--fast={job.fast} is a recipe for the loss of adversarial images. Received: {recipe}. Use "
            "--objective=adversarial, or --fast=none."
        )
    if job.attack_mode == "training" and (job.fast == "free" or job.uses_trades or not job.attack.active):
        raise UserError(
            "--attack_mode=training belongs to attacks on the loss of adversarial images. Received: "
            f"--attack_mode=training with {recipe} and --epsilon={job.epsilon:g}. Leave it out."
        )
    for name in ("random_start", "use_best"):
        if job.fast == "free" and getattr(job, name):
            raise UserError(
                "Free adversarial training goes on from the perturbation of the step before, and uses every one. "
                f"Received: --{name} with --fast=free."
            )


def _check_plan(job: "JobConfig") -> None:
    for name in ("plan_utilisation", "plan_price"):
        if getattr(job, name) != getattr(type(job), name) and not job.plan_devices:
            raise UserError(f"--{name} is for --plan_devices. Received: --{name}={getattr(job, name)}.")
    if job.plan_devices and not job.dry_run:
        raise UserError(
            f"--plan_devices is for --dry_run. Received: --plan_devices={to_text(job.plan_devices)} without --dry_run."
        )
    if job.plan_devices and job.features == "cached":
        raise UserError(
            "--plan_devices plans steps through the whole network, which stored features don't need: one device "
            "is enough. Received: --features=cached."
        )
    if not 0 < job.plan_utilisation <= 1:
        raise UserError(f"--plan_utilisation must be above 0 and at most 1. Received: {job.plan_utilisation}.")
    if job.plan_price is not None and not 0 < job.plan_price < math.inf:
        raise UserError(f"--plan_price must be a number above 0. Received: {job.plan_price}.")


def _check_data(job: "JobConfig") -> None:
    if not 0 <= job.rand_augment <= 1:
        raise UserError(f"--rand_augment must be in [0, 1]. Received: {job.rand_augment}.")
    if job.subset:
        parse_amount(job.subset)
    if job.examples_per_class is not None and job.subset:
        raise UserError(
            "--subset and --examples_per_class both choose the training images. Received: "
            f"--subset={job.subset} --examples_per_class={job.examples_per_class}."
        )
    if job.downscale is not None and job.export_dir:
        raise UserError(
            "A served model takes images as they are, and would not reduce them first. Received: "
            f"--downscale={job.downscale} --export_dir={job.export_dir}."
        )


def _check_features(job: "JobConfig") -> None:
    if job.features == "live":
        for name in ("views", "head"):
            if getattr(job, name) != getattr(type(job), name):
                raise UserError(f"--{name} is for --features=cached. Received: --{name}={getattr(job, name)}.")
        return
    # What changes the features while the head trains, or needs the images again.
    required: dict[str, Any] = {
        "task": "transfer",
        "transfer_mode": "fixed_feature",
        "frozen_batchnorm": "frozen",
        "unfreeze_at_epoch": None,
        "mixing": "none",
        "accumulate_steps": 1,
        "ema_decay": 0.0,
        "checkpoint_every_steps": None,
        "profile_steps": (),
    }
    if job.head != "sgd":
        # A head that is solved for has no epochs, and its penalty is chosen under an unweighted loss.
        required |= {"hidden_layers": 0, "patience": 0, "class_weight": "none"}
    for name, value in required.items():
        if getattr(job, name) != value:
            raise UserError(
                f"--features=cached --head={job.head} needs --{name}={to_text(value)}. "
                f"Received: {to_text(getattr(job, name))}."
            )
    if job.attack.active:
        raise UserError(
            "--features=cached trains on stored features, which no attack can reach: it needs --epsilon=0 (and "
            f"--eval_epsilon for the robust accuracy). Received: --epsilon={job.epsilon:g}."
        )
    if job.views > 1 and job.augmentation == "none" and not job.rand_augment:
        raise UserError(
            "All views but the first are augmented, and would here be equal to it. Received: "
            f"--views={job.views} --augmentation=none."
        )
    if not job.features_cache_size_gb > 0:
        raise UserError(f"--features_cache_size_gb must be more than 0. Received: {job.features_cache_size_gb}.")


def _check_transfer(job: "JobConfig") -> None:
    if job.task == "transfer" and job.source == "none":
        raise UserError("--task=transfer needs --source. Received: --source=none.")
    if job.task == "pretrain" and job.source != "none":
        raise UserError(f"--source is for --task=transfer. Received: --task=pretrain --source={job.source}.")
    for name in ("transfer_mode", "hidden_layers", "normalization", "unfreeze_at_epoch"):
        if job.task == "pretrain" and getattr(job, name) != getattr(type(job), name):
            raise UserError(
                f"--{name} is for --task=transfer. Received: --{name}={to_text(getattr(job, name))} --task=pretrain."
            )
    if job.unfreeze_at_epoch is not None and job.transfer_mode == "full_network":
        raise UserError(
            "--unfreeze_at_epoch is for a network that is partly frozen. Received: "
            f"--unfreeze_at_epoch={job.unfreeze_at_epoch} --transfer_mode=full_network."
        )
    if job.baseline and job.task != "transfer":
        raise UserError(f"--baseline compares two sources of a transfer. Received: --task={job.task}.")
    if (job.transfer_mode == "partial") != bool(job.freeze_through):
        raise UserError(
            "--freeze_through and --transfer_mode=partial go together. Received: "
            f"--transfer_mode={job.transfer_mode} --freeze_through={job.freeze_through!r}."
        )
    if job.unfreeze_at_epoch is not None and not 0 < job.unfreeze_at_epoch < job.passes:
        raise UserError(
            f"--unfreeze_at_epoch must lie within the {job.passes} epochs. Received: {job.unfreeze_at_epoch}."
        )


def check_choices(config: Any) -> None:
    """Checks every field of a dataclass of flags that is a Literal.

    Raises:
        UserError: another value than those listed there; suggests the nearest.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        undecided = field.default is None and getattr(config, field.name) is None
        if typing.get_origin(hints[field.name]) is Literal and not undecided:
            check_choice(f"--{field.name}", getattr(config, field.name), hints[field.name])


def check_choice(name: str, value: str, choices: Any) -> None:
    if not isinstance(value, str) or value not in typing.get_args(choices):
        raise unknown_name(f"value of {name}", value, typing.get_args(choices))


def check_range(name: str, value: float, *, lowest: float) -> None:
    if not lowest <= value < math.inf:  # nor is NaN
        raise UserError(f"--{name} must be {lowest} or more. Received: {value}.")
