"""The flags of a study: a grid of transfer jobs, and how it is run."""

import dataclasses
from typing import Literal

from robust_tf.config.checks import check_choices, check_ranges
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.flags import flag, record

Launcher = Literal["none", "slurm", "kubernetes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A grid of transfer jobs. The flags of the jobs themselves are those of `JobConfig`. See `--help` for each flag.

    Example:
        >>> study = StudyConfig(vary=("source.epsilon=0 1", "seed=0 1 2"), job=JobConfig(task="pretrain"))
        Traceback (most recent call last):
        ...
        robust_tf.errors.UserError: A study runs transfer jobs. Received: --task=pretrain. Use --task=transfer.
    """

    vary: tuple[str, ...] = flag(
        (),
        "An axis of the grid, and its values with spaces between them: --vary='examples_per_class=5 20 50'. Repeat the "
        "flag for further axes. The name is a flag of the job or, after 'source.', a flag of the job of --source: "
        "--vary='source.epsilon=0 1 2'. --vary='flagfile=a.cfg b.cfg' varies all flags in these files at once.",
        repeated=True,
        heading="Study",
    )
    choose: tuple[str, ...] = flag(
        (),
        "An axis like those of --vary, of which only the value counts that is best on the validation part, such as "
        "--choose='learning_rate=0.1 0.01'. Repeat the flag for further axes.",
        repeated=True,
        heading="Study",
    )
    also: tuple[str, ...] = flag(
        (),
        "Flag files with further grids for the same study, with commas between them. They have their own --vary and "
        "job flags, and share the folder, the sources and the report.",
        heading="Study",
    )
    workers: int = flag(
        1, "Number of processes that run jobs at the same time on this machine. They share its cores.", heading="Study"
    )
    launcher: Launcher = flag(
        "none",
        "slurm and kubernetes write the files of an array job into --workdir instead of running the study.",
        heading="Study",
    )
    retry_failed: bool = flag(False, "Run the cells and sources again that failed before.", heading="Study")
    rerun_changed: bool = flag(
        False,
        "Delete the cells and sources that were run with other flags than the study has now, and run them again.",
        heading="Study",
    )
    advise: bool = flag(
        False,
        "Rank the sources of the study, or the published models, for --dataset by cheap probes instead of running it.",
        heading="Study",
    )
    only: str = flag(
        "",
        "Run one part of the study and stop: source:NUMBER, cell:NUMBER (both from 0) or report. Array jobs use this.",
        heading="Study",
    )
    job: JobConfig = record(JobConfig, "Jobs of the study")

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, ("workers",), lowest=1)
        if not self.advise and not self.job.is_transfer:
            raise UserError(f"A study runs transfer jobs. Received: --task={self.job.task}. Use --task=transfer.")
        if self.job.transfer.baseline:
            raise UserError("A study has its baselines in the grid: --vary='source.epsilon=0 1'. Received: --baseline.")
        if self.job.run.export_dir:
            raise UserError(f"A study exports nothing. Received: --export_dir={self.job.run.export_dir}. Leave it out.")
        if self.job.run.distribution != "none":
            raise UserError(
                "The jobs of a study run on one device each; use --workers for several. Received: "
                f"--distribution={self.job.run.distribution}."
            )
