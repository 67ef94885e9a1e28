"""A training job: the kind of job, its records, and the rules that concern more than one of them.

The fields of these records are the flags: the name, default and help text of a flag are defined there and nowhere else.
Everything inside the package takes a record or plain arguments, never flags.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from robust_tf.config.adversarial import AdversarialConfig
from robust_tf.config.checks import check_choices
from robust_tf.config.data import DataConfig
from robust_tf.config.optimization import OptimizationConfig
from robust_tf.config.run import PlanConfig, RunConfig
from robust_tf.config.transfer import TRANSFER_ONLY, TransferConfig
from robust_tf.errors import UserError
from robust_tf.flags import flag, flat_fields, flat_values, from_flat_values, parse_flags, record, to_text

JobKind = Literal["pretrain", "transfer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One training job: adversarial (or standard) pretraining, or transfer. See `--help` for each flag.

    Example:
        >>> job = JobConfig.from_flags(dataset="digits", norm="l2", epsilon=0.5, epochs=3)
        >>> job.data.dataset, job.adversarial.training_attack.steps
        ('digits', 7)
        >>> job.with_flags(epsilon=1.0).adversarial.epsilon
        1.0
    """

    task: JobKind = flag(
        "pretrain", "Kind of job: train a network from scratch, or adapt --source to --dataset.", heading="Job"
    )
    data: DataConfig = record(DataConfig, "Data")
    transfer: TransferConfig = record(TransferConfig, "Network and transfer")
    adversarial: AdversarialConfig = record(AdversarialConfig, "Attack and adversarial training")
    optimization: OptimizationConfig = record(OptimizationConfig, "Optimization")
    run: RunConfig = record(RunConfig, "Run and outputs")
    plan: PlanConfig = record(PlanConfig, "Plan")

    def __post_init__(self) -> None:
        check_choices(self)
        _check_kind(self)
        _check_data(self)
        if self.data.task_type != "classification":
            _check_dense(self)
        if self.transfer.cached:
            _check_cached_features(self)
        _check_draws(self)
        _check_length(self)
        _check_adversarial(self)
        _check_devices(self)

    @classmethod
    def from_flags(cls, **flags: Any) -> "JobConfig":
        """Builds a job from flags by name, whichever record they belong to; all other flags take their defaults."""
        return from_flat_values(cls, flags)

    def with_flags(self, **flags: Any) -> "JobConfig":
        """Returns the same job with other values for some flags."""
        return from_flat_values(JobConfig, {**flat_values(self), **flags})

    @property
    def is_transfer(self) -> bool:
        """Whether the job adapts a source instead of training from scratch."""
        return self.task == "transfer"

    @property
    def data_epochs(self) -> int:
        """Number of passes over the training images: `epochs`, divided by the number of replays in free training."""
        return math.ceil(self.optimization.epochs / self.adversarial.replays)

    @property
    def gradients_per_image(self) -> float:
        """Mean number of forward and backward passes for each image in one pass over the data."""
        return self.adversarial.gradients_per_image(epochs=self.optimization.epochs)

    def resolved(self) -> "JobConfig":
        """Returns the same job, in which every flag that was left to the training recipe has its value.

        Two jobs that resolve to the same flags are the same job.
        """
        return dataclasses.replace(self, adversarial=self.adversarial.resolved(epochs=self.optimization.epochs))

    def standard_twin(self) -> "JobConfig":
        """Returns the same job without an attack in training, evaluated under the same attack."""
        select_by = self.optimization.select_by
        return dataclasses.replace(
            self,
            adversarial=self.resolved().adversarial.standard(),
            optimization=dataclasses.replace(
                self.optimization, select_by="accuracy" if select_by == "robust_accuracy" else select_by
            ),
        )

    def differences(self, other: "JobConfig") -> list[str]:
        """Returns the flags that make `other` a different job, as "--name: value here -> value there"."""
        here, there = flat_values(self.resolved()), flat_values(other.resolved())
        return [
            f"--{field.name}: {to_text(here[field.name])} -> {to_text(there[field.name])}"
            for field in flat_fields(JobConfig)
            if field.metadata.get("identity", True) and here[field.name] != there[field.name]
        ]


