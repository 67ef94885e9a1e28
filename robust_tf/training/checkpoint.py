"""Checkpoints: verified files from which a training run continues exactly where it stopped.

The folder `checkpoints/` of a workdir holds two kinds of files:

* `epoch0003_step0000120.npz`: the whole state after 3 epochs and 120 steps of the next one. The two newest files are
  kept, and also the newest one from the end of an epoch. If a file is damaged, the run continues from the one before.
* `best_epoch0002.npz`: the weights of the best epoch. It is kept as long as a state names that epoch as its best.

Each file is a plain NumPy archive with a format number, all variables in order (each key is a number and a name),
the progress as JSON, and a SHA-256 of the variables and the progress.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import zipfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from robust_tf.console import console
from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically

# Increase this number whenever older versions could not read the new files. Files in older formats must then be
# refused or converted.
FORMAT = 1

_KEPT_STATES = 2


@dataclasses.dataclass
class TrainingProgress:
    """The progress of a training run.

    Attributes:
        epochs_done: Number of finished epochs.
        steps_done: Number of finished steps in the current epoch. When only the validation is left, this is the number
            of steps in an epoch.
        best_epoch: The epoch, counted from 0, with the best weights so far; -1 if there is none.
        best_value: Value of the validation metric in the best epoch.
        best_loss: Validation loss of the best epoch, which breaks ties.
        seconds: Training time so far.
        history: Metrics by name, for each finished epoch.
        rates: Training speed in images per second, for each finished epoch. An epoch whose steps all ran in an earlier
            process has no entry.
        rollbacks: Number of times that an alarm made the run go back to an earlier state.
        alarms: All warnings so far, including those of epochs that were discarded.
    """

    epochs_done: int = 0
    steps_done: int = 0
    best_epoch: int = -1
    best_value: float = float("-inf")
    best_loss: float = float("inf")
    seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    rates: list[float] = dataclasses.field(default_factory=list)
    rollbacks: int = 0
    alarms: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class State:
    """The content of a checkpoint that has been read and verified.

    Attributes:
        progress: Progress of the run.
        arrays: Values of the variables by number and name.
        path: Path of the file.
    """

    progress: TrainingProgress
    arrays: dict[str, np.ndarray]
    path: pathlib.Path

    def assign_to(self, variables: Sequence[keras.Variable]) -> None:
        """Assigns the values to the variables. If the variables belong to another model, none of them is changed.

        Args:
            variables: Variables in the order in which they were saved.

        Raises:
            UserError: The names or shapes of the variables differ from those in the file.
        """
        names = _names(variables)
        if names != list(self.arrays):
            other = next((there for here, there in zip(names, self.arrays, strict=False) if here != there), "nothing")
            raise UserError(
                f"The checkpoint {self.path} belongs to another model: it holds {len(self.arrays)} variables, and this "
                f"model has {len(names)}; the first that differs is {other!r}. Choose another workdir."
            )
        for variable, value in zip(variables, self.arrays.values(), strict=True):
            if tuple(variable.shape) != value.shape:
                raise UserError(
                    f"The checkpoint {self.path} belongs to another model: {variable.path} has shape {value.shape} in "
                    f"the file and {tuple(variable.shape)} in this model. Choose another workdir."
                )
        for variable, value in zip(variables, self.arrays.values(), strict=True):
            variable.assign(value)


class UnknownFormat(UserError):
    """A checkpoint has a format that this version does not read. The file is not damaged."""


class Checkpoints:
    """The folder `checkpoints/` of a workdir.

    Args:
        folder: Path of the folder. It is created by the first `save`.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    @property
    def exists(self) -> bool:
        """Whether the folder holds any state."""
        return bool(self._states())

    def save(self, progress: TrainingProgress, arrays: dict[str, np.ndarray]) -> None:
        """Writes the whole state, reads it back to verify it, and only then deletes older states.

        Args:
            progress: Progress of the run.
            arrays: Values of all variables, from `named_arrays`.

        Raises:
            UserError: The state cannot be written. The older states are kept.
        """
        self._save_state(progress, arrays)
        self._prune()

    def save_best(self, epoch: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes the weights of the best epoch. Call it before the `save` whose progress names that epoch."""
        _write(self._best(epoch), TrainingProgress(best_epoch=epoch), arrays)

    def best(self, progress: TrainingProgress) -> State:
        """Returns the weights of the best epoch."""
        return _read(self._best(progress.best_epoch))

    def latest(self) -> State | None:
        """Returns the newest intact state, or None if there is no state. Reports and deletes damaged newer ones.

        Raises:
            UserError: There are states, but all of them are damaged.
            UnknownFormat: The newest state has a format that this version does not read.
        """
        states = self._states()
        damage = []
        for path in reversed(states):
            try:
                state = _read(path)
            except UnknownFormat:
                raise  # the file is intact and must not be deleted
            except UserError as error:
                damage.append(str(error))
                continue
            if damage:
                console.print(f"{' '.join(damage)} Falling back to the previous checkpoint: {path.name}.")
                for newer in states[states.index(path) + 1 :]:
                    newer.unlink()
            return state
        if damage:
            raise UserError(f"{' '.join(damage)} Delete the folder {self._folder} to train from the start.")
        return None

    def go_back_an_epoch(self, change: TrainingProgress) -> TrainingProgress:
        """Goes back to the newest state that was saved at the end of an epoch. Later states are deleted.

        Args:
            change: Progress with the rollbacks and alarms to store in that state.

        Returns:
            The progress of that state, with these rollbacks and alarms.
        """
        path = [path for path in self._states() if _position(path)[1] == 0][-1]
        state = _read(path)
        progress = dataclasses.replace(state.progress, rollbacks=change.rollbacks, alarms=change.alarms)
        self._save_state(progress, state.arrays)
        for newer in self._states():
            if _position(newer) > _position(path):
                newer.unlink()
        return progress

    def _save_state(self, progress: TrainingProgress, arrays: dict[str, np.ndarray]) -> None:
        path = self._folder / f"epoch{progress.epochs_done:04d}_step{progress.steps_done:07d}.npz"
        _write(path, progress, arrays)

    def _states(self) -> list[pathlib.Path]:
        """Returns the paths of the states, the oldest first."""
        return sorted(self._folder.glob("epoch*_step*.npz"), key=_position)

    def _best(self, epoch: int) -> pathlib.Path:
        return self._folder / f"best_epoch{epoch:04d}.npz"

    def _prune(self) -> None:
        states = self._states()
        kept = {*states[-_KEPT_STATES:], *[path for path in states if _position(path)[1] == 0][-1:]}
        for path in states:
            if path not in kept:
                path.unlink()
        needed = set()
        for path in kept:
            try:
                needed.add(self._best(_read_progress(path).best_epoch))
            except UserError:
                return  # it is unknown which weights an unreadable state needs, so keep them all
        for path in self._folder.glob("best_epoch*.npz"):
            if path not in needed:
                path.unlink()


def _position(path: pathlib.Path) -> tuple[int, int]:
    epochs, steps = re.findall(r"\d+", path.stem)
    return int(epochs), int(steps)


def _names(variables: Sequence[keras.Variable]) -> list[str]:
    # The name, not the path: Keras numbers parts of the paths (random generators) differently in each process.
    return [f"{index:04d} {variable.name}" for index, variable in enumerate(variables)]


def named_arrays(variables: Sequence[keras.Variable]) -> dict[str, np.ndarray]:
    """Returns the values of the variables under their numbers and names, as in `State.arrays`.

    Args:
        variables: Variables in a fixed order.

    Raises:
        UserError: A value is NaN or infinite. Such a state is not worth saving.
    """
    arrays = dict(zip(_names(variables), (keras.ops.convert_to_numpy(v) for v in variables), strict=True))
    for variable, array in zip(variables, arrays.values(), strict=True):
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise UserError(
                f"Training has diverged. Received: NaN or infinity in {variable.path}. The previous checkpoint is "
                "kept. Try a lower learning_rate, warmup_epochs=1, or precision=float32, in a new workdir."
            )
    return arrays


def _digest(progress: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(progress.encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _write(path: pathlib.Path, progress: TrainingProgress, arrays: dict[str, np.ndarray]) -> None:
    text = json.dumps(dataclasses.asdict(progress))
    with replaced_atomically(path) as temporary:
        header = {"format": np.array(FORMAT), "progress": np.array(text), "sha256": np.array(_digest(text, arrays))}
        np.savez(temporary, **header, **arrays)  # type: ignore[arg-type]
        _read(temporary)  # a file that cannot be read back must not replace an older state


def _read(path: pathlib.Path) -> State:
    """Reads a whole file and verifies it."""
    try:
        # Opened here, because NumPy does not close a file that turns out to be damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            _check_format(path, archive)
            arrays = {name: archive[name] for name in archive.files if name != "format"}
        text, digest = str(arrays.pop("progress")), str(arrays.pop("sha256"))
        if _digest(text, arrays) != digest:
            raise ValueError("its content does not match its SHA-256")
        return State(TrainingProgress(**json.loads(text)), arrays, path)
    except UnknownFormat:
        raise
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"Cannot read the checkpoint {path}: {error}.") from error


def _check_format(path: pathlib.Path, archive: Any) -> None:
    """Refuses a file of another format. A file without a format number has format 1."""
    found = int(archive["format"]) if "format" in archive.files else 1
    if found != FORMAT:
        raise UnknownFormat(
            f"This version of robust_tf reads checkpoints of format {FORMAT}. Received: {path} of format {found}. "
            "Continue the run with the version of robust_tf that wrote it, or choose another workdir."
        )


def _read_progress(path: pathlib.Path) -> TrainingProgress:
    """Reads the progress alone, without the variables."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            _check_format(path, archive)
            return TrainingProgress(**json.loads(str(archive["progress"])))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"Cannot read the checkpoint {path}: {error}.") from error
