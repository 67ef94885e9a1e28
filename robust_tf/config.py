"""Every flag of the training job, as one frozen dataclass that checks itself.

The fields of `JobConfig` are the flags: name, default and help stand here and nowhere else. Everything inside the
package takes these dataclasses or plain arguments, never flags.
"""

import dataclasses
import math
import pathlib
import typing
from collections.abc import Sequence
from typing import Any, Literal

from robust_tf.command_line import flag, parse_amount, parse_flags, parse_number, to_text
from robust_tf.errors import UserError, unknown_name

Norm = Literal["l2", "linf"]
TransferMode = Literal["fixed_feature", "full_network", "partial"]


def check_epsilon(norm: str, epsilon: float) -> None:
    """Refuses a radius that is negative or not finite, or with linf more than the pixel range."""
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise UserError(f"epsilon must be 0 or more, in [0, 1] pixel units. Received: epsilon={epsilon}.")
    if norm == "linf" and epsilon > 1:
        raise UserError(
            "epsilon of the linf norm must be in [0, 1], since pixels are. "
            f"Received: epsilon={epsilon:g}. Did you mean {epsilon:g}/255?"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """One PGD attack: a threat model (norm and epsilon) and how it is searched.

    Attributes:
        norm: "linf" or "l2".
        epsilon: radius of the ball, in [0, 1] pixel units. 0 means no attack.
        step_size: length of a step in the same norm and unit.
        steps: number of gradient steps.
        random_start: start at a random point of the ball.
        use_best: keep each image's worst iterate, not the last.
    """

    norm: Norm
    epsilon: float
    step_size: float
    steps: int
    random_start: bool = False
    use_best: bool = True

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, Norm)
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
        """Whether the attack moves any image."""
        return self.epsilon > 0 and self.steps > 0


