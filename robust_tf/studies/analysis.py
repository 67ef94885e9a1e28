"""The statistics of a study: means over repeated runs, and paired differences from the standard source.

Start with `analyze`. Nothing here imports TensorFlow.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from robust_tf.statistics import Interval
from robust_tf.studies.records import Cell
from robust_tf.studies.replication import Replication, cluster_bootstrap, holm, replicate

Verdict = Literal["better", "worse", "not decided by this many runs"]
Measure = Literal["accuracy", "robust_accuracy"]
MEASURES: tuple[Measure, ...] = ("accuracy", "robust_accuracy")
LEVEL = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupKey:
    """What the cells of a group have in common: everything but the epsilon of the source, its seed and the draw.

    Attributes:
        dataset: Data set that was transferred to.
        classes: Classes of it that were kept; empty if all were.
        transfer_mode: What the transfer trained.
        examples_per_class: Number of training labels of each class; None if all were used.
        source_architecture: Architecture of the sources.
        source_norm: Norm of the perturbations in the training of the robust sources.
        source_dataset: Data set of the sources.
        source_classes: Classes of it that were kept; empty if all were.
        varied: Names and values of the other flags that vary, except for those that validation chooses.
        robust_norm: Norm of the attack on the test images; empty without an attack.
        robust_epsilon: Radius of this attack, in [0, 1] pixel units; None without an attack.
    """

    dataset: str
    classes: str
    transfer_mode: str
    examples_per_class: int | None
    source_architecture: str
    source_norm: str
    source_dataset: str
    source_classes: str
    varied: tuple[tuple[str, str], ...]
    robust_norm: str
    robust_epsilon: float | None

    def sorting(self) -> tuple[str | float, ...]:
        """Returns a key by which groups are sorted: with numbers in their order, and all labels last."""
        labels = float("inf") if self.examples_per_class is None else self.examples_per_class
        return (
            *(self.dataset, self.classes, self.transfer_mode, self.source_dataset, self.source_classes),
            *(self.source_architecture, self.source_norm, str(self.varied), labels),
            *(self.robust_norm, self.robust_epsilon or 0.0),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The paired difference of a robust source from the standard source: robust minus standard.

    Attributes:
        estimate: The difference, in [-1, 1], over the pairs with the same source seed and draw.
        p_value: P-value of the test of no difference; None for a single pair.
        holm_p_value: P-value adjusted by Holm's method for all epsilons of the group; None for a single pair.
        verdict: "better" or "worse" if the adjusted p-value is below 5 %.
        clusters_to_decide: Number of source seeds (or draws, see `estimate.cluster`) that would probably decide it;
            None if it is decided, or if no reasonable number would do.
        bootstrap: Percentile interval of the bootstrap clustered by source seed, for comparison.
        wins: Number of pairs in which the robust source is better.
    """

    estimate: Replication
    p_value: float | None
    holm_p_value: float | None
    verdict: Verdict
    clusters_to_decide: int | None
    bootstrap: Interval
    wins: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One measure at one epsilon of a group.

    Attributes:
        estimate: Its mean over source seeds and draws, in [0, 1].
        difference: Paired difference from epsilon 0; None at epsilon 0 and where no pair exists.
    """

    estimate: Replication
    difference: Difference | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One epsilon of a group.

    Attributes:
        epsilon: Radius of the perturbations in the training of the source; None if it is unknown.
        source: Path or name of the source if its epsilon is unknown; otherwise empty.
        measures: What was measured: "accuracy", and "robust_accuracy" if the cells were attacked.
        validation_value: Mean value of the metric on the validation part; None if it is unknown.
        source_accuracy: Mean accuracy of the sources on their own test images; None if it is unknown.
        num_test_images: Number of test images.
        cells: The cells.
    """

    epsilon: float | None
    source: str
    measures: Mapping[Measure, Measured]
    validation_value: float | None
    source_accuracy: float | None
    num_test_images: int
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The places of a study that differ only in epsilon.

    Attributes:
        key: What they have in common.
        metric: What `accuracy` means, "accuracy" or "mean_per_class_accuracy".
        places: One for each epsilon, in ascending order.
    """

    key: GroupKey
    metric: str
    places: tuple[Place, ...]

    @property
    def standard(self) -> Place | None:
        """The place of the standard source, with epsilon 0."""
        return next((place for place in self.places if place.epsilon == 0), None)

    @property
    def robust_places(self) -> list[Place]:
        """The places with an epsilon above 0."""
        return [place for place in self.places if place.epsilon]

    @property
    def chosen_by_validation(self) -> Place | None:
        """The robust place with the best validation value; None if one of them has none.

        The test images take no part in this choice, so the accuracy of the chosen place is not too good to be true.
        """
        robust = [(place.validation_value, place) for place in self.robust_places]
        if not robust or any(value is None for value, _ in robust):
            return None
        return max(robust, key=lambda pair: pair[0] or 0.0)[1]


class Comparison(NamedTuple):
    """One paired comparison of a study.

    Attributes:
        group: Group of the place.
        place: Place of the robust source.
        difference: Its difference from the standard source.
    """

    group: Group
    place: Place
    difference: Difference


def analyze(cells: Iterable[Cell]) -> list[Group]:
    """Returns the groups of a study with their statistics, sorted.

    Cells that validation did not choose are left out. A standard source has no norm, so its cells belong to the groups
    of every norm.

    Args:
        cells: The finished cells.

    Example:
        >>> cells = [
        ...     Cell(cell=f"{epsilon} {seed}", source="", source_norm="l2", source_epsilon=epsilon, source_seed=seed,
        ...          dataset="digits", transfer_mode="fixed_feature", seed=0, accuracy=0.8 + epsilon / 10 + seed / 100)
        ...     for epsilon in (0.0, 1.0) for seed in range(3)
        ... ]
        >>> (group,) = analyze(cells)
        >>> group.places[1].measures["accuracy"].difference.verdict
        'better'
    """
    cells = list(cells)
    by_validation = validated_flags(cells)
    robust: dict[GroupKey, list[Cell]] = defaultdict(list)
    standard: dict[GroupKey, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.chosen:
            (standard if cell.source_epsilon == 0 else robust)[_key(cell, leave_out=by_validation)].append(cell)
    members = {key: list(found) for key, found in robust.items()}
    for key, found in standard.items():
        twins = [other for other in robust if _without_norm(other) == _without_norm(key)]
        for other in twins or [key]:
            # If there is a standard source for each norm, a group uses the one for its norm.
            if other == key or other not in standard:
                members.setdefault(other, []).extend(found)
    return [_group(key, members[key]) for key in sorted(members, key=GroupKey.sorting)]


def validated_flags(cells: Iterable[Cell]) -> frozenset[str]:
    """Returns the names of the flags in `varied` whose value validation chose, such as "learning_rate".

    They are the smallest set of flags that explains which cells were chosen: among cells that differ in nothing else,
    only one is chosen.

    Args:
        cells: The cells, chosen and others.

    Example:
        >>> cells = [
        ...     Cell(cell=rate, source="", dataset="digits", transfer_mode="fixed_feature", seed=0, accuracy=0.5,
        ...          varied={"learning_rate": rate}, chosen=rate == "0.1")
        ...     for rate in ("0.1", "0.01")
        ... ]
        >>> validated_flags(cells)
        frozenset({'learning_rate'})
    """
    cells = list(cells)
    if all(cell.chosen for cell in cells):
        return frozenset()
    names = sorted({name for cell in cells for name in cell.varied})
    for size in range(1, len(names) + 1):
        for candidate in itertools.combinations(names, size):
            counts: dict[object, int] = defaultdict(int)
            for cell in cells:
                counts[_replicate_key(cell, frozenset(candidate))] += cell.chosen
            if all(count == 1 for count in counts.values()):
                return frozenset(candidate)
    return frozenset(names)


def comparisons(groups: Iterable[Group], measure: Measure = "accuracy") -> list[Comparison]:
    """Returns all paired comparisons of a study with the standard source, in the order of the groups.

    Args:
        groups: Result of `analyze`.
        measure: Which accuracy is compared.
    """
    return [
        Comparison(group, place, difference)
        for group in groups
        for place in group.places
        if measure in place.measures and (difference := place.measures[measure].difference)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a study for one transfer mode: one difference, for which no epsilon was picked by test images.

    Attributes:
        transfer_mode: What the transfers trained.
        measure: Which accuracy is compared.
        difference: The paired difference, robust minus standard, averaged over the groups.
        epsilon_from: Which robust source counts: the "only" epsilon, for each source seed and draw the one that
            "validation" prefers, or the "mean" of all, where validation values are missing.
        num_groups: Number of groups that were averaged.
    """

    transfer_mode: str
    measure: Measure
    difference: Difference
    epsilon_from: Literal["only", "validation", "mean"]
    num_groups: int


