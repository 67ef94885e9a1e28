"""Collects the results of the finished cells of a study into cells.csv."""

import dataclasses
import pathlib

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.flags import to_text
from robust_tf.job.building import DEFAULT_ARCHITECTURE
from robust_tf.models import PUBLISHED
from robust_tf.results import FILE_NAME, JobResults
from robust_tf.studies.grid import Grid, PlannedCell, varying_flags
from robust_tf.studies.records import CELLS, Cell, write_cells

# Flags that have columns of their own, or that only say where something is.
_OWN_COLUMNS = {"source", "dataset", "classes", "transfer_mode", "examples_per_class", "seed"}
_OWN_SOURCE_COLUMNS = {"architecture", "norm", "epsilon", "dataset", "classes", "seed"}


def collect(grid: Grid, workdir: pathlib.Path) -> list[Cell]:
    """Writes cells.csv with the finished cells, and returns them.

    Args:
        grid: Jobs of the study.
        workdir: Folder of the study.

    Raises:
        UserError: A file of a cell is damaged, or the table cannot be written.
    """
    varied = varying_flags([cell.job for cell in grid.cells])
    sources = [source.job for source in grid.sources]
    of_sources = varying_flags(sources) if sources else {}
    source_place = {source.name: number for number, source in enumerate(grid.sources)}
    described = {source.name: _described(source.job, workdir) for source in grid.sources}
    others: dict[str, dict[str, object]] = {}
    cells, rivals = [], []
    for number, cell in enumerate(grid.cells):
        results = JobResults.read(pathlib.Path(cell.job.run.workdir) / FILE_NAME)
        if results is None:
            continue
        columns = {name: texts[number] for name, texts in varied.items() if name not in _OWN_COLUMNS}
        if cell.source:
            place, about = source_place[cell.source.name], described[cell.source.name]
            columns |= {
                f"source_{name}": texts[place] for name, texts in of_sources.items() if name not in _OWN_SOURCE_COLUMNS
            }
        else:
            path = cell.job.transfer.source
            about = others.setdefault(path, _described_file(path))
        cells.append(_cell(cell, results, columns, about))
        rivals.append(cell.rivals)
    best: dict[str, Cell] = {}
    for name, each in zip(rivals, cells, strict=True):
        if name not in best or (each.validation_value or 0.0) > (best[name].validation_value or 0.0):
            best[name] = each
    chosen = {each.cell for each in best.values()}
    cells = [dataclasses.replace(each, chosen=each.cell in chosen) for each in cells]
    write_cells(workdir / CELLS, cells)
    return cells


def _cell(cell: PlannedCell, results: JobResults, varied: dict[str, str], source: dict[str, object]) -> Cell:
    data, transfer = cell.job.data, cell.job.transfer
    is_accuracy = results.metric != "mean_per_class_accuracy"
    accuracy = results.clean_accuracy if is_accuracy else results.mean_per_class_accuracy
    interval = results.clean_accuracy_interval if is_accuracy else None
    robust, attack = results.robust_accuracy_interval, results.robust_accuracy_attack
    return Cell(
        cell=cell.name,
        dataset=data.dataset,
        classes=to_text(data.classes),
        transfer_mode=transfer.transfer_mode,
        examples_per_class=data.examples_per_class,
        seed=cell.job.run.seed,
        varied={name: text for name, text in varied.items() if text},
        metric=results.metric or "accuracy",
        validation_value=results.validation_value,
        accuracy=accuracy or 0.0,  # every finished job has one
        accuracy_low=interval.low if interval else None,
        accuracy_high=interval.high if interval else None,
        robust_accuracy=results.robust_accuracy,
        robust_low=robust.low if robust else None,
        robust_high=robust.high if robust else None,
        robust_norm=(attack.norm or "") if attack else "",
        robust_epsilon=attack.epsilon if attack else None,
        num_test_images=results.num_test_images or 0,
        seconds=results.seconds or 0.0,
        weights_sha256=results.weights_sha256 or "",
        robust_tf=results.versions.get("robust_tf", ""),
        tensorflow=results.versions.get("tensorflow", ""),
        keras=results.versions.get("keras", ""),
        **source,  # type: ignore[arg-type]
    )


def _described(job: JobConfig, workdir: pathlib.Path) -> dict[str, object]:
    """Returns the columns about a source that a job of the study has trained."""
    folder = pathlib.Path(job.run.workdir)
    return {"source": str(folder.relative_to(workdir)), **_columns(job, JobResults.read(folder / FILE_NAME))}


def _described_file(path: str) -> dict[str, object]:
    """Returns the columns about a published model or a file, as far as they are known."""
    if path in PUBLISHED:
        model = PUBLISHED[path]
        return {
            "source": path,
            "source_architecture": model.architecture,
            "source_norm": model.norm if model.epsilon else "",
            "source_epsilon": model.epsilon,
            "source_dataset": model.dataset,
        }
    folder = pathlib.Path(path).parent
    if (folder / "flags.cfg").exists():
        return {"source": path, **_columns(read_flag_file(folder / "flags.cfg"), JobResults.read(folder / FILE_NAME))}
    return {"source": path}


def _columns(job: JobConfig, results: JobResults | None) -> dict[str, object]:
    attack = job.resolved().adversarial.training_attack
    return {
        "source_architecture": job.transfer.architecture or DEFAULT_ARCHITECTURE,
        "source_norm": attack.norm if attack.active else "",
        "source_epsilon": attack.epsilon if attack.active else 0.0,
        "source_dataset": job.data.dataset,
        "source_classes": to_text(job.data.classes),
        "source_seed": job.run.seed,
        "source_accuracy": results.clean_accuracy if results else None,
        "source_robust_accuracy": results.robust_accuracy if results else None,
    }
