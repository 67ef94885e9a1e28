"""A study: a grid of transfer jobs. Its flags, the axes of the grid, and the checks of both, without TensorFlow.

An axis is written `--vary="NAME=VALUE VALUE ..."`, with spaces between the values. NAME is a flag of the transfer job,
or `source.` and a flag of the job that trains the source.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from robust_tf.config.checks import check_choices, check_ranges
from robust_tf.config.job import JobConfig
from robust_tf.config.run import PlanConfig
from robust_tf.errors import UserError, unknown_name
from robust_tf.flags import ParsedFlags, flag, flat_fields, parse_values, record

Launcher = Literal["none", "slurm", "kubernetes"]
Stale = Literal["refuse", "rerun", "keep"]
SOURCE_PREFIX = "source."
# What an axis can never vary, with the reason.
_NOT_AXES = {
    "workdir": "each cell has its own folder in the study's --workdir",
    "task": "the cells of a study are transfers",
    "task_type": "a study compares the accuracies of classifiers",
    "dry_run": "it is for the whole study",
    "baseline": "the study compares sources itself: add a source with epsilon 0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study varies, and how its cells are run. See `--help` for each field.

    Example:
        >>> StudyConfig(vary=("seed=0 1 2",), workers=2).launcher
        'none'
    """

    vary: tuple[str, ...] = flag(
        (),
        'Axis of the grid, such as --vary="examples_per_class=5 10 20": a flag of the job with several values and '
        "spaces between them. source.FLAG varies a flag of the source's job. Give it once for each axis.",
        repeated=True,
    )
    choose: tuple[str, ...] = flag(
        (),
        "Axis, written as in --vary, whose best value the validation part chooses. Only the chosen cell enters the "
        "statistics. Give it once for each axis.",
        repeated=True,
    )
    also: tuple[str, ...] = flag(
        (), "Flag files with further grids, each with its own flags and axes, whose cells belong to this study."
    )
    workers: int = flag(1, "Number of processes that run cells. Each has an equal share of the processor's cores.")
    launcher: Launcher = flag(
        "none",
        "Who runs the cells. none: this program. slurm, kubernetes: a cluster; the program only writes the files of an "
        "array job into the folder launch/ of the workdir.",
    )
    launcher_image: str = flag(
        "registry.example/robust_tf:latest", "Container image that --launcher=kubernetes writes into its files."
    )
    retry_failed: bool = flag(False, "Run the cells and sources again that failed before.")
    stale: Stale = flag(
        "refuse",
        "What happens to cells and sources that were run with other flags than now. refuse: the study stops and names "
        "them. rerun: they are deleted and run again. keep: they count as they are.",
    )
    only_source: int | None = flag(None, "Run just the source with this number, for an element of an array job.")
    only_cell: int | None = flag(None, "Run just the cell with this number, for an element of an array job.")
    advise: bool = flag(
        False,
        "Run nothing; rank the sources of the study for --dataset by cheap probes. If there are none, the published "
        "models on this machine are ranked. Without --dataset, check on a finished study how good such advice is.",
    )
    collect: bool = flag(False, "Run nothing; only write cells.csv, the statistics and the report.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, ("workers",), lowest=1)
        check_ranges(self, ("only_source", "only_cell"), lowest=0)
        modes = [name for name in ("only_source", "only_cell") if getattr(self, name) is not None]
        modes += ["advise"] * self.advise + ["collect"] * self.collect + ["launcher"] * (self.launcher != "none")
        if len(modes) > 1:
            raise UserError(f"A study does one thing at a time. Received: --{' and --'.join(modes)}. Leave out one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ProgramFlags:
    """All flags of the program; only their names, types and texts are used."""

    study: StudyConfig = record(StudyConfig, "Study")
    job: JobConfig = record(JobConfig, "Job")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """A flag with its values on one axis of a grid.

    Attributes:
        name: Name of the flag, with the prefix "source." for a flag of the source's job.
        texts: Values as they were written.
        values: For each value, the flags that it sets: one, or all of a flag file.
        chosen: Whether the validation part chooses the best value.
    """

    name: str
    texts: tuple[str, ...]
    values: tuple[Mapping[str, Any], ...]
    chosen: bool = False

    @property
    def of_source(self) -> bool:
        """Whether the flag belongs to the job of the source."""
        return self.name.startswith(SOURCE_PREFIX)

    @property
    def flags(self) -> frozenset[str]:
        """The flags that vary on this axis, with the prefix for those of the source."""
        prefix = SOURCE_PREFIX if self.of_source else ""
        return frozenset(prefix + name for values in self.values for name in values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig:
    """One grid of a study.

    Attributes:
        fixed: Flags of the transfer job that are the same in all cells of the grid.
        axes: What varies. The first axis varies slowest.
    """

    fixed: Mapping[str, Any]
    axes: tuple[Axis, ...]


def parse_axis(text: str, *, chosen: bool = False) -> Axis:
    """Reads an axis and checks its values as those of any flag.

    Args:
        text: Name of a flag, an equals sign, and values with spaces between them.
        chosen: Whether the validation part chooses the best value.

    Raises:
        UserError: The flag is unknown, a value has the wrong type, is missing, or occurs twice.

    Example:
        >>> parse_axis("source.epsilon=0 8/255").values
        ({'epsilon': 0.0}, {'epsilon': 0.03137254901960784})
    """
    option = "choose" if chosen else "vary"
    name, equals, rest = text.partition("=")
    name, texts = name.strip().removeprefix("--"), tuple(rest.split())
    if not equals or not name or not texts:
        raise UserError(
            f'An axis is the name of a flag, "=" and values with spaces between them. Received: --{option}={text!r}. '
            f'Write, for example, --{option}="examples_per_class=5 10 20".'
        )
    flag_name = name.removeprefix(SOURCE_PREFIX)
    names = [field.name for field in flat_fields(JobConfig)] + ["flagfile"]
    if flag_name not in names:
        raise unknown_name(f"flag in --{option}={text!r}", flag_name, names)
    if flag_name in _NOT_AXES:
        raise UserError(f"--{flag_name} cannot be an axis: {_NOT_AXES[flag_name]}. Received: --{option}={text!r}.")
    values = []
    for value in texts:
        try:
            parsed = parse_values(JobConfig, ["study", f"--{flag_name}={value}"])
        except UserError as error:
            raise UserError(f"--{option}={text!r}: {error}") from error
        values.append({each: parsed.values[each] for each in sorted(parsed.given - set(_NOT_AXES))})
    for position, each in enumerate(values):
        if each in values[:position]:
            raise UserError(
                f"The values of an axis must differ. Received twice: {texts[position]} in --{option}={text!r}."
            )
    return Axis(name=name, texts=texts, values=tuple(values), chosen=chosen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its flags describe it.

    Attributes:
        config: How the study is run.
        workdir: Folder of the study; empty if it was left out.
        plan: Whether to print the plan only, and for which devices.
        grids: The grid of the command, and those of `--also`.
    """

    config: StudyConfig
    workdir: str
    plan: PlanConfig
    grids: tuple[GridConfig, ...]


def parse_study(argv: Sequence[str], usage: str = "") -> Study:
    """Reads a study from the arguments of the program.

    Args:
        argv: Name of the program and its arguments.
        usage: Text that `--help` prints above the flags.

    Raises:
        UserError: A flag or an axis is unknown or has a wrong value, or a flag is both fixed and varied.

    Example:
        >>> study = parse_study(["study", "--source=a.keras", "--vary=seed=0 1"])
        >>> [axis.texts for axis in study.grids[0].axes]
        [('0', '1')]
    """
    parsed = parse_values(_ProgramFlags, argv, usage)
    config = StudyConfig(**{name: parsed.values[name] for name in _study_names()})
    shared = {name: parsed.values[name] for name in parsed.given & _shared_names()}
    grids = [_grid(parsed, "the command")]
    for path in config.also:
        if not pathlib.Path(path).is_file():
            raise UserError(f"--also names the flag file of a further grid. Received: {path}, which is no file.")
        try:
            further = parse_values(_ProgramFlags, ["study", f"--flagfile={path}"])
        except UserError as error:
            raise UserError(f"--also={path}: {error}") from error
        grid = _grid(further, path)
        grids.append(dataclasses.replace(grid, fixed={**shared, **grid.fixed}))
    plan = PlanConfig(**{name: parsed.values[name] for name in _plan_names()})
    return Study(config=config, workdir=parsed.values["workdir"], plan=plan, grids=tuple(grids))


def _study_names() -> list[str]:
    return [field.name for field in flat_fields(StudyConfig)]


def _plan_names() -> set[str]:
    return {field.name for field in flat_fields(PlanConfig)}


def _shared_names() -> frozenset[str]:
    """Flags that say where and how a job runs, not what it is; the command gives them for all grids."""
    found = {field.name for field in flat_fields(JobConfig) if not field.metadata.get("identity", True)}
    return frozenset(found - set(_NOT_AXES) - _plan_names() - {"source"})


def _grid(parsed: ParsedFlags, where: str) -> GridConfig:
    if parsed.rest:
        raise UserError(f"This program takes flags only, --name=value. Received: {parsed.rest[0]!r}.")
    study_names = set(_study_names())
    fixed = {name: parsed.values[name] for name in sorted(parsed.given - study_names - {"workdir"} - _plan_names())}
    if fixed.setdefault("task", "transfer") != "transfer":
        raise UserError(f"The cells of a study are transfers. Received: --task={fixed['task']} in {where}.")
    if fixed.get("baseline"):
        raise UserError(f"--baseline cannot be used here: {_NOT_AXES['baseline']}. Received: --baseline in {where}.")
    if fixed.get("task_type", "classification") != "classification":
        raise UserError(
            f"--task_type cannot be used here: {_NOT_AXES['task_type']}. Received: --task_type={fixed['task_type']} in "
            f"{where}. Run robust_tf.train with several seeds instead."
        )
    axes = [parse_axis(text) for text in parsed.values["vary"]]
    axes += [parse_axis(text, chosen=True) for text in parsed.values["choose"]]
    seen = {name: "as a flag" for name in fixed}
    for axis in axes:
        for name in sorted(axis.flags):
            if name in seen:
                raise UserError(
                    f"A flag has one value or one axis. Received twice in {where}: {name}, {seen[name]} and in the "
                    f"axis {axis.name}. Leave out one of them."
                )
            seen[name] = f"in the axis {axis.name}"
    return GridConfig(fixed=fixed, axes=tuple(axes))
