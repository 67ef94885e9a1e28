"""What a training run needs to go on exactly where it stopped, in files that are whole and checked.

The folder `checkpoints/` of a workdir holds

* `epoch0003_step0000120.npz`: the whole state after 3 epochs and 120 steps of the next one. The two newest are kept,
  and the newest of the end of an epoch; a damaged one falls back to the one before it.
* `best_epoch0002.npz`: the weights of the best epoch, for as long as a kept state names that epoch as its best.

All are plain NumPy archives: every variable in order under its number and name, the progress as JSON, and a SHA-256 of
all that.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import zipfile
from collections.abc import Sequence

import keras
import numpy as np

from robust_tf.console import console
from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically

_KEPT_STATES = 2


@dataclasses.dataclass
class TrainingProgress:
    """How far a run is.

    Attributes:
        epochs_done: finished epochs.
        steps_done: finished steps of the epoch after them; all of its steps are done when only its validation is not.
        best_epoch: the epoch (from 0) whose weights are the best so far, or -1.
        best_value: its validation figure.
        best_loss: its validation loss, which decides between equal figures.
        seconds: spent in training so far.
        history: for each finished epoch its figures by name.
        rates: for each finished epoch the images a second of its training steps; none for one whose steps were another
            process's.
        rollbacks: how often an alarm made the run go back.
        alarms: every warning so far, also those of epochs that were thrown away.
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
    """A checkpoint that was read and found in order.

    Attributes:
        progress: of the run.
        arrays: the variables by number and name.
        path: where it came from.
    """

    progress: TrainingProgress
    arrays: dict[str, np.ndarray]
    path: pathlib.Path

    def assign_to(self, variables: Sequence[keras.Variable]) -> None:
        """Puts the values into the variables; all of them or, if they are those of another model, none.

        Raises:
            UserError: a name or a shape is another one.
        """
        names = _names(variables)
        if names != list(self.arrays):
            other = next((there for here, there in zip(names, self.arrays, strict=False) if here != there), "nothing")
            raise UserError(
                f"The checkpoint {self.path} is of another model: it holds {len(self.arrays)} variables where there "
                f"are {len(names)} here; the first that differs is {other!r}. Choose another --workdir."
            )
        for variable, value in zip(variables, self.arrays.values(), strict=True):
            if tuple(variable.shape) != value.shape:
                raise UserError(
                    f"The checkpoint {self.path} is of another model: {variable.path} has shape {value.shape} there "
                    f"and {tuple(variable.shape)} here. Choose another --workdir."
                )
        for variable, value in zip(variables, self.arrays.values(), strict=True):
            variable.assign(value)


class Checkpoints:
    """The folder `checkpoints/` of a workdir."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    @property
    def exists(self) -> bool:
        return bool(self._states())

    def save(self, progress: TrainingProgress, arrays: dict[str, np.ndarray]) -> None:
        """Writes the whole state (`named_arrays`), reads it back, and only then lets go of older ones.

        Raises:
            UserError: it can't be written. The states that were there are kept.
        """
        self._save_state(progress, arrays)
        self._prune()

    def save_best(self, epoch: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes the weights of an epoch, to be called before the `save` whose progress names them the best."""
        _write(self._best(epoch), TrainingProgress(best_epoch=epoch), arrays)

    def best(self, progress: TrainingProgress) -> State:
        """The weights of the best epoch."""
        return _read(self._best(progress.best_epoch))

    def latest(self) -> State | None:
        """The newest state that is in order, or None when there is no state. Damaged ones are deleted, and said so.

        Raises:
            UserError: there are states, but none is in order.
        """
        states = self._states()
        damage = []
        for path in reversed(states):
            try:
                state = _read(path)
            except UserError as error:
                damage.append(str(error))
                continue
            if damage:
                console.print(f"{' '.join(damage)} Falling back to the checkpoint before: {path.name}.")
                for newer in states[states.index(path) + 1 :]:
                    newer.unlink()
            return state
        if damage:
            raise UserError(f"{' '.join(damage)} Delete the folder {self._folder} to train from the start.")
        return None

    def go_back_an_epoch(self, change: TrainingProgress) -> TrainingProgress:
        """Makes the newest state of the end of an epoch the latest one, with the rollbacks and alarms of `change`."""
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
        """From the oldest to the newest."""
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
                return  # which weights a damaged state needs can't be known: keep all
        for path in self._folder.glob("best_epoch*.npz"):
            if path not in needed:
                path.unlink()


def _position(path: pathlib.Path) -> tuple[int, int]:
    epochs, steps = re.findall(r"\d+", path.stem)
    return int(epochs), int(steps)


def _names(variables: Sequence[keras.Variable]) -> list[str]:
    # Not the path: the parts of it that Keras numbers (random generators) differ between processes.
    return [f"{index:04d} {variable.name}" for index, variable in enumerate(variables)]


def named_arrays(variables: Sequence[keras.Variable]) -> dict[str, np.ndarray]:
    """The values of variables under their numbers and names, as a `State` has them.

    Raises:
        UserError: a value is not finite: such a state is not worth keeping.
    """
    arrays = dict(zip(_names(variables), (keras.ops.convert_to_numpy(v) for v in variables), strict=True))
    for variable, array in zip(variables, arrays.values(), strict=True):
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise UserError(
                f"Training has left the finite numbers. Received: NaN or infinity in {variable.path}. The checkpoint "
                "before is kept. Try a lower --learning_rate, --warmup_epochs=1, or --precision=float32, in a new "
                "--workdir."
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
        np.savez(temporary, progress=np.array(text), sha256=np.array(_digest(text, arrays)), **arrays)  # type: ignore[arg-type]
        _read(temporary)  # what can't be read back must not push an older state out


def _read(path: pathlib.Path) -> State:
    """Raises UserError for a file that is not whole."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        text, digest = str(arrays.pop("progress")), str(arrays.pop("sha256"))
        if _digest(text, arrays) != digest:
            raise ValueError("its content does not have its SHA-256")
        return State(TrainingProgress(**json.loads(text)), arrays, path)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"Cannot read the checkpoint {path}: {error}.") from error


def _read_progress(path: pathlib.Path) -> TrainingProgress:
    """The progress alone, without its variables."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return TrainingProgress(**json.loads(str(archive["progress"])))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"Cannot read the checkpoint {path}: {error}.") from error
