"""The axes along which the groups of a study differ, and their values as readers see them."""

import pathlib
from collections.abc import Callable, Iterable, Sequence

from robust_tf.studies.analysis import Group, GroupKey

# Width of a network relative to the narrowest common form of its architecture, with the name of the architecture.
WIDTHS: dict[str, tuple[str, float]] = {
    "resnet20": ("ResNet-20", 1.0),
    "resnet20_width8": ("ResNet-20", 0.5),
    "resnet50": ("ResNet-50", 1.0),
    "wide_resnet50_2": ("ResNet-50", 2.0),
    "wide_resnet50_4": ("ResNet-50", 4.0),
}
DATASET, MODE, PRETRAINING, ARCHITECTURE = "data set", "transfer mode", "pretraining data", "architecture"
NORM, LABELS, ATTACK = "norm", "labels per class", "attack"

_Value = str | int | float | None
_MODES = {"fixed_feature": "fixed features", "full_network": "full network", "partial": "part of the network"}
_NORMS = {"l2": "L2", "linf": "Linf"}
_VALUES: dict[str, Callable[[GroupKey], _Value]] = {
    DATASET: lambda key: dataset_text(key.dataset, key.classes),
    MODE: lambda key: _MODES.get(key.transfer_mode, key.transfer_mode),
    PRETRAINING: lambda key: dataset_text(key.source_dataset, key.source_classes),
    ARCHITECTURE: lambda key: key.source_architecture,
    NORM: lambda key: _NORMS.get(key.source_norm, key.source_norm),
    LABELS: lambda key: key.examples_per_class,
    ATTACK: lambda key: f"{norm_text(key.robust_norm)} {epsilon_text(key.robust_epsilon, key.robust_norm)}",
}


def axes_of(groups: Iterable[Group]) -> list[str]:
    """Returns the names of the axes on which groups have different values, in the order in which titles name them.

    Args:
        groups: Groups of a study. A flag that varies is an axis with the name of the flag.
    """
    groups = list(groups)
    names = [*list(_VALUES)[:-2], *sorted({name for group in groups for name, _ in group.key.varied}), LABELS, ATTACK]
    return [name for name in names if len({value_of(group, name) for group in groups}) > 1]


def value_of(group: Group, axis: str) -> _Value:
    """Returns the value of a group on an axis; None for a number that is not set, an empty text for a flag."""
    if axis in _VALUES:
        return _VALUES[axis](group.key)
    return dict(group.key.varied).get(axis, "")


def values_on(groups: Iterable[Group], axis: str) -> list[_Value]:
    """Returns the different values of groups on an axis, with numbers in their order and None last."""
    return sorted({value_of(group, axis) for group in groups}, key=_sorting)


def text_of(axis: str, value: _Value) -> str:
    """Returns a value for a title or a legend.

    Args:
        axis: Name of the axis.
        value: Value of a group on it.

    Example:
        >>> text_of("labels per class", 20), text_of("labels per class", None), text_of("downscale", "32")
        ('20 labels per class', 'all labels', 'downscale 32')
    """
    if axis == LABELS:
        return "all labels" if value is None else f"{value} labels per class"
    if axis in _VALUES:
        return f"under {value}" if axis == ATTACK else f"from {value}" if axis == PRETRAINING else str(value)
    return f"{axis.replace('_', ' ')} {value if value else 'unset'}"


def legend_text(value: object) -> str:
    """Returns a value for a legend whose title names the axis: "all" for None, "unset" for an empty text."""
    return "all" if value is None else str(value) or "unset"


def describe(group: Group, axes: Sequence[str]) -> str:
    """Returns the values of a group on some axes, such as "digits, fixed features, 20 labels per class"."""
    return ", ".join(text_of(axis, value_of(group, axis)) for axis in axes)


def dataset_text(dataset: str, classes: str) -> str:
    """Returns a data set with the classes that were kept.

    Args:
        dataset: Data set, as in the flag.
        classes: Labels that were kept, as in the flag; empty if all were.

    Example:
        >>> dataset_text("digits", "5,6,7,8,9"), dataset_text("folder:/data/photos", ""), dataset_text("digits", "1,3")
        ('digits 5-9', 'photos', 'digits 1, 3')
    """
    kind, _, folder = dataset.partition(":")
    name = pathlib.PurePath(folder).name if kind == "folder" and folder else dataset
    labels = [label.strip() for label in classes.strip("()[]").replace(",", " ").split()]
    if not labels:
        return name
    if all(label.isdigit() for label in labels) and len(labels) > 2:
        numbers = [int(label) for label in labels]
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{name} {numbers[0]}-{numbers[-1]}"
    return f"{name} {', '.join(labels)}"


def norm_text(norm: str) -> str:
    """Returns a norm as readers know it, such as "L2"."""
    return _NORMS.get(norm, norm)


def epsilon_text(epsilon: float | None, norm: str) -> str:
    """Returns a radius in the unit that is usual for its norm.

    Args:
        epsilon: Radius in [0, 1] pixel units; None if it is unknown.
        norm: "l2" or "linf".

    Example:
        >>> epsilon_text(0.25, "l2"), epsilon_text(4 / 255, "linf"), epsilon_text(0.0, "linf")
        ('0.25', '4/255', '0')
    """
    if epsilon is None:
        return "unknown"
    if norm == "linf" and epsilon and abs(510 * epsilon - round(510 * epsilon)) < 1e-6:
        return f"{round(510 * epsilon) / 2:g}/255"
    return f"{epsilon:.3g}"


def width_of(group: Group) -> tuple[str, float] | None:
    """Returns the family and the relative width of the sources; None if it is unknown.

    If the study varies a flag `width` of the source, its value is the width. Otherwise `WIDTHS` lists the width.
    """
    text = str(value_of(group, "source_width"))
    if text and text.replace(".", "", 1).isdigit():
        return group.key.source_architecture, float(text)
    return WIDTHS.get(group.key.source_architecture)


def _sorting(value: _Value) -> tuple[int, float, str]:
    """Returns a key that sorts numbers by size, also in text, before other text, and None last."""
    if value is None:
        return 2, 0.0, ""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, str(value)