def answers(groups: Sequence[Group], measure: Measure = "accuracy") -> list[Answer]:
    """Returns the answer for each transfer mode, averaged over the groups that were compared with a standard source.

    The average covers the source seeds and draws that all these groups share, so that each of them counts the same. A
    mode in which they share none has no answer.

    Args:
        groups: Result of `analyze`.
        measure: Which accuracy is compared.
    """
    found = []
    for mode in sorted({group.key.transfer_mode for group in groups}):
        differences, kinds = [], set()
        for group in groups:
            if group.key.transfer_mode == mode:
                pairs, kind = _answer_pairs(group, measure)
                if pairs:
                    differences.append(pairs)
                    kinds.add(kind)
        shared = set.intersection(*map(set, differences)) if differences else set()
        if shared:
            pairs = {run: sum(each[run] for each in differences) / len(differences) for run in sorted(shared, key=str)}
            (difference,) = _judged([(pairs, 0.0)])
            found.append(
                Answer(
                    transfer_mode=mode,
                    measure=measure,
                    difference=difference,
                    epsilon_from=max(kinds, key=("only", "validation", "mean").index),
                    num_groups=len(differences),
                )
            )
    return found


# A run of a group is known by its source seed and its draw.
_Run = tuple[int | None, int]


def _key(cell: Cell, *, leave_out: frozenset[str]) -> GroupKey:
    shared = {field.name: getattr(cell, field.name) for field in dataclasses.fields(GroupKey) if field.name != "varied"}
    varied = tuple(sorted((name, value) for name, value in cell.varied.items() if name not in leave_out))
    return GroupKey(**shared, varied=varied)


