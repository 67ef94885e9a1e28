"""The cells of a study and the jobs of their sources, made from its grids. Nothing here imports TensorFlow."""

import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from robust_tf.config.job import JobConfig
from robust_tf.config.study import SOURCE_PREFIX, Axis, GridConfig, Study
from robust_tf.errors import UserError
from robust_tf.flags import flat_fields, flat_values, from_flat_values, parse_values, to_text

SOURCES, CELLS_FOLDER = "sources", "cells"
CLASSIFIER = "classifier.keras"
ERROR = "error.txt"
_LONGEST_NAME = 120
# Architecture of a job that names none.
_DEFAULT_ARCHITECTURE = "resnet20"
# Columns of cells.csv that every cell has.
_ALWAYS = {"dataset", "classes", "transfer_mode", "examples_per_class", "seed", "source", "workdir"}
_ALWAYS_OF_SOURCE = {"architecture", "norm", "epsilon", "dataset", "classes", "seed"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRun:
    """A source that the study trains.

    Attributes:
        name: Name of its folder in sources/.
        job: The training job.
    """

    name: str
    job: JobConfig

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of the job."""
        return pathlib.Path(self.job.run.workdir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellRun:
    """A cell: one transfer job at its place in the grid.

    Attributes:
        name: Name of its folder in cells/.
        job: The transfer job.
        source: The source that the study trains first; None for a file or a published model.
        varied: Values of the flags that vary and have no fixed column in cells.csv, by the names of their columns.
        chosen_by: Columns of `varied`, or flags, among whose values the validation part chooses.
    """

    name: str
    job: JobConfig
    source: SourceRun | None
    varied: Mapping[str, str]
    chosen_by: tuple[str, ...]

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of the job."""
        return pathlib.Path(self.job.run.workdir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Everything that a study runs.

    Attributes:
        workdir: Folder of the study.
        sources: Each source once, in the order in which the cells need them.
        cells: The cells in the order of the grids.
        merged: Number of places of the grids that are the same cell as another, because a source at epsilon 0 is the
            same for all norms or because two grids overlap.
    """

    workdir: pathlib.Path
    sources: tuple[SourceRun, ...]
    cells: tuple[CellRun, ...]
    merged: int


@dataclasses.dataclass
class _Builder:
    """Collects the cells and sources of the grids."""

    workdir: pathlib.Path
    columns: frozenset[str]
    sources: dict[tuple[Any, ...], SourceRun] = dataclasses.field(default_factory=dict)
    cells: dict[tuple[Any, ...], CellRun] = dataclasses.field(default_factory=dict)
    names: set[str] = dataclasses.field(default_factory=set)
    merged: int = 0

    def add(self, grid: GridConfig) -> None:
        bases: dict[str, Mapping[str, Any]] = {}
        places: dict[tuple[Any, ...], tuple[int, ...]] = {}
        for place in itertools.product(*(range(len(axis.texts)) for axis in grid.axes)):
            chosen = list(zip(grid.axes, place, strict=True))
            values = dict(grid.fixed)
            source_values: dict[str, Any] = {}
            for axis, index in chosen:
                (source_values if axis.of_source else values).update(axis.values[index])
            where = ", ".join(f"{axis.name}={axis.texts[index]}" for axis, index in chosen) or "the only cell"
            try:
                key = self._add_cell(grid.axes, chosen, values, source_values, bases)
            except UserError as error:
                raise UserError(f"Cell with {where}: {error}") from error
            if key in places and not _only_sources_differ(grid.axes, places[key], place):
                other = ", ".join(
                    f"{axis.name}={axis.texts[index]}" for axis, index in zip(grid.axes, places[key], strict=True)
                )
                raise UserError(
                    f"Two cells of the grid are the same job. Received: {other} and {where}. Leave out the values that "
                    "change nothing."
                )
            places.setdefault(key, place)

    def _add_cell(
        self,
        axes: Sequence[Axis],
        chosen: Sequence[tuple[Axis, int]],
        values: dict[str, Any],
        source_values: Mapping[str, Any],
        bases: dict[str, Mapping[str, Any]],
    ) -> tuple[Any, ...]:
        origin = values.get("source", "none")
        source = None
        if pathlib.Path(origin).suffix == ".cfg":
            if origin not in bases:
                bases[origin] = _flag_file(origin)
            base = {**bases[origin], **source_values}
            base.setdefault("data_dir", values.get("data_dir", ""))
            source = self._source(base, [axis for axis, _ in chosen if axis.of_source])
            values["source"] = str(source.workdir / CLASSIFIER)
        elif source_values:
            raise UserError(
                "Flags of the source vary only where --source is a flag file, whose job is run. Received: "
                f"--source={origin} with {SOURCE_PREFIX}{min(source_values)}."
            )
        values.setdefault("outputs", "results")  # a study of hundreds of cells has one report for all
        job = from_flat_values(JobConfig, values)
        _check_cell(job)
        key = _identity(job)
        if key in self.cells:
            self.merged += 1
            return key
        name = _cell_name(job, source.name if source else pathlib.PurePath(origin).stem, chosen)
        if name in self.names:  # of a cell of another grid with other fixed flags
            portable = [value for each, value in zip(_identity_names(), key, strict=True) if each != "source"]
            name = f"{name}-{hashlib.sha256(repr(portable).encode()).hexdigest()[:8]}"
        self.names.add(name)
        of_cell, of_source = flat_values(job), flat_values(source.job) if source else {}
        varied = {}
        for flag in sorted(self.columns):
            flags = of_source if flag.startswith(SOURCE_PREFIX) else of_cell
            value = flags.get(flag.removeprefix(SOURCE_PREFIX))
            varied[flag.replace(SOURCE_PREFIX, "source_")] = "" if value is None else to_text(value)
        self.cells[key] = CellRun(
            name=name,
            job=job.with_flags(workdir=str(self.workdir / CELLS_FOLDER / name)),
            source=source,
            varied=varied,
            chosen_by=tuple(sorted(flag for axis in axes if axis.chosen for flag in axis.flags)),
        )
        return key

    def _source(self, values: Mapping[str, Any], axes: Sequence[Axis]) -> SourceRun:
        job = from_flat_values(JobConfig, {**values, "workdir": ""})
        if job.is_transfer:
            raise UserError("The flag file of a source describes its pretraining. Received: --task=transfer in it.")
        if job.run.outputs == "results":
            raise UserError(
                "The job of a source has to keep its classifier. Received: --outputs=results for a source. Leave the "
                "flag out of the source's flag file."
            )
        standard = job.adversarial.epsilon == 0
        if standard:
            job = job.standard_twin()
        # Without an attack in training the norm changes nothing, so one source serves all norms.
        key = _identity(job.with_flags(norm="l2") if standard else job)
        if key not in self.sources:
            name = _source_name(job, axes)
            if name in {source.name for source in self.sources.values()}:
                name = f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"
            self.sources[key] = SourceRun(name=name, job=job.with_flags(workdir=str(self.workdir / SOURCES / name)))
        return self.sources[key]


def _check_cell(job: JobConfig) -> None:
    """Refuses what `robust_tf.train` does besides a single job, since a cell would leave it out silently."""
    received = {
        "--baseline": job.transfer.baseline,
        f"--draws={job.transfer.draws}": job.transfer.draws > 1,
        f"--export_dir={job.run.export_dir}": bool(job.run.export_dir),
    }
    if any(received.values()):
        raise UserError(
            "A cell is a single job, without a baseline, further draws or an export. Received: "
            f"{' '.join(flag for flag, is_set in received.items() if is_set)}. Use --vary=source.epsilon=0 1 instead "
            "of --baseline, --vary=seed=0 1 2 instead of --draws, and robust_tf.export for an export."
        )


def plan_study(study: Study) -> StudyPlan:
    """Returns the cells of a study and the sources to train for them, with names that depend on nothing but the flags.

    Args:
        study: The study. Its workdir must be set.

    Raises:
        UserError: The flags of a cell or of a source do not go together, or two cells of a grid are the same job.

    Example:
        >>> from robust_tf.config.study import parse_study
        >>> argv = ["study", "--workdir=w", "--source=a.keras", "--dataset=digits", "--vary=seed=0 1"]
        >>> [cell.name for cell in plan_study(parse_study(argv)).cells]
        ['a_digits_fixed_feature_seed0', 'a_digits_fixed_feature_seed1']
    """
    varied = {flag for grid in study.grids for axis in grid.axes for flag in axis.flags}
    always = _ALWAYS | {SOURCE_PREFIX + name for name in _ALWAYS_OF_SOURCE}
    builder = _Builder(workdir=pathlib.Path(study.workdir), columns=frozenset(varied - always))
    for grid in study.grids:
        builder.add(grid)
    return StudyPlan(
        workdir=builder.workdir,
        sources=tuple(builder.sources.values()),
        cells=tuple(builder.cells.values()),
        merged=builder.merged,
    )


def _flag_file(path: str) -> dict[str, Any]:
    if not pathlib.Path(path).is_file():
        raise UserError(f"There is no flag file {path}. Received: --source={path}.")
    try:
        parsed = parse_values(JobConfig, ["train", f"--flagfile={path}"])
    except UserError as error:
        raise UserError(f"Flag file {path}: {error}") from error
    return {name: parsed.values[name] for name in parsed.given}


def _only_sources_differ(axes: Sequence[Axis], first: Sequence[int], second: Sequence[int]) -> bool:
    return all(axis.of_source or one == other for axis, one, other in zip(axes, first, second, strict=True))


def _identity_names() -> list[str]:
    return [field.name for field in flat_fields(JobConfig) if field.metadata.get("identity", True)]


def _identity(job: JobConfig) -> tuple[Any, ...]:
    values = flat_values(job.resolved())
    return tuple(values[name] for name in _identity_names())


def _source_name(job: JobConfig, axes: Sequence[Axis]) -> str:
    adversarial = job.adversarial
    parts = [job.transfer.architecture or _DEFAULT_ARCHITECTURE]
    parts += [f"{adversarial.norm}_eps{adversarial.epsilon:.4g}" if adversarial.epsilon else "eps0"]
    parts += [_dataset_text(job.data.dataset)]
    values = flat_values(job)
    flags = {flag.removeprefix(SOURCE_PREFIX) for axis in axes for flag in axis.flags}
    shown = {"architecture", "norm", "epsilon", "dataset", "seed"}
    parts += [f"{flag}-{_slug(to_text(values[flag]))}" for flag in sorted(flags - shown)]
    return _shortened("_".join([*parts, f"seed{job.run.seed}"]))


def _cell_name(job: JobConfig, source: str, chosen: Sequence[tuple[Axis, int]]) -> str:
    parts = [_slug(source), _dataset_text(job.data.dataset), job.transfer.transfer_mode]
    if job.data.examples_per_class is not None:
        parts.append(f"n{job.data.examples_per_class}")
    shown = {"source", "dataset", "transfer_mode", "examples_per_class", "seed"}
    for axis, index in chosen:
        if not axis.of_source and axis.name not in shown:
            text = axis.texts[index]
            parts.append(f"{axis.name}-{_slug(pathlib.PurePath(text).stem if axis.name == 'flagfile' else text)}")
    return _shortened("_".join([*parts, f"seed{job.run.seed}"]))


def _dataset_text(dataset: str) -> str:
    kind, colon, rest = dataset.partition(":")
    return _slug(pathlib.PurePath(rest).name if colon and kind == "folder" else dataset)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.,_+-]+", "-", text).strip("-") or "none"


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
