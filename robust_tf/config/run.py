"""Where and how a job runs, what it writes, and how it is planned: two records that check themselves."""

import dataclasses
import math
import pathlib
from typing import Literal

from robust_tf.config.checks import check_choices, check_default, check_local_folders, check_ranges
from robust_tf.errors import UserError
from robust_tf.flags import flag, to_text

DistributionKind = Literal["none", "mirrored", "multi_worker", "tpu"]
OutputKind = Literal["all", "classifier", "results"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run of a job: its seed, devices, checkpoints and outputs. See `--help` for each field.

    Example:
        >>> RunConfig(workdir="runs/pets", export_dir="exports").served_name
        'pets'
    """

    workdir: str = flag(
        "",
        "Folder for everything that the job writes. If it is left out, runs/<name of the flag file> is used.",
        identity=False,
    )
    seed: int = flag(
        0, "Seed for the initial weights, the order of the images, augmentation, few-shot selection and random starts."
    )
    deterministic: bool = flag(
        False,
        "Use deterministic kernels only, so that repeated runs are bit-equal, with XLA as well as without. This is "
        "slower on a GPU.",
    )
    distribution: DistributionKind = flag(
        "none",
        "Devices that share each batch. none: one device. mirrored: all devices of this machine. multi_worker: the "
        "devices of all machines in TF_CONFIG. tpu: a TPU slice. The other flags keep their meaning, except that an "
        "incomplete last batch is left out.",
        identity=False,
    )
    sync_batchnorm: bool = flag(
        False, "Let BatchNorm use the statistics of the whole batch instead of each device's share of it."
    )
    restarts: int = flag(
        3,
        "Number of times that a process of --distribution=multi_worker restarts by itself after losing another one.",
        identity=False,
    )
    worker_timeout: float = flag(
        600.0,
        "Seconds that a process of --distribution=multi_worker waits for the others to start, also after a restart, "
        "before it gives up. 0 waits for ever.",
        identity=False,
    )
    checkpoint_every_minutes: float = flag(
        10.0,
        "Minutes between two checkpoints within an epoch, in addition to the one at its end. 0 saves at the end only.",
        identity=False,
    )
    checkpoint_every_steps: int | None = flag(
        None,
        "Number of steps between additional checkpoints within an epoch. By default there are none.",
        identity=False,
    )
    profile_steps: tuple[int, ...] = flag(
        (),
        "First and last step of this run to record for TensorBoard's Profile tab, such as 10,15. By default none are "
        "recorded.",
        identity=False,
    )
    outputs: OutputKind = flag(
        "all",
        "Files of a finished job. all: also the classifier, the report and the logs for TensorBoard. classifier: no "
        "report and no logs. results: only results.json, predictions.csv, history.csv and flags.cfg, for experiments "
        "with many jobs.",
        identity=False,
    )
    log_every_steps: int = flag(10, "Number of steps between two points in TensorBoard's step charts.", identity=False)
    export_dir: str = flag(
        "", "Folder below which the finished classifier is published as a new SavedModel version.", identity=False
    )
    model_name: str = flag(
        "",
        "Name under which the classifier is served. If it is left out, the name of --workdir is used.",
        identity=False,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, ("log_every_steps", "checkpoint_every_steps"), lowest=1)
        check_ranges(self, ("seed", "checkpoint_every_minutes", "restarts", "worker_timeout"), lowest=0)
        steps = self.profile_steps
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise UserError(
                "--profile_steps takes the first and the last step, counted from 1, e.g. 10,15. Received: "
                f"{to_text(steps)}."
            )
        if self.seed >= 2**32:  # the limit of NumPy's global generator
            raise UserError(f"--seed must be below 2**32. Received: {self.seed}.")
        check_local_folders(self, ("workdir", "export_dir"))
        if self.outputs == "results" and self.export_dir:
            raise UserError(
                "--outputs=results keeps no classifier that could be exported. Received: --outputs=results "
                f"--export_dir={self.export_dir}. Use --outputs=all, or leave out --export_dir."
            )
        if self.outputs != "all" and steps:
            raise UserError(
                f"--outputs={self.outputs} keeps no logs for TensorBoard, which a profile is part of. Received: "
                f"--outputs={self.outputs} --profile_steps={to_text(steps)}. Use --outputs=all, or leave out "
                "--profile_steps."
            )

    @property
    def served_name(self) -> str:
        """The name under which the classifier is exported and queried."""
        return self.model_name or pathlib.Path(self.workdir).name


# The default of --plan_utilization until 0.2.0. The flags.cfg of jobs of that time holds it, and must still be read.
_FORMER_UTILIZATION = 0.35


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Whether and for which devices to print the plan of a job. See `--help` for each field.

    Example:
        >>> PlanConfig(dry_run=True, plan_devices=("8xA100",), plan_utilization=0.25).plan_utilization
        0.25
    """

    dry_run: bool = flag(False, "Print the plan of the job and stop, without training.", identity=False)
    plan_devices: tuple[str, ...] = flag(
        (),
        "Accelerators for which --dry_run also estimates time, memory and cost; this machine need not have them. For "
        "example 8xA100,4x8xH100,v4-128: 8 devices, 4 hosts with 8 devices each, and a TPU slice.",
        identity=False,
    )
    plan_utilization: float | None = flag(
        None,
        "Share of the peak speed, or of the memory bandwidth, that --plan_devices assumes a job reaches. By default, "
        "what was measured on a GPU with and without XLA; the plan names it.",
        identity=False,
        formerly="plan_utilisation",
    )
    plan_price: float | None = flag(
        None, "Price of one device for one hour, from which --plan_devices estimates the cost.", identity=False
    )

    def __post_init__(self) -> None:
        if not self.plan_devices and self.plan_utilization == _FORMER_UTILIZATION:
            object.__setattr__(self, "plan_utilization", None)
        if not self.plan_devices:
            check_default(self, ("plan_utilization", "plan_price"), "--plan_devices")
        elif not self.dry_run:
            raise UserError(
                f"--plan_devices is for --dry_run. Received: --plan_devices={to_text(self.plan_devices)} without "
                "--dry_run."
            )
        if self.plan_utilization is not None and not 0 < self.plan_utilization <= 1:
            raise UserError(f"--plan_utilization must be above 0 and at most 1. Received: {self.plan_utilization}.")
        if self.plan_price is not None and not 0 < self.plan_price < math.inf:
            raise UserError(f"--plan_price must be a number above 0. Received: {self.plan_price}.")
