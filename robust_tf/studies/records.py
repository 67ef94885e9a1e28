"""The table `cells.csv` of a study: one line for each finished cell.

A cell is a transfer job at one place of the grid. The program that runs the cells writes this table, and the
statistics, the figures and the report read nothing else about them. Nothing here imports TensorFlow.
"""

import csv
import dataclasses
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically

CELLS = "cells.csv"
# The columns of the other flags that vary stand after this field.
_LAST_BEFORE_VARIED = "seed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A finished cell: what was transferred to what, and the accuracies on the test images.

    An empty text or None means that a value is unknown or does not apply.

    Attributes:
        cell: Name of the cell, which is the name of its folder in cells/.
        source: Name of a published model, or the path of the source relative to the folder of the study.
        source_architecture: Architecture of the source, such as "resnet20".
        source_norm: Norm of the perturbations in the training of the source, "l2" or "linf".
        source_epsilon: Radius of these perturbations, in [0, 1] pixel units; 0 for standard training.
        source_dataset: Data set of the source.
        source_classes: Classes of this data set that were kept, as in the flag; empty if all were.
        source_seed: Seed of the training of the source; None for a published model.
        dataset: Data set of the cell.
        classes: Classes of this data set that were kept, as in the flag; empty if all were.
        transfer_mode: What the transfer trained, such as "fixed_feature".
        examples_per_class: Number of training labels of each class; None if all were used.
        seed: Seed of the cell, which draws the training labels.
        varied: Values of the other flags that vary, by the names of their columns: the name of the flag, after
            "source_" for a flag of the source.
        chosen: Whether the cell counts: false if validation prefers another value of an axis such as the learning rate.
        metric: Metric of `accuracy`, "accuracy" or "mean_per_class_accuracy".
        validation_value: Value of the metric on the validation part, in [0, 1].
        accuracy: Value of the metric on the test images, in [0, 1].
        accuracy_low: Lower end of the 95 % interval of the accuracy over the test images.
        accuracy_high: Upper end of this interval.
        robust_accuracy: Share of the test images that are classified correctly under the attack, in [0, 1]; None
            without an attack.
        robust_low: Lower end of the 95 % interval of the robust accuracy over the test images.
        robust_high: Upper end of this interval.
        robust_norm: Norm of the attack.
        robust_epsilon: Radius of the attack, in [0, 1] pixel units.
        source_accuracy: Accuracy of the source on its own test images, in [0, 1].
        source_robust_accuracy: Robust accuracy of the source on its own test images, in [0, 1].
        num_test_images: Number of test images.
        seconds: Time that the cell took, in seconds.
        weights_sha256: SHA-256 of the weights of the classifier.
        robust_tf: Version of this package that ran the cell.
        tensorflow: Version of TensorFlow.
        keras: Version of Keras.
    """

    cell: str
    source: str
    source_architecture: str = ""
    source_norm: str = ""
    source_epsilon: float | None = None
    source_dataset: str = ""
    source_classes: str = ""
    source_seed: int | None = None
    dataset: str
    classes: str = ""
    transfer_mode: str
    examples_per_class: int | None = None
    seed: int
    varied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chosen: bool = True
    metric: str = "accuracy"
    validation_value: float | None = None
    accuracy: float
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    robust_accuracy: float | None = None
    robust_low: float | None = None
    robust_high: float | None = None
    robust_norm: str = ""
    robust_epsilon: float | None = None
    source_accuracy: float | None = None
    source_robust_accuracy: float | None = None
    num_test_images: int = 0
    seconds: float = 0.0
    weights_sha256: str = ""
    robust_tf: str = ""
    tensorflow: str = ""
    keras: str = ""


_FIELDS = [field.name for field in dataclasses.fields(Cell) if field.name != "varied"]
_REQUIRED = [
    field.name for field in dataclasses.fields(Cell) if field.default is field.default_factory is dataclasses.MISSING
]
_TYPES = typing.get_type_hints(Cell)


def write_cells(path: pathlib.Path, cells: Iterable[Cell]) -> None:
    """Writes the table of the cells, sorted by their names, as a whole.

    Args:
        path: File to write. An interruption leaves the file as it was.
        cells: The cells. The columns of the varied flags are the union over all cells, in the order of their names.

    Raises:
        UserError: Two cells have the same name, or the file cannot be written.

    Example:
        >>> cell = Cell(
        ...     cell="a", source="source", dataset="digits", transfer_mode="fixed_feature", seed=0, accuracy=0.5
        ... )
        >>> write_cells(pathlib.Path("cells.csv"), [cell])
        >>> read_cells(pathlib.Path("cells.csv")) == [cell]
        True
    """
    ordered = sorted(cells, key=lambda cell: cell.cell)
    for first, second in zip(ordered, ordered[1:], strict=False):
        if first.cell == second.cell:
            raise UserError(f"The cells of a study must have different names. Received twice: {first.cell!r}.")
    varied = sorted({name for cell in ordered for name in cell.varied})
    place = _FIELDS.index(_LAST_BEFORE_VARIED) + 1
    with replaced_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_FIELDS[:place], *varied, *_FIELDS[place:]])
        for cell in ordered:
            values = [_text(getattr(cell, name)) for name in _FIELDS]
            writer.writerow([*values[:place], *(cell.varied.get(name, "") for name in varied), *values[place:]])


def read_cells(path: pathlib.Path) -> list[Cell]:
    """Returns the cells of a table in its order.

    Columns that are not fields of `Cell` are flags that vary. Empty values of these columns are left out of `varied`.

    Args:
        path: File to read.

    Raises:
        UserError: The file cannot be read, a column is missing, or a value has the wrong type.

    Example:
        >>> _ = pathlib.Path("cells.csv").write_text("cell,seed")
        >>> read_cells(pathlib.Path("cells.csv"))
        Traceback (most recent call last):
        ...
        robust_tf.errors.UserError: cells.csv has no column 'source'...
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"Cannot read the cells of the study. Received: {path} ({error}).") from error
    for name in _REQUIRED:
        if name not in columns:
            raise UserError(f"{path} has no column {name!r}. Delete the file, and start the study again to write it.")
    varied = [name for name in columns if name not in _FIELDS]
    return [_cell(path, number, row, varied) for number, row in enumerate(rows, start=2)]


def _cell(path: pathlib.Path, line: int, row: Mapping[str, Any], varied: list[str]) -> Cell:
    if None in row or None in row.values():
        raise UserError(f"Line {line} of {path} must have as many values as the head of the table. Received: {row}.")
    values: dict[str, Any] = {"varied": {name: row[name] for name in varied if row[name]}}
    for name in set(row) & set(_FIELDS):
        if row[name] or name in _REQUIRED:
            values[name] = _value(row[name], name, f"line {line} of {path}")
    return Cell(**values)


def _value(text: str, name: str, where: str) -> Any:
    kind = _TYPES[name]
    if isinstance(kind, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{name} in {where} must be of type {kind.__name__}. Received: {text!r}.") from None


def _text(value: Any) -> str:
    """Returns a value as a cell of the table. The text of a float gives back the same float."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
