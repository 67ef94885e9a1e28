"""How a job changes the weights: epochs, batches, optimizer and schedule, as a record that checks itself."""

import dataclasses
import math
from typing import Literal

from robust_tf.config.checks import check_choices, check_ranges
from robust_tf.errors import UserError
from robust_tf.flags import flag, parse_number, to_text

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "step", "piecewise", "cosine", "cyclic"]
Precision = Literal["float32", "mixed_bfloat16", "mixed_float16"]
JitCompile = Literal["auto", "true", "false"]
SelectBy = Literal["auto", "accuracy", "robust_accuracy", "last"]
ClassWeight = Literal["none", "balanced"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """The optimization of a job, and how it chooses the best epoch. See `--help` for each field.

    Example:
        >>> OptimizationConfig(learning_rate=0.1, batch_size=512, base_batch_size=256).peak_learning_rate
        0.2
    """

    epochs: int = flag(
        10,
        "Number of passes over the training images. With --fast=free each replay of a batch counts, so the number of "
        "passes over the data is --free_replays times smaller.",
    )
    batch_size: int = flag(128, "Number of images in a training step, on all devices together.")
    optimizer: OptimizerName = flag(
        "sgd",
        "Optimizer. sgd follows PyTorch: weight decay is part of the gradient. adamw keeps the two separate.",
    )
    learning_rate: float = flag(0.1, "Highest learning rate.")
    base_batch_size: int | None = flag(
        None,
        "Batch size that --learning_rate is meant for. The rate is then scaled in proportion to --batch_size times "
        "--accumulate_steps. By default it is not scaled, however many devices there are.",
    )
    lr_schedule: ScheduleName = flag("step", "How the learning rate changes over training.")
    lr_step_epochs: int = flag(50, "Number of epochs between two drops of the step schedule.")
    lr_milestones: tuple[int, ...] = flag((), "Epochs at which the piecewise schedule drops, such as 30,60.")
    lr_decay: float = flag(0.1, "Factor by which the step and piecewise schedules multiply the rate at each drop.")
    lr_peak: float = flag(
        4 / 15, "Position of the peak of the cyclic schedule, as a share of all steps. The rate is 0 at both ends."
    )
    warmup_epochs: float = flag(
        0.0, "Number of epochs over which the learning rate rises linearly from 0, with any schedule."
    )
    momentum: float = flag(0.9, "Momentum of sgd, or beta_1 of adam and adamw.")
    weight_decay: float = flag(5e-4, "Weight decay of all weights, including those of BatchNorm and the biases.")
    learning_rate_multipliers: tuple[str, ...] = flag(
        (), "Factors on the learning rate by stage, such as stem=0.1,stage1=0.1,head=10. Other stages have 1."
    )
    clip_norm: float = flag(
        0.0, "Largest L2 norm of the gradient of all weights together; a longer one is scaled down. 0 never clips."
    )
    accumulate_steps: int = flag(
        1,
        "Number of steps whose gradients are averaged for one update of the weights, as if the batch were that many "
        "times larger (only BatchNorm's statistics differ). Steps left over at the end of an epoch count in the next "
        "one.",
    )
    ema_decay: float = flag(
        0.0,
        "Decay of a moving average of the weights, such as 0.999. The averaged weights are the ones that are "
        "validated, saved and exported. 0 keeps no average.",
    )
    precision: Precision = flag("float32", "Number format in which the layers compute.")
    tf32: bool = flag(
        True,
        "Let NVIDIA GPUs since Ampere multiply float32 numbers in TF32, as TensorFlow does by default. It rounds the "
        "factors to 10 bits of mantissa, and is faster. With --notf32, results on a GPU equal a CPU's up "
        "to rounding. Nothing changes on a CPU or in half precision.",
    )
    jit_compile: JitCompile = flag(
        "auto",
        "Whether XLA compiles the steps of training, validation and test. auto leaves XLA out on a CPU, where it is "
        "slow. With XLA the last batch of an epoch is filled up with images from the start of the epoch, so that all "
        "batches have one size.",
    )
    select_by: SelectBy = flag(
        "auto",
        "Validation metric that chooses the best epoch. auto: robust_accuracy if training uses an attack, otherwise "
        "the metric of the data set. last: keep the last epoch.",
    )
    patience: int = flag(
        0,
        "Number of epochs without a better validation metric (see --select_by) after which training stops. 0 never "
        "stops early.",
    )
    class_weight: ClassWeight = flag(
        "none",
        "Weights of the classes in the loss, in training and validation. balanced: inversely proportional to the "
        "number of training images of the class, and 1 on average. Accuracies stay unweighted.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, ("epochs", "batch_size", "lr_step_epochs", "accumulate_steps", "base_batch_size"), lowest=1)
        check_ranges(self, ("momentum", "weight_decay", "warmup_epochs", "clip_norm", "patience"), lowest=0)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema_decay must lie in [0, 1). Received: {self.ema_decay}.")
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
            raise UserError(f"--lr_milestones must be epochs from 1 on. Received: {to_text(self.lr_milestones)}.")
        if self.select_by == "last" and self.patience:
            raise UserError(
                "--patience needs a validation figure that chooses the epoch: with --select_by=last every epoch is the "
                f"best so far. Received: --patience={self.patience} --select_by=last. Use --select_by=auto."
            )
        _ = self.multipliers  # checks the pairs

    @property
    def multipliers(self) -> dict[str, float]:
        """Factor on the learning rate by stage.

        Raises:
            UserError: An item is not a stage=factor pair.
        """
        pairs = {}
        for item in self.learning_rate_multipliers:
            stage, separator, factor = item.partition("=")
            if not separator:
                raise UserError(f"--learning_rate_multipliers takes stage=factor pairs. Received: {item!r}.")
            try:
                pairs[stage] = parse_number(factor)
            except UserError as error:
                raise UserError(f"--learning_rate_multipliers: {error}") from None
        return pairs

    @property
    def xla(self) -> bool | Literal["auto"]:
        """`jit_compile` as Keras takes it."""
        return "auto" if self.jit_compile == "auto" else self.jit_compile == "true"

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate, scaled to the batch size if `base_batch_size` is given.

        Source: Goyal et al. 2017, arXiv 1706.02677, the linear scaling rule.
        """
        if self.base_batch_size is None:
            return self.learning_rate
        return self.learning_rate * self.batch_size * self.accumulate_steps / self.base_batch_size
