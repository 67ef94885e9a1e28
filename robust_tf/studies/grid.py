"""The grid of a study: from its axes to the jobs of its sources and cells, without running anything."""

import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.config.study import StudyConfig
from robust_tf.errors import UserError, unknown_name
from robust_tf.flags import flat_fields, from_flat_values, given_flags, to_text

SOURCES, CELLS = "sources", "cells"
# Flags that the study sets for each of its jobs.
_SET_BY_STUDY = ("workdir", "outputs", "dry_run", "plan_devices", "model_name")
_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of the grid.

    Attributes:
        name: Name of the flag, "flagfile" for several flags at once.
        of_source: Whether it is a flag of the source's job.
        is_chosen: Whether only the value counts that is best on the validation part.
        values: Text of each value, and the flags that it sets.
    """

    name: str
    of_source: bool
    is_chosen: bool
    values: tuple[tuple[str, Mapping[str, Any]], ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A source that the study trains.

    Attributes:
        name: Name of its folder in sources/.
        job: Job that trains it.
    """

    name: str
    job: JobConfig


@dataclasses.dataclass(frozen=True)
class PlannedCell:
    """A cell of the grid.

    Attributes:
        name: Name of its folder in cells/.
        job: Transfer job that it runs.
        source: Source that the study trains for it; None for a file or a published model.
        rivals: Names of the cells of which only the one that is best on the validation part counts, this one included.
    """

    name: str
    job: JobConfig
    source: Source | None
    rivals: str


@dataclasses.dataclass(frozen=True)
class Grid:
    """All jobs of a study, in the order in which they run.

    Attributes:
        sources: Sources to train.
        cells: Cells, grouped by their sources.
    """

    sources: tuple[Source, ...]
    cells: tuple[PlannedCell, ...]


def build_grid(arguments: Sequence[str], workdir: pathlib.Path) -> Grid:
    """Returns the sources and cells of a study.

    Args:
        arguments: Arguments of the program without its name, in which `--flagfile` may stand.
        workdir: Folder of the study.

    Raises:
        UserError: An axis is unknown or empty, a value has the wrong type, flags contradict each other, or two cells
            would have the same name.
    """
    cells = _cells_of(arguments, workdir, prefix="")
    for path in given_flags(StudyConfig, ["", *arguments]).get("also", ()):
        if not pathlib.Path(path).is_file():
            raise UserError(f"--also names flag files. Received: {path}, which does not exist.")
        try:
            cells += _cells_of([f"--flagfile={path}"], workdir, prefix=pathlib.Path(path).stem)
        except UserError as error:
            raise UserError(f"Flag file {path}: {error}") from error
    merged: dict[str, PlannedCell] = {}
    for cell in cells:
        same = merged.setdefault(cell.name, cell)
        if different := same.job.differences(cell.job):
            raise UserError(
                f"Two different cells of the study have the same name. Received: {cell.name} twice, with "
                f"{'; '.join(different)}. Vary that flag with --vary, or use another --workdir for one of the grids."
            )
    if not merged:
        raise UserError("The study has no cells.")
    sources = {cell.source.name: cell.source for cell in merged.values() if cell.source}
    order = {name: number for number, name in enumerate(sources)}
    ordered = sorted(merged.values(), key=lambda cell: order.get(cell.source.name, -1) if cell.source else -1)
    return Grid(tuple(sources.values()), tuple(ordered))


def _cells_of(arguments: Sequence[str], workdir: pathlib.Path, *, prefix: str) -> list[PlannedCell]:
    given = given_flags(StudyConfig, ["", *arguments])
    axes = [_axis(text, is_chosen=False) for text in given.get("vary", ())]
    axes += [_axis(text, is_chosen=True) for text in given.get("choose", ())]
    _check_axes(axes)
    names = {field.name for field in flat_fields(JobConfig)}
    fixed = {name: value for name, value in given.items() if name in names}
    for name in _SET_BY_STUDY:
        fixed.pop(name, None)
    sources: dict[tuple[Any, ...], Source] = {}
    cells = []
    for values in itertools.product(*(axis.values for axis in axes)):
        place = list(zip(axes, values, strict=True))
        flags = dict(fixed)
        for axis, (_, set_flags) in place:
            if not axis.of_source:
                flags |= set_flags
        source = _source(flags.get("source", "none"), place, workdir, sources)
        if source is not None:
            flags["source"] = str(pathlib.Path(source.job.run.workdir) / "classifier.keras")
        parts = [prefix] if prefix else []
        parts += [source.name] if source else []
        own = [(axis, text) for axis, (text, _) in place if not axis.of_source]
        name = _name([*parts, *(_part(axis.name, text) for axis, text in own)] or ["cell"])
        rivals = _name([*parts, *(_part(axis.name, text) for axis, text in own if not axis.is_chosen)] or ["cell"])
        cells.append(PlannedCell(name, _job(flags, name, workdir / CELLS / name, kept="results"), source, rivals))
    return cells