def _replicate_key(cell: Cell, leave_out: frozenset[str]) -> object:
    return _key(cell, leave_out=leave_out), cell.source, cell.source_epsilon, cell.source_seed, cell.seed


def _without_norm(key: GroupKey) -> GroupKey:
    return dataclasses.replace(key, source_norm="")


def _group(key: GroupKey, cells: Sequence[Cell]) -> Group:
    by_place: dict[tuple[float | None, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_place[cell.source_epsilon, cell.source if cell.source_epsilon is None else ""].append(cell)
    ordered = sorted(by_place.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0.0, item[0][1]))
    measures: list[dict[Measure, Measured]] = [{} for _ in ordered]
    for measure in MEASURES:
        runs = [_runs(found, measure) for _, found in ordered]
        standard = next((each for (place, _), each in zip(ordered, runs, strict=True) if place[0] == 0), {})
        compared = {}
        for number, ((epsilon, _), _) in enumerate(ordered):
            pairs = {run: value - standard[run] for run, value in runs[number].items() if run in standard}
            if epsilon and pairs:
                compared[number] = (pairs, _resolution(ordered[number][1]))
        differences = dict(zip(compared, _judged(list(compared.values())), strict=True))
        for number, each in enumerate(runs):
            if each:
                estimate = _replicate(each, _resolution(ordered[number][1]))
                measures[number][measure] = Measured(estimate=estimate, difference=differences.get(number))
    places = [
        Place(
            epsilon=epsilon,
            source=source,
            measures=measured,
            validation_value=_mean([cell.validation_value for cell in found]),
            source_accuracy=_mean([cell.source_accuracy for cell in found]),
            num_test_images=max(cell.num_test_images for cell in found),
            cells=tuple(found),
        )
        for ((epsilon, source), found), measured in zip(ordered, measures, strict=True)
    ]
    return Group(key=key, metric=cells[0].metric, places=tuple(places))


def _runs(cells: Iterable[Cell], measure: Measure) -> dict[_Run, float]:
    """Returns the value of each run; the mean of several cells with the same source seed and draw."""
    values: dict[_Run, list[float]] = defaultdict(list)
    for cell in cells:
        value = cell.accuracy if measure == "accuracy" else cell.robust_accuracy
        if value is not None:
            values[cell.source_seed, cell.seed].append(value)
    return {run: sum(found) / len(found) for run, found in values.items()}


def _replicate(runs: Mapping[_Run, float], resolution: float) -> Replication:
    seeds, draws = [seed for seed, _ in runs], [draw for _, draw in runs]
    return replicate(list(runs.values()), seeds, draws, resolution=resolution)


def _judged(compared: Sequence[tuple[Mapping[_Run, float], float]]) -> list[Difference]:
    """Returns the differences of a family of comparisons, each given with its resolution, with Holm's adjustment."""
    estimates = [_replicate(pairs, resolution) for pairs, resolution in compared]
    tested = [estimate.p_value for estimate in estimates]
    adjusted = iter(holm([p_value for p_value in tested if p_value is not None]))
    adjusted_or_none = [None if p_value is None else next(adjusted) for p_value in tested]
    decided = sum(p_value is not None and p_value < LEVEL for p_value in adjusted_or_none)
    # Holm's method tests the next comparison at this level, once the others that are decided have been set aside.
    level = LEVEL / max(1, len(compared) - decided)
    judged = []
    for (pairs, _), estimate, p_value in zip(compared, estimates, adjusted_or_none, strict=True):
        is_decided = p_value is not None and p_value < LEVEL
        verdict: Verdict = "not decided by this many runs"
        if is_decided:
            verdict = "better" if estimate.mean > 0 else "worse"
        judged.append(
            Difference(
                estimate=estimate,
                p_value=estimate.p_value,
                holm_p_value=p_value,
                verdict=verdict,
                clusters_to_decide=None if is_decided else estimate.clusters_to_decide(level),
                bootstrap=cluster_bootstrap(list(pairs.values()), *zip(*pairs, strict=True)),
                wins=sum(value > 0 for value in pairs.values()),
            )
        )
    return judged


def _answer_pairs(group: Group, measure: Measure) -> tuple[dict[_Run, float], Literal["only", "validation", "mean"]]:
    """Returns the difference of each run for the answer of the study, and how the epsilon was found."""
    if group.standard is None:
        return {}, "only"
    standard = _runs(group.standard.cells, measure)
    robust = [_runs(place.cells, measure) for place in group.robust_places]
    runs = set(standard).intersection(*map(set, robust)) if robust else set()
    if len(robust) == 1:
        return {run: robust[0][run] - standard[run] for run in runs}, "only"
    validation = [_validation(place.cells) for place in group.robust_places]
    if any(run not in values for run in runs for values in validation):
        return {run: sum(each[run] for each in robust) / len(robust) - standard[run] for run in runs}, "mean"
    chosen = {run: max(range(len(robust)), key=lambda place: validation[place][run]) for run in runs}
    return {run: robust[place][run] - standard[run] for run, place in chosen.items()}, "validation"


def _validation(cells: Iterable[Cell]) -> dict[_Run, float]:
    return {(cell.source_seed, cell.seed): cell.validation_value for cell in cells if cell.validation_value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _resolution(cells: Sequence[Cell]) -> float:
    images = max(cell.num_test_images for cell in cells)
    return 1 / images if images else 0.0