def _flag(default: Any, help_text: str, *, identity: bool = True) -> Any:
    """A field that is a flag. `identity`: a workdir belongs to one value of it."""
    return flag(default, help_text, identity=identity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One training job: adversarial (or standard) pretraining, or transfer. See `--help` for each field."""

    # Job
    task: Literal["pretrain", "transfer"] = _flag("pretrain", "Train from scratch, or adapt --source to --dataset.")
    workdir: str = _flag("", "Folder of the job. Default: runs/<name of the flag file>.", identity=False)
    seed: int = _flag(0, "Of initial weights, order, augmentation, few-shot choice and random start.")
    deterministic: bool = _flag(False, "Use deterministic kernels only: bit-equal repeats, slower on a GPU.")
    dry_run: bool = _flag(False, "Print the plan and stop; train nothing.", identity=False)
    # Data
    dataset: str = _flag(
        "digits", "Name (an unknown one lists the valid ones), tfds:NAME[/config][:version], or folder:/path of images."
    )
    data_dir: str = _flag("", "TFDS folder. Default: TFDS's own.", identity=False)
    classes: tuple[int, ...] = _flag((), "Labels to keep, e.g. 5,6,7; re-numbered in this order. Default: all.")
    image_size: int | None = _flag(None, "Side in pixels. Default: the source's in transfer, else the data set's.")
    augmentation: str = _flag("", "none, shift, shift_flip, random_resized_crop, imagenet. Default: the data set's.")
    validation_fraction: float = _flag(
        0.1, "Share of the training split held out to choose the epoch, unless the data set brings such a part."
    )
    split_seed: int = _flag(0, "Which images of a folder without a test part become one.")
    rand_augment: float = _flag(0.0, "RandAugment on top of --augmentation: its magnitude, up to 1; 0 is none.")
    mixing: Literal["none", "mixup", "cutmix"] = _flag("none", "Mixes the images, and the labels, of a training batch.")
    downscale: int | None = _flag(None, "Shorter side in pixels that every image is reduced to before all else.")
    examples_per_class: int | None = _flag(None, "Few-shot: train on so many examples of each class.")
    subset: str = _flag(
        "", "Train on so many images (1000) or such a share (0.1), as equally of all classes as can be."
    )
    skip_bad_images: bool = _flag(False, "Leave out what cannot be decoded, instead of stopping there.")
    cache: Literal["auto", "memory", "disk", "none"] = _flag(
        "auto",
        "Where encoded images are kept between epochs; disk: those of training, below --cache_dir. auto: in memory if "
        "they fit into a quarter of what is free.",
        identity=False,
    )
    cache_dir: str = _flag("", "Folder for cached images and features. Default: ~/.cache/robust_tf.", identity=False)
    # Model
    architecture: str = _flag("", "Default: the source's in transfer, else resnet20.")
    source: str = _flag(
        "none",
        "Where the weights come from: path of a .keras, of a reference checkpoint (.ckpt, .pt, .pth), name of a "
        "published model (resnet50_l2_eps3), path of a flag file (its job runs first if its classifier is missing).",
    )
    transfer_mode: TransferMode = _flag("fixed_feature", "What trains: the head, all, or all after --freeze_through.")
    freeze_through: str = _flag("", "With --transfer_mode=partial: the last frozen stage, e.g. stage3.")
    frozen_batchnorm: Literal["frozen", "update"] = _flag(
        "frozen", "Statistics of frozen BatchNorm layers: kept, or updated as the paper's code does."
    )
    hidden_layers: int = _flag(0, "Hidden ReLU layers in the new head.")
    normalization: Literal["source", "dataset"] = _flag(
        "source", "Input mean and std in transfer: the source's, or the data set's row as the paper's code does."
    )
    learning_rate_multipliers: tuple[str, ...] = _flag((), "Per stage, e.g. stem=0.1,stage1=0.1,head=10.")
    features: Literal["live", "cached"] = _flag(
        "live",
        "cached, with --transfer_mode=fixed_feature: the backbone runs once for each view of an image, and the head "
        "trains on what is stored of that.",
    )
    views: int = _flag(1, "With --features=cached: views of each training image, the centre crop and augmented ones.")
    head: Literal["sgd", "lbfgs", "ridge"] = _flag(
        "sgd",
        "How the head is found: as the flags below say, or (with --features=cached) as multinomial logistic "
        "regression or ridge regression, with the regularisation that is best on the validation part.",
    )
    features_cache_size_gb: float = _flag(10.0, "Stored features may take so much; the oldest go.", identity=False)
    unfreeze_at_epoch: int | None = _flag(None, "Train the whole network from this epoch on (counted from 0).")
    # Attack
    norm: Norm = _flag("l2", "Norm of the attack.")
    epsilon: float = _flag(0.0, "Radius in [0, 1] pixel units; 8/255 works. 0 is standard training.")
    attack_step_size: float | None = _flag(None, "Default: 2.5 * epsilon / steps.")
    attack_steps: int = _flag(7, "PGD steps in training.")
    random_start: bool = _flag(False, "Start the attack at a random point (the paper does not).")
    use_best: bool = _flag(True, "Train on each image's worst iterate instead of the last.")
    eval_epsilon: float | None = _flag(None, "Radius of the evaluation attack. Default: --epsilon.")
    eval_steps: int = _flag(20, "PGD steps of the evaluation attack; its step size is 2.5 * epsilon / steps.")
    on_alarm: Literal["warn", "stop", "rollback"] = _flag(
        "warn",
        "When training has stopped making the network robust: warn only; stop, and keep "
        "the best epoch before; or rollback: go on from the epoch before with a tenth of the learning rate, at most 3 "
        "times, then stop.",
    )
    alarm_every_epochs: int | None = _flag(
        None,
        "Epochs between two looks for alarms (FGSM against PGD, PGD against Square, zero gradients, on 64 validation "
        "images). Default: 1 with stop and rollback; with warn as often as adds 5 % of work.",
    )
    # Optimisation
    epochs: int = _flag(10, "Passes over the training part.")
    batch_size: int = _flag(128, "Images a step.")
    optimizer: Literal["sgd", "adam", "adamw"] = _flag(
        "sgd", "sgd: PyTorch's, coupled weight decay; adamw: decoupled weight decay."
    )
    learning_rate: float = _flag(0.1, "Peak learning rate.")
    lr_schedule: Literal["constant", "step", "piecewise", "cosine", "cyclic"] = _flag("step", "How it changes.")
    lr_step_epochs: int = _flag(50, "step: epochs between the drops.")
    lr_milestones: tuple[int, ...] = _flag((), "piecewise: epochs at which it drops, e.g. 30,60.")
    lr_decay: float = _flag(0.1, "step, piecewise: factor of a drop.")
    lr_peak: float = _flag(4 / 15, "cyclic: where the peak lies, as a share of all steps; 0 on both ends.")
    warmup_epochs: float = _flag(0.0, "Linear rise from 0 at the start, for every schedule.")
    momentum: float = _flag(0.9, "sgd: momentum.")
    weight_decay: float = _flag(5e-4, "Weight decay on all weights, BatchNorm and biases included.")
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = _flag("float32", "Of the layers.")
    jit_compile: Literal["auto", "true", "false"] = _flag("auto", "XLA; auto leaves it off on CPU, where it is slow.")
    select_by: Literal["auto", "accuracy", "robust_accuracy", "last"] = _flag(
        "auto", "Validation figure that chooses the epoch; auto: robust_accuracy if trained with an attack."
    )
    # Output
    log_every_steps: int = _flag(10, "Steps between two points in TensorBoard's step charts.", identity=False)
    export_dir: str = _flag("", "Publish a SavedModel version below this folder when done.", identity=False)
    model_name: str = _flag("", "Name to serve under. Default: the workdir's name.", identity=False)
    baseline: bool = _flag(False, "Also run the job from the standard twin of --source, and compare.", identity=False)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("epochs", "batch_size", "lr_step_epochs", "log_every_steps", "views"):
            _check_range(name, getattr(self, name), lowest=1)
        for name in ("image_size", "examples_per_class", "alarm_every_epochs", "downscale"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), lowest=1)
        for name in ("seed", "split_seed", "hidden_layers", "momentum", "weight_decay", "warmup_epochs", "eval_steps"):
            _check_range(name, getattr(self, name), lowest=0)
        self._check_optimisation()
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"--validation_fraction must be between 0 and 1. Received: {self.validation_fraction}.")
        self._check_data()
        self._check_transfer()
        self._check_features()
        _ = self.attack, self.evaluation_attack, self.multipliers  # checks their values
        if self.epsilon > 0 and self.attack_steps < 1:
            raise UserError(
                f"An attack of --epsilon={self.epsilon:g} needs 1 step or more. Received: "
                f"--attack_steps={self.attack_steps}. Standard training is --epsilon=0."
            )
        if self.select_by == "robust_accuracy" and not self.attack.active:
            raise UserError("--select_by=robust_accuracy needs an attack in training. Received: --epsilon=0.")
        if self.on_alarm != "warn" and not self.attack.active:
            raise UserError(
                f"--on_alarm={self.on_alarm} needs an attack in training: without one nothing is looked at. "
                "Received: --epsilon=0."
            )
        if self.deterministic and self.jit_compile == "true":
            raise UserError(
                "Keras compiles nothing by XLA under determinism. Received: --deterministic --jit_compile=true."
            )

    def _check_optimisation(self) -> None:
        if self.seed >= 2**32:  # what NumPy's global generator takes
            raise UserError(f"--seed must be below 2**32. Received: {self.seed}.")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning_rate must be more than 0. Received: {self.learning_rate}.")
        if not self.momentum < 1:
            raise UserError(f"--momentum must be below 1. Received: {self.momentum}.")
        if not 0 < self.lr_decay <= 1:
            raise UserError(f"--lr_decay must be more than 0 and at most 1. Received: {self.lr_decay}.")
        if not 0 < self.lr_peak < 1:
            raise UserError(f"--lr_peak must be between 0 and 1. Received: {self.lr_peak}.")
        if self.lr_schedule == "piecewise" and not self.lr_milestones:
            raise UserError("--lr_schedule=piecewise needs --lr_milestones, e.g. 30,60. Received: none.")
        if any(milestone < 1 for milestone in self.lr_milestones):
            raise UserError(f"--lr_milestones are epochs from 1 on. Received: {to_text(self.lr_milestones)}.")

    def _check_data(self) -> None:
        if not 0 <= self.rand_augment <= 1:
            raise UserError(f"--rand_augment must be in [0, 1]. Received: {self.rand_augment}.")
        if self.subset:
            parse_amount(self.subset)
        if self.examples_per_class is not None and self.subset:
            raise UserError(
                "--subset and --examples_per_class both choose the training images. Received: "
                f"--subset={self.subset} --examples_per_class={self.examples_per_class}."
            )
        if self.mixing != "none" and self.attack.active:
            raise UserError(
                "The attack needs one label for each image, which mixed images don't have. Received: "
                f"--mixing={self.mixing} --epsilon={self.epsilon:g}."
            )
        if self.downscale is not None and self.export_dir:
            raise UserError(
                "A served model takes images as they are, and would not reduce them first. Received: "
                f"--downscale={self.downscale} --export_dir={self.export_dir}."
            )

    def _check_features(self) -> None:
        if self.features == "live":
            for name in ("views", "head"):
                if getattr(self, name) != getattr(JobConfig, name):
                    raise UserError(f"--{name} is for --features=cached. Received: --{name}={getattr(self, name)}.")
            return
        # What changes the features while the head trains, or needs the images again.
        required: dict[str, Any] = {
            "task": "transfer",
            "transfer_mode": "fixed_feature",
            "frozen_batchnorm": "frozen",
            "unfreeze_at_epoch": None,
            "mixing": "none",
        }
        if self.head != "sgd":
            required["hidden_layers"] = 0
        for name, value in required.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"--features=cached --head={self.head} needs --{name}={to_text(value)}. "
                    f"Received: {to_text(getattr(self, name))}."
                )
        if self.attack.active:
            raise UserError(
                "--features=cached trains on stored features, which no attack can reach: it needs --epsilon=0 (and "
                f"--eval_epsilon for the robust accuracy). Received: --epsilon={self.epsilon:g}."
            )
        if not self.features_cache_size_gb > 0:
            raise UserError(f"--features_cache_size_gb must be more than 0. Received: {self.features_cache_size_gb}.")

    def _check_transfer(self) -> None:
        if self.task == "transfer" and self.source == "none":
            raise UserError("--task=transfer needs --source. Received: --source=none.")
        if self.task == "pretrain" and self.source != "none":
            raise UserError(f"--source is for --task=transfer. Received: --task=pretrain --source={self.source}.")
        if self.baseline and self.task != "transfer":
            raise UserError(f"--baseline compares two sources of a transfer. Received: --task={self.task}.")
        if (self.transfer_mode == "partial") != bool(self.freeze_through):
            raise UserError(
                "--freeze_through and --transfer_mode=partial go together. Received: "
                f"--transfer_mode={self.transfer_mode} --freeze_through={self.freeze_through!r}."
            )
        if self.unfreeze_at_epoch is not None and not 0 < self.unfreeze_at_epoch < self.epochs:
            raise UserError(
                f"--unfreeze_at_epoch must lie within the {self.epochs} epochs. Received: {self.unfreeze_at_epoch}."
            )

    @property
    def attack(self) -> AttackConfig:
        """The attack that training uses."""
        default = 2.5 * self.epsilon / max(self.attack_steps, 1)
        return AttackConfig(
            norm=self.norm,
            epsilon=self.epsilon,
            step_size=default if self.attack_step_size is None else self.attack_step_size,
            steps=self.attack_steps,
            random_start=self.random_start,
            use_best=self.use_best,
        )

    @property
    def evaluation_attack(self) -> AttackConfig:
        """The attack of the final figures. Source of the step size: MadryLab/robustness, README."""
        epsilon = self.epsilon if self.eval_epsilon is None else self.eval_epsilon
        step_size = 2.5 * epsilon / max(self.eval_steps, 1)
        return AttackConfig(norm=self.norm, epsilon=epsilon, step_size=step_size, steps=self.eval_steps)

    @property
    def multipliers(self) -> dict[str, float]:
        """Stage -> learning-rate multiplier."""
        pairs = {}
        for item in self.learning_rate_multipliers:
            stage, separator, factor = item.partition("=")
            if not separator:
                raise UserError(f"--learning_rate_multipliers takes stage=factor pairs. Received: {item!r}.")
            pairs[stage] = parse_number(factor)
        return pairs

    def differences(self, other: "JobConfig") -> list[str]:
        """Flags that make `other` another job than this one, as "--name: this one's -> the other's"."""
        return [
            f"--{field.name}: {to_text(getattr(self, field.name))} -> {to_text(getattr(other, field.name))}"
            for field in dataclasses.fields(self)
            if field.metadata["identity"] and getattr(self, field.name) != getattr(other, field.name)
        ]


def read_flag_file(path: pathlib.Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that a flag file describes, with further flags that win over it.

    Args:
        path: a flag file as absl reads it.
        overrides: flags such as "--epsilon=0".

    Raises:
        UserError: the file is missing, names an unknown flag or holds a bad value.
    """
    if not path.is_file():
        raise UserError(f"There is no flag file {path}.")
    try:
        config, rest = parse_flags(JobConfig, ["train", f"--flagfile={path}", *overrides])
    except UserError as error:
        raise UserError(f"Flag file {path}: {error}") from error
    if rest:
        raise UserError(f"Flag file {path}: everything is a flag, --name=value. Received: {rest[0]!r}.")
    return config


def check_choices(config: Any) -> None:
    """Checks every field of a dataclass of flags that is a Literal.

    Raises:
        UserError: another value than those listed there; suggests the nearest.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if typing.get_origin(hints[field.name]) is Literal:
            _check_choice(f"--{field.name}", getattr(config, field.name), hints[field.name])


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in typing.get_args(choices):
        raise unknown_name(f"value of {name}", value, typing.get_args(choices))


def _check_range(name: str, value: float, *, lowest: float) -> None:
    if not lowest <= value < math.inf:  # nor is NaN
        raise UserError(f"--{name} must be {lowest} or more. Received: {value}.")
