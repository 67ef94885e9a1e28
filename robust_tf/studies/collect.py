"""Collects the results of the cells of a study into cells.csv, and writes everything that is made from this table."""

import dataclasses
import pathlib
from typing import Any

from robust_tf.config.job import JobConfig
from robust_tf.console import console
from robust_tf.flags import flat_values, parse_flags, to_text
from robust_tf.models import PUBLISHED
from robust_tf.results import FILE_NAME, JobResults
from robust_tf.studies.grid import SOURCE_PREFIX, CellRun, StudyPlan
from robust_tf.studies.records import CELLS, Cell, write_cells
from robust_tf.studies.report import write_report


def collect_study(plan: StudyPlan) -> list[Cell]:
    """Writes cells.csv, the statistics, the report and TensorBoard's HParams from the finished cells.

    Args:
        plan: The study. Cells that are not finished are left out.

    Raises:
        UserError: The results of a cell cannot be read, or a file cannot be written.
    """
    cells = finished_cells(plan)
    write_cells(plan.workdir / CELLS, cells)
    if not cells:
        console.print(f"No cell of {plan.workdir} is finished, so there is no report.")
        return cells
    write_report(plan.workdir)
    return cells


def finished_cells(plan: StudyPlan) -> list[Cell]:
    """Returns a record for each finished cell, in the order of their names.

    Args:
        plan: The study.

    Raises:
        UserError: The results of a cell cannot be read.
    """
    sources: dict[str, dict[str, Any]] = {}
    found: list[tuple[tuple[Any, ...], Cell]] = []
    for run in plan.cells:
        results = JobResults.read(run.workdir / FILE_NAME)
        if results is None:
            continue
        results.check_finished(run.workdir / FILE_NAME)
        origin = run.job.transfer.source
        if origin not in sources:
            sources[origin] = _source_columns(run, plan)
        found.append((_rivals(run), _cell(run, results, sources[origin])))
    best: dict[tuple[Any, ...], Cell] = {}
    for key, cell in found:
        if key not in best or (cell.validation_value or 0.0) > (best[key].validation_value or 0.0):
            best[key] = cell
    cells = [dataclasses.replace(cell, chosen=best[key] is cell) for key, cell in found]
    return sorted(cells, key=lambda cell: cell.cell)


def _rivals(run: CellRun) -> tuple[Any, ...]:
    """Returns what the cells have in common from which the validation part chooses one."""
    chosen_by = {name for name in run.chosen_by if not name.startswith(SOURCE_PREFIX)}
    values = {name: value for name, value in flat_values(run.job).items() if name not in chosen_by | {"workdir"}}
    source = run.source
    if source and any(name.startswith(SOURCE_PREFIX) for name in run.chosen_by):
        of_source = flat_values(source.job)
        dropped = {name.removeprefix(SOURCE_PREFIX) for name in run.chosen_by} | {"workdir"}
        values["source"] = tuple(value for name, value in of_source.items() if name not in dropped)
    return tuple(values.values())


def _cell(run: CellRun, results: JobResults, source: dict[str, Any]) -> Cell:
    data, attack = run.job.data, results.robust_accuracy_attack
    per_class = results.metric == "mean_per_class_accuracy"
    interval = None if per_class else results.clean_accuracy_interval
    robust = results.robust_accuracy_interval
    versions = results.versions
    return Cell(
        cell=run.name,
        **source,
        dataset=data.dataset,
        classes=to_text(data.classes),
        transfer_mode=run.job.transfer.transfer_mode,
        examples_per_class=data.examples_per_class,
        seed=run.job.run.seed,
        varied=run.varied,
        metric=results.metric or "accuracy",
        validation_value=results.validation_value,
        accuracy=(results.mean_per_class_accuracy if per_class else results.clean_accuracy) or 0.0,
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
        robust_tf=versions.get("robust_tf", ""),
        tensorflow=versions.get("tensorflow", ""),
        keras=versions.get("keras", ""),
    )


def _source_columns(run: CellRun, plan: StudyPlan) -> dict[str, Any]:
    origin = run.job.transfer.source
    if run.source:
        folder = run.source.workdir
        columns = {"source": str(folder.relative_to(plan.workdir)), **_columns_of_job(run.source.job)}
        return columns | _accuracies(JobResults.read(folder / FILE_NAME))
    if origin in PUBLISHED:
        model = PUBLISHED[origin]
        return {
            "source": origin,
            "source_architecture": model.architecture,
            "source_norm": model.norm if model.epsilon else "",
            "source_epsilon": model.epsilon,
            "source_dataset": model.dataset,
            "source_accuracy": None if model.clean_accuracy is None else model.clean_accuracy / 100,
        }
    results = JobResults.read(pathlib.Path(origin).parent / FILE_NAME)
    if results is None:  # a file of unknown origin
        return {"source": origin, "source_architecture": run.job.transfer.architecture}
    job, _ = parse_flags(JobConfig, ["train", *results.flags], announce_former_names=False)
    return {"source": origin, **_columns_of_job(job), **_accuracies(results)}


def _columns_of_job(job: JobConfig) -> dict[str, Any]:
    attack = job.adversarial.training_attack
    return {
        "source_architecture": job.transfer.architecture or "resnet20",
        "source_norm": attack.norm if attack.active else "",
        "source_epsilon": attack.epsilon if attack.active else 0.0,
        "source_dataset": job.data.dataset,
        "source_classes": to_text(job.data.classes),
        "source_seed": job.run.seed,
    }


def _accuracies(results: JobResults | None) -> dict[str, Any]:
    if results is None:
        return {}
    return {"source_accuracy": results.clean_accuracy, "source_robust_accuracy": results.robust_accuracy}