def _axis(text: str, *, is_chosen: bool) -> Axis:
    option = "choose" if is_chosen else "vary"
    name, equals, values = text.partition("=")
    name, items = name.strip(), values.split()
    if not equals or not items:
        raise UserError(
            f"--{option} takes a flag and its values with spaces between them, such as --{option}='seed=0 1 2'. "
            f"Received: {text!r}."
        )
    if repeated := sorted({item for item in items if items.count(item) > 1}):
        raise UserError(f"Each value of an axis is given once. Received twice: {repeated[0]!r} in --{option}={text!r}.")
    of_source, name = name.startswith("source."), name.removeprefix("source.")
    if of_source and is_chosen:
        raise UserError(f"--choose takes flags of the transfer job. Received: {text!r}. Use --vary.")
    if name == "flagfile":
        for item in items:
            if not pathlib.Path(item).is_file():
                raise UserError(f"An axis over flag files needs files. Received: {item}, which does not exist.")
    else:
        known = [field.name for field in flat_fields(JobConfig)]
        if name not in known:
            raise unknown_name(f"flag in --{option}", name, [*known, "flagfile"])
        if name in _SET_BY_STUDY:
            raise UserError(f"The study sets --{name} for each of its jobs. Received: --{option}={text!r}.")
    return Axis(
        name, of_source, is_chosen, tuple((item, given_flags(JobConfig, ["", f"--{name}={item}"])) for item in items)
    )


def _check_axes(axes: Iterable[Axis]) -> None:
    seen: set[tuple[bool, str]] = set()
    for axis in axes:
        for name in {name for _, flags in axis.values for name in flags}:
            if (axis.of_source, name) in seen:
                where = "source." if axis.of_source else ""
                raise UserError(f"Two axes set the same flag. Received: {where}{name} in both.")
        seen |= {(axis.of_source, name) for _, flags in axis.values for name in flags}


def _source(
    base: str,
    place: Sequence[tuple[Axis, tuple[str, Mapping[str, Any]]]],
    workdir: pathlib.Path,
    known: dict[Any, Source],
) -> Source | None:
    """Returns the source of a cell if the study trains it. Equal trainings are one source."""
    own = [(axis, text, flags) for axis, (text, flags) in place if axis.of_source]
    if pathlib.Path(base).suffix != ".cfg":
        if own:
            raise UserError(
                f"--vary='source.{own[0][0].name}=...' changes the job of a source, so --source must be its flag file. "
                f"Received: --source={base}."
            )
        return None
    flags: dict[str, Any] = {}
    for _, _, values in own:
        flags |= values
    try:
        job = read_flag_file(pathlib.Path(base)).with_flags(**flags)
    except UserError as error:
        shown = ", ".join(f"source.{axis.name}={text}" for axis, text, _ in own)
        raise UserError(f"The source {base} with {shown or 'its flags'}: {error}") from error
    parts = [(axis.name, text) for axis, text, _ in own]
    if not job.adversarial.training_attack.active:
        # Standard training is the same for both norms.
        parts = [(name, text) for name, text in parts if name not in ("norm", "step_size", "attack_steps")]
    key = (base, tuple(parts))
    if key not in known:
        name = _name([pathlib.Path(base).stem, *(_part(*part) for part in parts)])
        known[key] = Source(name, job.with_flags(workdir=str(workdir / SOURCES / name), export_dir=""))
    return known[key]


def _job(flags: Mapping[str, Any], name: str, workdir: pathlib.Path, *, kept: str) -> JobConfig:
    try:
        return from_flat_values(JobConfig, {**flags, "workdir": str(workdir), "outputs": kept})
    except UserError as error:
        raise UserError(f"Cell {name}: {error}") from error


def _part(name: str, text: str) -> str:
    """Returns a part of a folder's name, such as "epsilon8of255"."""
    if name == "flagfile":
        return pathlib.Path(text).stem
    shown = re.sub(r"[^A-Za-z0-9.,+-]", "-", text.replace("/", "of") if re.fullmatch(r"[\d./]+", text) else text)
    return shown.strip("-") if name in ("architecture", "norm", "transfer_mode", "dataset") else f"{name}{shown}"


def _name(parts: Sequence[str]) -> str:
    name = "_".join(parts)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 11]}_{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def varying_flags(jobs: Sequence[JobConfig]) -> dict[str, list[str]]:
    """Returns the flags that differ between jobs, with the text of each job's value.

    Args:
        jobs: Jobs to compare, by their resolved flags.
    """
    resolved = [job.resolved() for job in jobs]
    fields = [field for field in flat_fields(JobConfig) if field.metadata.get("identity", True)]
    columns = {field.name: [_text(field.value_in(job)) for job in resolved] for field in fields}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def _text(value: Any) -> str:
    return "" if value is None else to_text(value)