def read_flag_file(path: pathlib.Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads the job that a flag file describes.

    Args:
        path: Flag file as absl reads it.
        overrides: Further flags that take precedence over the file, such as "--epsilon=0".

    Raises:
        UserError: The file is missing, names an unknown flag or holds an invalid value.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "job.cfg"
        ...     _ = path.write_text("--norm=linf")
        ...     job = read_flag_file(path, ["--epochs=3"])
        >>> job.adversarial.norm, job.optimization.epochs
        ('linf', 3)
    """
    if not path.is_file():
        raise UserError(f"There is no flag file {path}.")
    argv = ["train", f"--flagfile={path}", *overrides]
    try:
        config, rest = parse_flags(JobConfig, argv, announce_former_names=False)
    except UserError as error:
        raise UserError(f"Flag file {path}: {error}") from error
    if rest:
        raise UserError(f"Flag file {path}: every line must be a flag, --name=value. Received: {rest[0]!r}.")
    return config


def _check_kind(job: JobConfig) -> None:
    transfer = job.transfer
    if job.is_transfer and transfer.source == "none":
        raise UserError("--task=transfer needs --source. Received: --source=none.")
    if job.is_transfer:
        return
    if transfer.source != "none":
        raise UserError(f"--source is for --task=transfer. Received: --task=pretrain --source={transfer.source}.")
    for name in TRANSFER_ONLY:
        value = getattr(transfer, name)
        if value != getattr(TransferConfig, name):
            raise UserError(f"--{name} is for --task=transfer. Received: --{name}={to_text(value)} --task=pretrain.")
    if transfer.baseline:
        raise UserError("--baseline compares two sources of a transfer. Received: --task=pretrain.")


def _check_data(job: JobConfig) -> None:
    if job.data.downscale is not None and job.run.export_dir:
        raise UserError(
            "A served model takes images as they are, and would not reduce them first. Received: "
            f"--downscale={job.data.downscale} --export_dir={job.run.export_dir}."
        )


def _check_dense(job: JobConfig) -> None:
    """Refuses flags that mean nothing for boxes or masks."""
    task_type = f"--task_type={job.data.task_type}"
    if not job.is_transfer:
        raise UserError(f"{task_type} adapts a backbone, so it needs --task=transfer. Received: --task={job.task}.")
    required: dict[str, Any] = {
        "features": "live",
        "hidden_layers": 0,
        "draws": 1,
        "baseline": False,
        "class_weight": "none",
        "on_alarm": "warn",
    }
    values = flat_values(job)
    for name, value in required.items():
        if values[name] != value:
            raise UserError(
                f"--{name} is for classification: {task_type} needs --{name}={to_text(value)}. Received: "
                f"--{name}={to_text(values[name])}."
            )
    if job.adversarial.uses_trades:
        raise UserError(
            "TRADES compares the class probabilities of whole images. Received: "
            f"--objective={job.adversarial.objective} {task_type}. Use --objective=adversarial or awp."
        )
    if job.plan.plan_devices:
        raise UserError(f"--plan_devices plans classification jobs. Received: {task_type}.")


def _check_cached_features(job: JobConfig) -> None:
    # Anything else would change the features while the head trains, or would need the images again.
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
    head = job.transfer.head
    if head != "sgd":
        # A head that lbfgs or ridge fits has no epochs, and its penalty is chosen without class weights.
        required |= {"hidden_layers": 0, "patience": 0, "class_weight": "none"}
    values = flat_values(job)
    for name, value in required.items():
        if values[name] != value:
            raise UserError(
                f"--features=cached --head={head} needs --{name}={to_text(value)}. Received: {to_text(values[name])}."
            )
    if job.adversarial.training_attack.active:
        raise UserError(
            "--features=cached trains on stored features, which no attack can reach: it needs --epsilon=0 (and "
            f"--eval_epsilon for the robust accuracy). Received: --epsilon={job.adversarial.epsilon:g}."
        )
    if job.transfer.views > 1 and job.data.augmentation == "none" and not job.data.rand_augment:
        raise UserError(
            "All views except the first are augmented, so without augmentation they would equal the first. Received: "
            f"--views={job.transfer.views} --augmentation=none."
        )
    if job.plan.plan_devices:
        raise UserError(
            "--plan_devices plans steps through the whole network, which stored features don't need: one device "
            "is enough. Received: --features=cached."
        )


def _check_draws(job: JobConfig) -> None:
    draws = job.transfer.draws
    if draws > 1 and job.data.examples_per_class is None:
        raise UserError(
            "--draws repeats the job with other labeled images, so it needs --examples_per_class. Received: "
            f"--draws={draws}."
        )
    if job.run.seed + draws > 2**32:
        raise UserError(
            f"The seed of the last draw must be below 2**32. Received: --seed={job.run.seed} --draws={draws}."
        )
    if "robust_accuracy" in job.transfer.claims and not job.adversarial.evaluation_attack.active:
        raise UserError("--claims=robust_accuracy needs an attack in the test. Received: --eval_epsilon=0.")


def _check_length(job: JobConfig) -> None:
    epochs, adversarial, unfreeze_at = job.optimization.epochs, job.adversarial, job.transfer.unfreeze_at_epoch
    if unfreeze_at is not None and not 0 < unfreeze_at < job.data_epochs:
        raise UserError(f"--unfreeze_at_epoch must lie within the {job.data_epochs} epochs. Received: {unfreeze_at}.")
    if adversarial.uses_awp and not adversarial.awp_warmup_epochs < epochs:
        raise UserError(
            f"--awp_warmup_epochs must be less than the {epochs} epochs, or no weight is ever perturbed. "
            f"Received: {adversarial.awp_warmup_epochs:g}."
        )
    rise = adversarial.warmup_epochs(epochs=epochs)
    if rise is not None and not 0 < rise <= epochs:
        raise UserError(f"--epsilon_warmup_epochs must be above 0 and at most the {epochs} epochs. Received: {rise:g}.")
    if adversarial.on_alarm != "warn" and not 1 <= adversarial.alarm_every_epochs <= job.data_epochs:
        raise UserError(
            f"--on_alarm={adversarial.on_alarm} needs a check for alarms within the {job.data_epochs} epochs. "
            f"Received: --alarm_every_epochs={adversarial.alarm_every_epochs}."
        )


def _check_adversarial(job: JobConfig) -> None:
    if job.adversarial.uses_trades and job.optimization.class_weight != "none":
        raise UserError(
            "TRADES has a divergence that no class weight acts on. Received: "
            f"--class_weight={job.optimization.class_weight} with {job.adversarial.recipe_flags}. Use "
            "--objective=adversarial or awp, or --class_weight=none."
        )
    if job.optimization.select_by == "robust_accuracy" and not job.adversarial.training_attack.active:
        raise UserError("--select_by=robust_accuracy needs an attack in training. Received: --epsilon=0.")


def _check_devices(job: JobConfig) -> None:
    optimization, distribution = job.optimization, job.run.distribution
    if distribution == "none":
        return
    if optimization.precision == "mixed_float16":
        raise UserError(
            "--precision=mixed_float16 works on one device only; use --precision=mixed_bfloat16 on several. Received: "
            f"--precision=mixed_float16 --distribution={distribution}."
        )
    if distribution == "tpu" and optimization.jit_compile == "true":
        raise UserError(
            "On TPUs XLA always compiles the whole step, so leave out --jit_compile. Received: --jit_compile=true "
            "--distribution=tpu."
        )
    if optimization.accumulate_steps > 1:
        raise UserError(
            "--accumulate_steps works on one device only: with several, each has a share of the batch anyway. "
            f"Received: --accumulate_steps={optimization.accumulate_steps} --distribution={distribution}."
        )
    attack = job.adversarial.training_attack
    if attack.active and attack.steps > 1 and job.adversarial.network_mode == "training":
        raise UserError(
            "--attack_mode=training with several steps works on one device only. Received: --attack_mode=training "
            f"--attack_steps={attack.steps} --distribution={distribution}. Use --attack_mode=inference."
        )
    if job.adversarial.fast == "free":
        raise UserError(
            "Free adversarial training keeps one perturbation for the batch, on one device. Received: --fast=free "
            f"--distribution={distribution}."
        )
    if job.transfer.cached:
        raise UserError(
            "--features=cached trains a head on one device, which takes seconds. Received: --features=cached "
            f"--distribution={distribution}."
        )
