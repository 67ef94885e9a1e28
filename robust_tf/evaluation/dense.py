"""Evaluates networks for detection or segmentation: the metric of the task without and with an attack on its loss."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from rich import box
from rich.table import Table

from robust_tf.attacks import AttackConfig
from robust_tf.config.data import DataConfig
from robust_tf.config.evaluation import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_NUM_IMAGES,
    DENSE_ATTACK,
    NO_ATTACK,
    EvaluateConfig,
)
from robust_tf.console import console, track
from robust_tf.data import TaskData, load_task
from robust_tf.data.examples import Examples
from robust_tf.errors import UserError
from robust_tf.evaluation import report
from robust_tf.evaluation.subject import chosen_positions, short_names
from robust_tf.files import replaced_atomically, write_json
from robust_tf.flags import to_flag_file
from robust_tf.json_records import to_json
from robust_tf.models import read_model, weights_sha256
from robust_tf.results import FILE_NAME, JobResults, MeasuredAttack, metric_title
from robust_tf.tasks.base import DenseTask, Scores
from robust_tf.tasks.measuring import Measurer
from robust_tf.tasks.sheet import save_examples
from robust_tf.tasks.table import DENSE_TASKS, task_type_of
from robust_tf.training.xla import compiles_with_xla

_CLASSIFIER_FLAGS = ("artifact", "classes", "corruptions")
STATE = "state"  # folder in the output folder, with a file for each finished epsilon


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSubject:
    """A network for detection or segmentation and its data.

    Attributes:
        name: Path of its file, as the user wrote it.
        dense: Task type.
        network: The network.
        task: Data, with labels for the network.
        dataset: Name of the data set.
        attack: Attack under which the job measured it; None if that is not known.
    """

    name: str
    dense: DenseTask
    network: keras.Model
    task: TaskData
    dataset: str
    attack: MeasuredAttack | None


def is_dense(classifier: str) -> bool:
    """Returns whether a `.keras` file holds a network for detection or segmentation."""
    path = pathlib.Path(classifier)
    if path.suffix != ".keras" or not path.is_file():
        return False
    results = JobResults.read(path.parent / FILE_NAME)
    if results is not None and results.dataset:
        return results.task_type != "classification"
    return task_type_of(read_model(path)) != "classification"


def run_dense_evaluation(config: EvaluateConfig) -> None:
    """Measures one or two networks and writes evaluation.json and a sheet of examples to the output folder.

    Epsilons that were finished before the program was stopped are not measured again.

    Raises:
        UserError: A flag is for classifiers only, a network or its data cannot be loaded, or the two networks that are
            compared do not have the same task and data.
    """
    _check_flags(config)
    tf.config.experimental.enable_tensor_float_32_execution(config.tf32)
    subjects = [load_dense_subject(config, name) for name in (config.classifier, config.compare) if name]
    if len({(subject.dense.name, subject.dataset, subject.task.image_size) for subject in subjects}) > 1:
        raise UserError(
            "--compare needs a network with the same task, data set and image size. Received: "
            + " and ".join(f"{each.dense.name} on {each.dataset}, {each.task.image_size} pixels" for each in subjects)
            + "."
        )
    norm, epsilons = _threat_model(config, subjects)
    measured = [[_measured(config, subject, norm, epsilon) for epsilon in epsilons] for subject in subjects]
    entries = [
        _entry(subject, norm, epsilons, scores, count=_examples(config, subject.task).count)
        for subject, scores in zip(subjects, measured, strict=True)
    ]
    differences = None
    if len(measured) == 2:
        differences = [
            {"norm": norm, "epsilon": epsilon, **to_json(first.difference(second))}
            for epsilon, first, second in zip(epsilons, *measured, strict=True)
        ]
    flags = to_flag_file(dataclasses.replace(config, output="", data_dir="")).splitlines()
    content = {"networks": entries, "differences": differences, "flags": flags, "versions": report.versions()}
    write_json(config.folder / "evaluation.json", content)
    console.print(_table(subjects, entries))
    for each in differences or ():
        low, high = each["interval"]
        console.print(
            f"{_threat(norm, each['epsilon'])}, first minus second: {100 * each['value']:+.1f} points "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, bootstrap over images)",
            soft_wrap=True,
        )
    console.print(f"Wrote {config.folder}.")


def load_dense_subject(config: EvaluateConfig, name: str) -> DenseSubject:
    """Loads a network together with its data."""
    path = pathlib.Path(name)
    network = read_model(path)
    task_type = task_type_of(network)
    if task_type == "classification":
        raise UserError(f"Two networks must have the same task to be compared. Received: {path}, a classifier.")
    job = JobResults.read(path.parent / FILE_NAME) or JobResults()
    dataset = config.dataset or job.dataset
    if not dataset:
        raise UserError(
            f"The data set of {name} is not known, because there is no {FILE_NAME} next to it. Received: no --dataset. "
            "Add --dataset=NAME."
        )
    dense = DENSE_TASKS[task_type]
    task = load_task(
        DataConfig(
            task_type=task_type,
            dataset=dataset,
            data_dir=config.data_dir,
            image_size=network.input_shape[1],
            exif=job.exif,
            alpha_background=job.alpha_background,
            split_seed=job.split_seed if dataset == job.dataset else 0,
        ),
        batch_size=DEFAULT_BATCH_SIZE,
    )
    outputs = network.output["classes"] if isinstance(network.output, dict) else network.output
    if outputs.shape[-1] != len(task.class_names):
        raise UserError(
            f"The data set must have as many classes as the network. Received: {name} with {outputs.shape[-1]} classes "
            f"for {len(task.class_names)} classes of {dataset}. Choose another --dataset."
        )
    return DenseSubject(
        name=name,
        dense=dense,
        network=network,
        task=dense.with_labels_for(task, network),
        dataset=dataset,
        attack=job.robust_accuracy_attack,
    )


def _check_flags(config: EvaluateConfig) -> None:
    for name in _CLASSIFIER_FLAGS:
        if getattr(config, name):
            raise UserError(
                f"--{name} is for classifiers. Received: {config.classifier}, a network for detection or segmentation."
            )
    if config.attack not in ((), (NO_ATTACK,), (DENSE_ATTACK,)):
        raise UserError(
            "A network for detection or segmentation is attacked through its own loss: --attack must be "
            f"{DENSE_ATTACK} or {NO_ATTACK}. Received: --attack={','.join(config.attack)}."
        )


def _threat_model(config: EvaluateConfig, subjects: Sequence[DenseSubject]) -> tuple[str, list[float]]:
    """Returns the norm and the epsilons in ascending order, from the flags or else from the job of a network."""
    if config.attack == (NO_ATTACK,):
        return "", [0.0]
    known = next((each.attack for each in subjects if each.attack and each.attack.epsilon), None)
    norm = config.norm or (known.norm if known else None)
    if norm not in ("l2", "linf") or not (config.epsilon or (known and known.norm == norm)):
        raise UserError(
            "--norm (l2 or linf) and --epsilon are needed, because the norm and epsilon of the training are not known. "
            f"Received: --norm={config.norm!r}, --epsilon={','.join(map(str, config.epsilon))}. Name both."
        )
    epsilons = config.epsilon or (0.0, float((known and known.epsilon) or 0.0))
    return norm, sorted({0.0, *epsilons})


def _examples(config: EvaluateConfig, task: TaskData) -> Examples:
    """Returns the test images that the flags choose."""
    total = task.num_test
    count = min(DEFAULT_NUM_IMAGES, total) if config.num_images is None else config.num_images or None
    if count is not None and count > total:
        raise UserError(
            f"--num_images must be at most the number of test images. Received: {count}; there are {total}. Use "
            "--num_images=0 for all of them."
        )
    mask = task.test_examples.mask.copy()
    mask[np.flatnonzero(mask)[~chosen_positions(total, count, config.seed)]] = False
    return dataclasses.replace(task.test_examples, mask=mask)


def _measured(config: EvaluateConfig, subject: DenseSubject, norm: str, epsilon: float) -> Scores:
    """Returns the scores at one epsilon, which may have been stored by a run that was stopped."""
    examples = _examples(config, subject.task)
    key = f"{weights_sha256(subject.network)[:16]}_{subject.task.test_fingerprint[:16]}_{examples.count}_{config.seed}"
    path = config.folder / STATE / f"{key}_{norm or 'none'}_{config.attack_steps}_{epsilon:.9g}.npz"
    scores = subject.dense.scores(subject.task.class_names)
    if path.is_file():
        with np.load(path) as arrays:
            scores.restore(arrays)
        return scores
    attack = _attack(norm, epsilon, config.attack_steps)
    xla: bool | Literal["auto"] = "auto" if config.jit_compile == "auto" else config.jit_compile == "true"
    measurer = Measurer(
        subject.dense,
        subject.network,
        subject.task,
        attack=attack,
        batch_size=config.batch_size or DEFAULT_BATCH_SIZE,
        jit_compile=compiles_with_xla(xla, subject.network),
    )
    title = f"{pathlib.Path(subject.name).parent.name or subject.name}, {_threat(norm, epsilon)}"

    def progress(outcomes: Iterator[Any]) -> Iterator[Any]:
        counted = ((outcome, outcome[0]) for outcome in outcomes)
        return (outcome for outcome, _ in track(counted, title, num_images=examples.count))

    with subject.task.broken_images_named():
        measurement = measurer.measure(examples, keep=config.num_examples, progress=progress)
    found = measurement.clean if measurement.robust is None else measurement.robust
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **found.state())  # type: ignore[arg-type]
    if attack.active:
        number = "" if subject.name == config.classifier else "_compare"
        save_examples(
            config.folder / f"examples{number}_{epsilon:.4g}.png",
            subject.dense,
            measurement.examples,
            subject.task.class_names,
            attack=_threat(norm, epsilon),
            title=f"{subject.dense.attack_title.format(attack.steps)} on test images of {subject.dataset}",
        )
    return found


def _attack(norm: str, epsilon: float, steps: int) -> AttackConfig:
    if not epsilon:
        return AttackConfig(norm="l2", epsilon=0.0, step_size=0.0, steps=0)
    return AttackConfig(norm=norm, epsilon=epsilon, step_size=2.5 * epsilon / steps, steps=steps)  # type: ignore[arg-type]


def _threat(norm: str, epsilon: float) -> str:
    return f"{norm} {epsilon:.4g}" if epsilon else "clean"


def _entry(
    subject: DenseSubject, norm: str, epsilons: Sequence[float], scores: Sequence[Scores], *, count: int
) -> dict[str, Any]:
    measures = [each.measures() for each in scores]
    return {
        "network": subject.name,
        "task_type": subject.dense.name,
        "dataset": subject.dataset,
        "weights_sha256": weights_sha256(subject.network),
        "num_images": count,
        "metric": subject.dense.metric,
        "attack": subject.dense.attack_title,
        "results": [
            {"norm": norm or None, "epsilon": epsilon, **to_json(each)}
            for epsilon, each in zip(epsilons, measures, strict=True)
        ],
    }


def _table(subjects: Sequence[DenseSubject], entries: Sequence[dict[str, Any]]) -> Table:
    metric = metric_title(entries[0]["metric"])
    table = Table(
        title=f"{metric}, {entries[0]['num_images']} test images of {subjects[0].dataset}",
        title_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("")
    others = list(entries[0]["results"][0]["others"])
    for name in (metric, *others):
        table.add_column(name.replace("_", " "))
    names = short_names([subject.name for subject in subjects])
    for name, entry in zip(names, entries, strict=True):
        for each in entry["results"]:
            figures = [_percent(each["others"].get(other)) for other in others]
            interval = each["interval"]
            ends = f" ({100 * interval[0]:.1f}% to {100 * interval[1]:.1f}%)" if interval else ""
            threat = _threat(each["norm"] or "", each["epsilon"])
            table.add_row(f"{name}, {threat}", _percent(each["value"]) + ends, *figures)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
