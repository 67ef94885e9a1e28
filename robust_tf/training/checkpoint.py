"""What a training run needs to go on exactly where it stopped, in one file that is never half-written."""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
        epochs_done: finished epochs.
        best_epoch: the epoch (from 0) whose weights are the best so far, or -1.
        best_value: its validation figure.
        best_loss: its validation loss, which decides between equal figures.
        seconds: spent in training so far.
        history: for each finished epoch its figures by name.
        rollbacks: how often an alarm made the run go back.
        alarms: every warning so far, also those of epochs that were thrown away.
    """

    epochs_done: int = 0
    best_epoch: int = -1
    best_value: float = float("-inf")
    best_loss: float = float("inf")
    seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    rollbacks: int = 0
    alarms: list[str] = dataclasses.field(default_factory=list)


class Checkpoints:
    """The folder `checkpoints/` of a workdir: `latest.npz` (everything) and `best.npz` (the weights to keep).

    Both are plain NumPy archives: every variable in order, under its number and name, and the progress as JSON.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._latest = folder / "latest.npz"
        self._best = folder / "best.npz"

    @property
    def exists(self) -> bool:
        return self._latest.exists()

    def save(
        self, progress: Progress, classifier: keras.Model, optimizer: keras.optimizers.Optimizer, *, is_best: bool
    ) -> None:
        """Writes the state after an epoch; the best weights first, so that `latest` never names a missing file."""
        if is_best:
            _write(self._best, progress, classifier.variables)
        _write(self._latest, progress, [*classifier.variables, *optimizer.variables])

    def restore(self, classifier: keras.Model, optimizer: keras.optimizers.Optimizer) -> Progress:
        """Puts the latest state into the (built) classifier and optimizer."""
        return _read(self._latest, [*classifier.variables, *optimizer.variables])

    def peek(self) -> Progress:
        """The latest progress, without any variable."""
        return _read(self._latest, None)

    def replace_progress(self, progress: Progress) -> None:
        """Changes what the latest state says of the run, and keeps its variables."""
        with np.load(self._latest, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name != "progress"}
        _write_arrays(self._latest, progress, arrays)

    def restore_best(self, classifier: keras.Model) -> None:
        """Puts the weights of the best epoch into the classifier."""
        _read(self._best, classifier.variables)


def _names(variables: Sequence[keras.Variable]) -> list[str]:
    # Not the path: the parts of it that Keras numbers (random generators) differ between processes.
    return [f"{index:04d} {variable.name}" for index, variable in enumerate(variables)]


def _write(path: pathlib.Path, progress: Progress, variables: Sequence[keras.Variable]) -> None:
    arrays = dict(zip(_names(variables), (keras.ops.convert_to_numpy(v) for v in variables), strict=True))
    _write_arrays(path, progress, arrays)


def _write_arrays(path: pathlib.Path, progress: Progress, arrays: dict[str, Any]) -> None:
    with replaced_atomically(path) as temporary:
        np.savez(temporary, progress=np.array(json.dumps(dataclasses.asdict(progress))), **arrays)


def _read(path: pathlib.Path, variables: Sequence[keras.Variable] | None) -> Progress:
    try:
        with np.load(path, allow_pickle=False) as archive:
            progress: dict[str, Any] = json.loads(str(archive["progress"]))
            values = None if variables is None else [archive[name] for name in _names(variables)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"Cannot read the checkpoint {path}: {error}. Delete the folder {path.parent} to train from the start."
        ) from error
    # Read completely before the first assignment: a broken file leaves the model as it was.
    for variable, value in zip(variables or [], values or [], strict=True):
        if tuple(variable.shape) != value.shape:
            raise UserError(
                f"The checkpoint {path} is of another model: {variable.path} has shape {value.shape} there and "
                f"{tuple(variable.shape)} here. Choose another --workdir."
            )
    for variable, value in zip(variables or [], values or [], strict=True):
        variable.assign(value)
    return Progress(**progress)
