"""Advice on which source to transfer from, by cheap probes on a few hundred images of the new data set.

The features of each source are computed once. A ridge regression on them is then cross-validated several times, with
the same splits for all sources. No network is trained, and the test images are not used.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.console import console
from robust_tf.errors import UserError
from robust_tf.files import cache_folder
from robust_tf.flags import to_text
from robust_tf.job.building import DEFAULT_ARCHITECTURE
from robust_tf.job.sources import open_source
from robust_tf.job.task import load_job_task
from robust_tf.models.published import PUBLISHED
from robust_tf.results import FILE_NAME
from robust_tf.sharing import sharing
from robust_tf.studies.analysis import Group, Place, analyze
from robust_tf.studies.axes import dataset_text, epsilon_text, norm_text
from robust_tf.studies.records import CELLS, read_cells
from robust_tf.studies.replication import Replication, replicate
from robust_tf.studies.wording import percent
from robust_tf.transfer.features import stored_features
from robust_tf.transfer.probes import metric_of, ridge_regression

NUM_IMAGES = 400  # about as many images as a probe uses, unless the flags of the job choose them
_FOLDS = 4
_MOST_SHARED = 16  # objects that the probes share; each probe makes about five
_REPEATS = 5


class SourceKind(NamedTuple):
    """What sources that differ only in their seed have in common.

    Attributes:
        architecture: Architecture.
        norm: Norm of the perturbations in training; empty for standard training.
        epsilon: Radius of these perturbations, in [0, 1] pixel units.
        dataset: Data set of the training.
        classes: Classes of it that were kept, as in the flag; empty if all were.
    """

    architecture: str
    norm: str
    epsilon: float
    dataset: str
    classes: str

    @property
    def in_words(self) -> str:
        """A name such as "resnet20, L2 epsilon 1, from digits 0-4"."""
        training = (
            f"{norm_text(self.norm)} epsilon {epsilon_text(self.epsilon, self.norm)}" if self.norm else "standard"
        )
        return f"{self.architecture}, {training}, from {dataset_text(self.dataset, self.classes)}"


class Source(NamedTuple):
    """A source that can be probed.

    Attributes:
        name: Path of its classifier, or name of a published model.
        kind: What it is.
        seed: Seed of its training; None if it is unknown.
    """

    name: str
    kind: SourceKind
    seed: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probed:
    """The probes of the sources of one kind.

    Attributes:
        kind: What the sources are.
        names: Their paths or names.
        estimate: Cross-validated value of the data set's metric, over source seeds and repeated splits, in [0, 1].
        behind: How much higher the first kind of the ranking is, paired by seed and split; None for the first itself,
            and where the two have no seeds in common.
    """

    kind: SourceKind
    names: tuple[str, ...]
    estimate: Replication
    behind: Replication | None = None

    @property
    def may_be_best(self) -> bool:
        """Whether the probes do not show that the first kind is better."""
        return self.behind is None or self.behind.interval is None or self.behind.interval.low <= 0


class AdviceCheck(NamedTuple):
    """How good the advice was for the groups of a finished study.

    Attributes:
        hits: Number of groups in which the first choice was within the 95 % interval of the best source.
        groups: Number of groups that were checked.
        by_chance: Number of groups in which a source chosen at random would have been, on average.
        misses: The other groups, each with the place of the first choice and the place of the best source.
    """

    hits: int
    groups: int
    by_chance: float
    misses: list[tuple[Group, Place, Place]]

    @property
    def in_words(self) -> str:
        """A sentence with the figures."""
        return (
            f"The first choice was within the 95 % interval of the best source in {self.hits} of {self.groups} groups "
            f"of the study; a choice at random would have been in {self.by_chance:.1f} of them on average."
        )


def advise(job: JobConfig, workdir: pathlib.Path) -> list[Probed]:
    """Ranks the available sources for the data set of a job, and prints the ranking.

    Args:
        job: Transfer job, whose flags choose the data set.
        workdir: Folder of a study, whose sources are ranked. If it has none, the published models that need no download
            are ranked instead.

    Raises:
        UserError: There is no source, or the data cannot be used.
    """
    sources = study_sources(workdir) or published_sources(job.data.cache_dir)
    ranked = rank_sources(job, sources)
    console.print(advice_table(ranked, dataset_text(job.data.dataset, to_text(job.data.classes))))
    return ranked


def study_sources(workdir: pathlib.Path) -> list[Source]:
    """Returns the finished sources of a study, in the order of their names.

    Args:
        workdir: Folder of the study, with the workdirs of its sources in sources/.
    """
    found = []
    for classifier in sorted(workdir.glob("sources/*/classifier.keras")):
        if not (classifier.parent / FILE_NAME).exists():
            continue
        job = read_flag_file(classifier.parent / "flags.cfg").resolved()
        attack = job.adversarial.training_attack
        norm, epsilon = (attack.norm, attack.epsilon) if attack.active else ("", 0.0)
        architecture = job.transfer.architecture or DEFAULT_ARCHITECTURE
        kind = SourceKind(architecture, norm, epsilon, job.data.dataset, to_text(job.data.classes))
        found.append(Source(str(classifier), kind, job.run.seed))
    return found


def published_sources(cache_dir: str = "") -> list[Source]:
    """Returns the published models that need no download: those of this package and those in the cache folder.

    Args:
        cache_dir: The cache folder; empty for the usual one.

    Example:
        >>> [source.name for source in published_sources() if source.kind.dataset == "fashion_mnist"]
        ['resnet20_fashion_mnist_l2_eps0', 'resnet20_fashion_mnist_l2_eps1']
    """
    found = []
    for name, model in PUBLISHED.items():
        if model.packaged or (cache_folder(cache_dir or None) / f"{name}.keras").exists():
            norm = model.norm if model.epsilon else ""
            found.append(Source(name, SourceKind(model.architecture, norm, model.epsilon, model.dataset, ""), None))
    return found


def rank_sources(job: JobConfig, sources: Sequence[Source], *, repeats: int = _REPEATS) -> list[Probed]:
    """Ranks sources for the data set of a job, the most promising first.

    Args:
        job: Transfer job, whose flags choose the data set. Without --subset and --examples_per_class, about 400 images
            are used.
        sources: Sources to rank; at least one.
        repeats: Number of times that the cross-validation is repeated with other splits.

    Raises:
        UserError: There is no source, or the data cannot be used.
    """
    if not sources:
        raise UserError(
            "--advise needs sources to rank. Received: none. Name a study with finished sources by --workdir, or "
            "download a published model first."
        )
    values: dict[SourceKind, dict[tuple[int | None, int], float]] = {}
    names: dict[SourceKind, list[str]] = {}
    with sharing(_MOST_SHARED):  # so that the images are read once for all sources
        for source in sources:
            console.print(f"Probing {source.name}.")
            for split, value in enumerate(_probe(job, source.name, repeats)):
                values.setdefault(source.kind, {})[source.seed, split] = value
            names.setdefault(source.kind, []).append(source.name)
    ordered = sorted(values, key=lambda kind: (-_replicate(values[kind]).mean, kind))
    first = values[ordered[0]]
    ranked = []
    for kind in ordered:
        pairs = {run: first[run] - value for run, value in values[kind].items() if run in first}
        behind = _replicate(pairs) if pairs and kind != ordered[0] else None
        estimate = _replicate(values[kind])
        ranked.append(Probed(kind=kind, names=tuple(names[kind]), estimate=estimate, behind=behind))
    return ranked


def advice_table(ranked: Sequence[Probed], dataset: str) -> Table:
    """Returns the ranking as a table for the console, which says what it is based on.

    Args:
        ranked: Result of `rank_sources`.
        dataset: Name of the data set.
    """
    table = Table(
        title=f"Sources for {dataset}, by {_FOLDS}-fold cross-validated ridge regression on their features",
        title_justify="left",
        caption="In brackets: 95 % interval over source seeds and splits of the images that were probed. It does not "
        "cover other images, and full-network training may prefer another source.",
        caption_justify="left",
        box=box.SIMPLE,
    )
    for heading in ("", "source", "cross-validated", "verdict"):
        table.add_column(heading)
    for place, each in enumerate(ranked, start=1):
        verdict = "first choice" if place == 1 else "not clearly worse" if each.may_be_best else "worse"
        table.add_row(str(place), each.kind.in_words, percent(each.estimate), verdict)
    return table


def check_advice(groups: Sequence[Group], ranked: Mapping[tuple[str, str], Sequence[Probed]]) -> AdviceCheck:
    """Checks the advice on a finished study: how often the first choice is within the interval of the best source.

    Args:
        groups: Groups of the study, the result of `robust_tf.studies.analysis.analyze`.
        ranked: Ranking of the study's sources for each data set with its classes, as `rank_sources` returns it. Groups
            of other data sets are left out.
    """
    hits, count, by_chance, misses = 0, 0, 0.0, []
    for group in groups:
        places = {place.epsilon: place for place in group.places if place.epsilon is not None}
        probed = ranked.get((group.key.dataset, group.key.classes), ())
        choice = next((places[each.kind.epsilon] for each in probed if _fits(each.kind, group, places)), None)
        if choice is None or len(places) < 2:
            continue
        best = max(places.values(), key=_accuracy)
        within = [_accuracy(place) >= _lower_end(best) for place in places.values()]
        count, by_chance = count + 1, by_chance + sum(within) / len(within)
        if _accuracy(choice) >= _lower_end(best):
            hits += 1
        else:
            misses.append((group, choice, best))
    return AdviceCheck(hits, count, by_chance, misses)


def print_check(workdir: pathlib.Path) -> None:
    """Prints how good the advice would have been for the data sets of a finished study.

    Args:
        workdir: Folder of the study.

    Raises:
        UserError: The folder holds no finished study.
    """
    table = workdir / CELLS
    if not table.exists():
        raise UserError(
            "--advise ranks sources for the data set of --dataset; without it, a finished study checks the advice. "
            f"Received: no --dataset, and --workdir={workdir} without {CELLS}. Name the data set, or a finished study."
        )
    console.print(advice_on_study(workdir, analyze(read_cells(table))).in_words, soft_wrap=True)


def advice_on_study(workdir: pathlib.Path, groups: Sequence[Group], *, repeats: int = _REPEATS) -> AdviceCheck:
    """Ranks the sources of a finished study for each of its data sets, and checks the ranking on the study.

    Args:
        workdir: Folder of the study.
        groups: Its groups, the result of `robust_tf.studies.analysis.analyze`.
        repeats: Number of times that each cross-validation is repeated.

    Raises:
        UserError: The study has no sources, or the data cannot be used.
    """
    sources = study_sources(workdir)
    ranked = {}
    for group in groups:
        task = (group.key.dataset, group.key.classes)
        if task not in ranked:
            flags = workdir / "cells" / group.places[0].cells[0].cell / "flags.cfg"
            job = read_flag_file(flags).with_flags(examples_per_class=None, subset="")
            ranked[task] = rank_sources(job, sources, repeats=repeats)
    return check_advice(groups, ranked)


def cross_validated(
    features: np.ndarray, labels: np.ndarray, *, num_classes: int, metric: str, repeats: int = _REPEATS
) -> list[float]:
    """Returns the cross-validated metric of a ridge regression, once for each repetition with other splits.

    One fold is predicted, the next one chooses the penalty, and the others are fitted, in turn. The splits depend only
    on the labels, so they are the same for all sources.

    Args:
        features: Features of the images, (num_images, feature_dim).
        labels: Labels, (num_images,) int.
        num_classes: Number of classes.
        metric: "accuracy" or "mean_per_class_accuracy".
        repeats: Number of repetitions.

    Example:
        >>> labels = np.arange(40) % 2
        >>> cross_validated(np.eye(2)[labels], labels, num_classes=2, metric="accuracy", repeats=2)
        [1.0, 1.0]
    """
    values = []
    for repeat in range(repeats):
        folds = _stratified_folds(labels, np.random.default_rng(repeat))
        predictions = np.empty_like(labels)
        for fold in range(_FOLDS):
            chooses, predicted = folds == (fold + 1) % _FOLDS, folds == fold
            fitted = ~(chooses | predicted)
            head = ridge_regression(
                [features[fitted]],
                labels[fitted],
                features[chooses],
                labels[chooses],
                num_classes=num_classes,
                metric=metric,
            )
            predictions[predicted] = (features[predicted] @ head.kernel + head.bias).argmax(axis=1)
        values.append(metric_of(predictions, labels, metric))
    return values


def _probe(job: JobConfig, source: str, repeats: int) -> list[float]:
    classifier = open_source(source, job.transfer, image_size=job.data.image_size)
    size = classifier.input_shape[1]
    chosen = job.data.examples_per_class is not None or job.data.subset
    try:
        task = load_job_task(job if chosen else job.with_flags(subset=str(NUM_IMAGES)), image_size=size)
    except UserError:
        task = load_job_task(job, image_size=size)  # a data set with fewer images
    features = stored_features(
        classifier,
        task,
        views=1,
        cache_dir=cache_folder(job.data.cache_dir or None),
        features_cache_size_gb=job.transfer.features_cache_size_gb,
    )
    # The validation part of a large data set would make the probe slow.
    part = slice(0, NUM_IMAGES)
    pooled = np.concatenate([features.train[0], features.validation[part]])
    labels = np.concatenate([features.train_labels, features.validation_labels[part]]).astype(int)
    return cross_validated(pooled, labels, num_classes=len(task.class_names), metric=task.metric, repeats=repeats)


def _stratified_folds(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns the fold of each image; the images of each class are spread over all folds."""
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), int)
    folds[order] = np.arange(len(labels)) % _FOLDS
    return folds


def _fits(kind: SourceKind, group: Group, places: Mapping[float, Place]) -> bool:
    """Returns whether sources of a kind took part in a group."""
    key = group.key
    same = (kind.architecture, kind.dataset) == (key.source_architecture, key.source_dataset)
    same = same and dataset_text("", kind.classes) == dataset_text("", key.source_classes)
    return same and kind.epsilon in places and kind.norm in ("", key.source_norm)


def _replicate(runs: Mapping[tuple[int | None, int], float]) -> Replication:
    return replicate(list(runs.values()), [seed for seed, _ in runs], [split for _, split in runs])


def _accuracy(place: Place) -> float:
    return place.measures["accuracy"].estimate.mean


def _lower_end(place: Place) -> float:
    interval = place.measures["accuracy"].estimate.interval
    return interval.low if interval else _accuracy(place)
