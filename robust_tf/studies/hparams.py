"""The cells of a study in TensorBoard's HParams: one row for each, with its place in the grid and its accuracies."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import tensorflow as tf
from tensorboard.plugins.hparams import api

from robust_tf.errors import UserError
from robust_tf.studies.records import Cell

TENSORBOARD = "tensorboard"
_PLACE = (
    "source source_architecture source_norm source_epsilon source_dataset source_classes source_seed dataset classes "
    "transfer_mode examples_per_class seed chosen"
).split()
_METRICS = ("accuracy", "robust_accuracy", "validation_value")


def write_hparams(workdir: pathlib.Path, cells: Sequence[Cell]) -> None:
    """Writes the folder tensorboard/ of a study, in place of an older one.

    Args:
        workdir: Folder of the study.
        cells: The finished cells.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = workdir / TENSORBOARD
    try:
        with tempfile.TemporaryDirectory(prefix=".tensorboard-", dir=workdir) as temporary:
            # Written as a whole: TensorBoard would show cells of two attempts twice.
            new = pathlib.Path(temporary) / TENSORBOARD
            _write(new, cells)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
            new.rename(folder)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"Cannot write {folder}: {error}. Free some disk space, and start the study again.") from error


def _write(folder: pathlib.Path, cells: Sequence[Cell]) -> None:
    with tf.summary.create_file_writer(str(folder)).as_default():
        settings = [_settings(cell) for cell in cells]
        # A column that is the same in all cells would only take room.
        names = [name for name in dict.fromkeys(name for each in settings for name in each)]
        varying = [name for name in names if len({each.get(name) for each in settings}) > 1]
        metrics = [api.Metric(name) for name in _METRICS]
        api.hparams_config(hparams=[api.HParam(name) for name in varying], metrics=metrics)
    for cell, values in zip(cells, settings, strict=True):
        with tf.summary.create_file_writer(str(folder / cell.cell)).as_default():
            api.hparams({name: value for name, value in values.items() if name in varying}, trial_id=cell.cell)
            for name in _METRICS:
                if (value := getattr(cell, name)) is not None:
                    tf.summary.scalar(name, value, step=0)


def _settings(cell: Cell) -> dict[str, bool | float | int | str]:
    place = {name: getattr(cell, name) for name in _PLACE}
    return {name: value for name, value in {**place, **cell.varied}.items() if value is not None}
