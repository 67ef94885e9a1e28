"""Every flag of the training job, as one frozen dataclass that checks itself (`checks` holds the rules).

The fields of `JobConfig` are the flags: name, default and help stand here and nowhere else. Everything inside the
package takes these dataclasses or plain arguments, never flags.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from robust_tf.config.attack import AttackConfig, AttackMode, Norm
from robust_tf.config.checks import check_choices, check_job
from robust_tf.errors import UserError
from robust_tf.flags import flag, parse_flags, parse_number, to_text

# PGD steps of the validation attack where training's own attack has one gradient step only.
_VALIDATION_STEPS = 3
TransferMode = Literal["fixed_feature", "full_network", "partial"]
Exif = Literal["ignore", "apply"]
AlphaBackground = Literal["none", "white", "black"]


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
    plan_devices: tuple[str, ...] = _flag(
        (),
        "With --dry_run: also print time, memory and cost on accelerators that need not be here, e.g. "
        "8xA100,4x8xH100,v4-128: N devices, HOSTS x N, or a TPU slice.",
        identity=False,
    )
    plan_utilisation: float = _flag(
        0.35, "With --plan_devices: the share of peak speed or memory bandwidth that is reached.", identity=False
    )
    plan_price: float | None = _flag(None, "With --plan_devices: price of a device for an hour.", identity=False)
    # Data
    dataset: str = _flag(
        "digits", "Name (an unknown one lists the valid ones), tfds:NAME[/config][:version], or folder:/path of images."
    )
    data_dir: str = _flag("", "TFDS folder, also gs://bucket/folder. Default: TFDS's own.", identity=False)
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
    exif: Exif = _flag("ignore", "EXIF orientation of JPEG images: apply it, as viewers do, or ignore it.")
    alpha_background: AlphaBackground = _flag(
        "none", "Color behind transparent images. none: the network sees the colors stored under transparent pixels."
    )
    examples_per_class: int | None = _flag(None, "Few-shot: train on so many examples of each class.")
    subset: str = _flag(
        "", "Train on so many images (1000) or such a share (0.1), as equally of all classes as can be."
    )
    skip_bad_images: bool = _flag(False, "Leave out images that cannot be decoded, instead of stopping there.")
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
        "Where the weights come from: path of a .keras, of a PyTorch checkpoint (.ckpt, .pt, .pth, .safetensors), name "
        "of a published model (resnet50_l2_eps3), path of a flag file (its job runs first if its classifier is "
        "missing).",
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
    attack_step_size: float | None = _flag(None, "Default: 2.5 * epsilon / steps; that of --fast.")
    # Three flags without a value until `_fill` gives them one.
    attack_steps: int = _flag(None, "PGD steps in training. Default: 7; that of --fast.")
    random_start: bool = _flag(
        None, "Start the attack at a random point (the paper does not). Default: false; that of --fast."
    )
    use_best: bool = _flag(
        None,
        "Train on each image's worst iterate instead of the last. Default: true; false with TRADES; that of --fast.",
    )
    attack_mode: AttackMode = _flag(
        None,
        "Mode of the network in the attacks of training. inference: BatchNorm uses its moving statistics, as in the "
        "paper's code. training: as in the update, and the attack moves the statistics too, as in the code of Wong et "
        "al. Default: inference; that of --fast.",
    )
    objective: Literal["adversarial", "trades", "awp", "trades_awp"] = _flag(
        "adversarial",
        "What training minimises. adversarial: the loss of adversarial images (Madry et al. 2018). trades: that of "
        "clean images + beta * KL(clean || adversarial) (Zhang et al. 2019). awp, trades_awp: the same at the worst "
        "weights nearby (adversarial weight perturbation, Wu et al. 2020).",
    )
    trades_beta: float = _flag(6.0, "trades: weight of the divergence.")
    awp_gamma: float = _flag(5e-3, "awp: size of the weight perturbation, relative to the weights of each layer.")
    awp_warmup_epochs: float = _flag(0.0, "awp: epochs before the first weight perturbation.")
    fast: Literal["none", "fgsm", "free", "epsilon_warmup"] = _flag(
        "none",
        "A cheap recipe, which fills the flags that are not given. fgsm: one step of 1.25 * epsilon from a random "
        "start, and a look for alarms after each epoch (Wong et al. 2020). free: --free_replays steps on each batch "
        "with a perturbation that is kept, and as many times fewer passes over the data than --epochs (Shafahi et al. "
        "2019). epsilon_warmup: PGD with an epsilon that rises from 0.",
    )
    free_replays: int = _flag(4, "free: optimizer steps on each batch.")
    epsilon_warmup_epochs: float | None = _flag(
        None, "epsilon_warmup: epochs over which epsilon and the step size rise. Default: half of --epochs."
    )
    eval_epsilon: float | None = _flag(None, "Radius of the evaluation attack. Default: --epsilon.")
    eval_steps: int = _flag(20, "PGD steps of the evaluation attack; its step size is 2.5 * epsilon / steps.")
    on_alarm: Literal["warn", "stop", "rollback"] = _flag(
        "warn",
        "When training has stopped making the network robust: warn only; stop, and keep "
        "the best epoch before; or rollback: go on from the epoch before with a tenth of the learning rate, at most 3 "
        "times, then stop.",
    )
    alarm_every_epochs: int = _flag(
        1,
        "Epochs between two looks for alarms (FGSM against PGD, PGD against Square, zero gradients, on 64 validation "
        "images).",
    )
    # Optimisation
    epochs: int = _flag(10, "Passes over the training part; with --fast=free the replays count.")
    batch_size: int = _flag(128, "Images a step.")
    optimizer: Literal["sgd", "adam", "adamw"] = _flag(
        "sgd", "sgd: PyTorch's, coupled weight decay; adamw: decoupled weight decay."
    )
    learning_rate: float = _flag(0.1, "Peak learning rate.")
    base_batch_size: int | None = _flag(
        None,
        "The batch that --learning_rate is meant for; it is scaled linearly to --batch_size x --accumulate_steps. "
        "Default: nothing scales it, however many devices there are.",
    )
    lr_schedule: Literal["constant", "step", "piecewise", "cosine", "cyclic"] = _flag("step", "How it changes.")
    lr_step_epochs: int = _flag(50, "step: epochs between the drops.")
    lr_milestones: tuple[int, ...] = _flag((), "piecewise: epochs at which it drops, e.g. 30,60.")
    lr_decay: float = _flag(0.1, "step, piecewise: factor of a drop.")
    lr_peak: float = _flag(4 / 15, "cyclic: where the peak lies, as a share of all steps; 0 on both ends.")
    warmup_epochs: float = _flag(0.0, "Linear rise from 0 at the start, for every schedule.")
    momentum: float = _flag(0.9, "sgd: momentum.")
    weight_decay: float = _flag(5e-4, "Weight decay on all weights, BatchNorm and biases included.")
    clip_norm: float = _flag(0.0, "The gradient of all weights is scaled down to at most this L2 norm; 0 leaves it.")
    accumulate_steps: int = _flag(
        1,
        "The weights move once in so many steps, by the mean gradient: as with a batch so many times as large, but for "
        "BatchNorm's statistics. What an epoch leaves over goes into the next one.",
    )
    ema_decay: float = _flag(
        0.0, "Keep a moving average of the weights, e.g. 0.999, and validate, save and export that; 0 keeps none."
    )
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = _flag("float32", "Of the layers.")
    jit_compile: Literal["auto", "true", "false"] = _flag("auto", "XLA; auto leaves it off on CPU, where it is slow.")
    select_by: Literal["auto", "accuracy", "robust_accuracy", "last"] = _flag(
        "auto", "Validation figure that chooses the epoch; auto: robust_accuracy if trained with an attack."
    )
    patience: int = _flag(
        0, "Stop after so many epochs without a better validation figure (that of --select_by); 0 never stops early."
    )
    class_weight: Literal["none", "balanced"] = _flag(
        "none",
        "balanced: in the loss, of validation as well, an image counts in inverse proportion to the number of training "
        "images of its class, 1 on average. Accuracies stay unweighted.",
    )
    # Distribution
    distribution: Literal["none", "mirrored", "multi_worker", "tpu"] = _flag(
        "none",
        "none: one device; mirrored: all of this machine; multi_worker: those of all machines in TF_CONFIG; tpu. They "
        "share a batch, so the other flags stay as they are; a smaller last batch is left out.",
        identity=False,
    )
    sync_batchnorm: bool = _flag(
        False, "BatchNorm takes the statistics of the whole batch, not of each device's share."
    )
    restarts: int = _flag(
        3, "multi_worker: how often a process begins again by itself, after it has lost another one.", identity=False
    )
    # Output
    checkpoint_every_minutes: float = _flag(
        10.0, "Save the state so often within an epoch, besides at its end; 0 never.", identity=False
    )
    checkpoint_every_steps: int | None = _flag(None, "Save the state every so many steps as well.", identity=False)
    profile_steps: tuple[int, ...] = _flag(
        (), "Record these steps of this run for TensorBoard's Profile tab: first,last, e.g. 10,15.", identity=False
    )
    log_every_steps: int = _flag(10, "Steps between two points in TensorBoard's step charts.", identity=False)
    export_dir: str = _flag("", "Publish a SavedModel version below this folder when done.", identity=False)
    model_name: str = _flag("", "Name to serve under. Default: the workdir's name.", identity=False)
    baseline: bool = _flag(False, "Also run the job from the standard twin of --source, and compare.", identity=False)

    def __post_init__(self) -> None:
        check_choices(self)
        self._fill()
        check_job(self)

    def _fill(self) -> None:
        """Gives the flags that `fast` and `objective` decide their values, unless they have one.

        The random start of l2 stays on the sphere: nearly all of a ball of so many dimensions lies there.
        """
        usual = {
            "attack_steps": 7,
            "random_start": False,
            "use_best": not self.uses_trades,
            "attack_mode": "inference",
        }
        one_step = {"attack_steps": 1, "use_best": False}
        presets: dict[str, dict[str, Any]] = {
            "none": {},
            "fgsm": {
                **one_step,
                "attack_step_size": 1.25 * self.epsilon,
                "random_start": True,
                "attack_mode": "training",
            },
            "free": {**one_step, "attack_step_size": self.epsilon},
            "epsilon_warmup": {"epsilon_warmup_epochs": self.epochs / 2},
        }
        for name, value in {**usual, **presets[self.fast]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # a frozen dataclass, but not before it is made

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
    def validation_attack(self) -> AttackConfig:
        """The attack after each epoch: training's own with the whole epsilon, or PGD where that has one gradient step.

        Under the one step that it was trained with, a network that has overfitted to it looks best.
        """
        if self.fast not in ("fgsm", "free"):
            return self.attack
        step_size = 2.5 * self.epsilon / _VALIDATION_STEPS
        return AttackConfig(norm=self.norm, epsilon=self.epsilon, step_size=step_size, steps=_VALIDATION_STEPS)

    @property
    def uses_trades(self) -> bool:
        return self.objective in ("trades", "trades_awp")

    @property
    def uses_awp(self) -> bool:
        return self.objective in ("awp", "trades_awp")

    @property
    def replays(self) -> int:
        """Optimizer steps on each batch."""
        return self.free_replays if self.fast == "free" else 1

    @property
    def passes(self) -> int:
        """Passes over the training part: what the program counts as epochs."""
        return math.ceil(self.epochs / self.replays)

    @property
    def gradients_per_image(self) -> float:
        """Forward and backward passes for each image in one pass over the training part, on average."""
        if self.fast == "free":
            return self.free_replays
        of_loss = 2.0 if self.uses_trades else 1.0
        if self.uses_awp:  # once more, for the weight perturbation
            of_loss *= 2 - self.awp_warmup_epochs / self.epochs
        return of_loss + (self.attack.steps if self.attack.active else 0)

    def standard_twin(self) -> "JobConfig":
        """The same job without an attack in training, measured under the same one."""
        recipe = [
            *("objective", "trades_beta", "awp_gamma", "awp_warmup_epochs"),
            *("fast", "free_replays", "epsilon_warmup_epochs", "attack_mode"),
        ]
        return dataclasses.replace(
            self,
            epsilon=0.0,
            eval_epsilon=self.evaluation_attack.epsilon,
            on_alarm="warn",
            select_by="accuracy" if self.select_by == "robust_accuracy" else self.select_by,
            **{name: getattr(JobConfig, name) for name in recipe},
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
