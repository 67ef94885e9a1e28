"""Logs of a training run for TensorBoard."""

import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.sharing import MOST_TRAINERS, shared
from robust_tf.training.callbacks import averages_in_place

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Names in the charts, by the names in Keras's logs. With an attack, `loss` and `accuracy` are measured on adversarial
# images.
_ADVERSARIAL_NAMES = {"loss": "adversarial_loss", "accuracy": "adversarial_accuracy"}
_STANDARD_NAMES = {"loss": "clean_loss", "accuracy": "clean_accuracy"}


class TensorBoardLogger(keras.callbacks.Callback):
    """Writes charts over the steps and epochs, and after each epoch a picture of the attack on the same few images.

    As in Keras, the step charts show the mean over the epoch so far. Training and validation are two TensorBoard runs
    with the same chart names, so that TensorBoard draws both in one chart.

    Args:
        folder: Folder in which the subfolders train/ and validation/ are created.
        attack: Attack of the validation, which makes the adversarial images of the picture.
        preview: Images (count, height, width, 3) in [0, 1] and labels (count,) for the picture.
        progress: Object with the attribute `images_per_second`.
        steps_per_epoch: Number of steps in an epoch, to number the steps of a resumed run.
        every_steps: Number of steps between two points of the step charts.
        share_trace: Whether later loggers of the same classifier object, which may have other weights by then, use the
            traced attack again. This needs `robust_tf.sharing.sharing`.
        picture: Function that draws the picture, (height, width, 3) in [0, 1], instead of this class. `preview` is not
            used then.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        attack: AttackConfig,
        preview: tuple[np.ndarray, np.ndarray],
        progress: Any,
        steps_per_epoch: int,
        every_steps: int,
        share_trace: bool = False,
        picture: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        self._train = tf.summary.create_file_writer(str(folder / "train"))
        self._validation = tf.summary.create_file_writer(str(folder / "validation"))
        self._attack = attack
        self._preview = preview
        self._progress = progress
        self._steps_per_epoch = steps_per_epoch
        self._every_steps = every_steps
        self._names = _ADVERSARIAL_NAMES if attack.active else _STANDARD_NAMES
        self._share_trace = share_trace
        self._picture = picture or self._attack_picture
        self._examples: Any = None
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the number of the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds a point to the step charts every `every_steps` steps."""
        step = self._epoch * self._steps_per_epoch + batch
        if step % self._every_steps == 0:
            self._scalars(self._train, "step", self._with_settings(logs or {}), step)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds a point to the epoch charts, and the picture of the attack."""
        logs = logs or {}
        train = {name: value for name, value in logs.items() if not name.startswith("val_")}
        validation = {name[4:]: value for name, value in logs.items() if name.startswith("val_")}
        self._scalars(self._train, "epoch", self._with_settings(train), epoch)
        self._scalars(self._validation, "epoch", validation, epoch)
        with self._validation.as_default(), averages_in_place(self.model):
            tf.summary.image("attack", self._picture()[None], step=epoch)
        for writer in (self._train, self._validation):
            writer.flush()

    def _with_settings(self, logs: dict[str, Any]) -> dict[str, Any]:
        settings = {"learning_rate": float(self.model.optimizer.learning_rate), "epsilon": self.model.epsilon}
        rate = self._progress.images_per_second
        # The speed is unknown in the first step of a run, and in an epoch that was resumed just before its validation.
        return {**logs, **settings, **({"images_per_second": rate} if rate else {})}

    def _scalars(self, writer: tf.summary.SummaryWriter, group: str, values: dict[str, Any], step: int) -> None:
        with writer.as_default():
            for name, value in values.items():
                tf.summary.scalar(f"{group}/{self._names.get(name, name)}", value, step=step)

    def _attack_picture(self) -> np.ndarray:
        """Returns three rows: clean images, adversarial images, and the perturbations, scaled to the full range."""
        images, labels = self._preview
        if not self._attack.active:
            return _tiled([images])
        if self._examples is None:
            classifier, attack = self.model.classifier, self._attack
            traced = tf.function(lambda x, y: run_pgd(classifier, x, y, attack=attack).images_adv)
            key = ("examples", classifier, attack)
            self._examples = shared(key, lambda: traced, most=MOST_TRAINERS) if self._share_trace else traced
        images_adv = self._examples(tf.constant(images), tf.constant(labels)).numpy()
        perturbation = images_adv - images
        largest = np.abs(perturbation).max() or 1.0
        return _tiled([images, images_adv, 0.5 + 0.5 * perturbation / largest])


class ProfileSteps(keras.callbacks.Callback):
    """Profiles a range of steps for TensorBoard's Profile tab.

    Args:
        folder: Folder in which the subfolder plugins/profile/ is created.
        first: First step to profile, counted from 1 in this run. Step 1 traces and compiles.
        last: Last step to profile.
    """

    def __init__(self, folder: pathlib.Path, first: int, last: int) -> None:
        super().__init__()
        self._folder, self._first, self._last = folder, first, last
        self._step = 0
        self._recording = False

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the profiler before the first step of the range."""
        self._step += 1
        if self._step == self._first:
            tf.profiler.experimental.start(str(self._folder))
            self._recording = True

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stops the profiler after the last step of the range."""
        if self._recording and self._step == self._last:
            float((logs or {}).get("loss", 0.0))  # waits until the device has done the step
            self._stop()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stops the profiler if training ends before the last step of the range."""
        if self._recording:
            self._stop()

    def _stop(self) -> None:
        tf.profiler.experimental.stop()
        self._recording = False


def _tiled(rows: list[np.ndarray], *, smallest: int = 64) -> np.ndarray:
    """Returns one picture (height, width, 3) with rows of images. Small images are enlarged by an integer factor."""
    factor = max(1, smallest // rows[0].shape[1])
    tiles = np.stack(rows).repeat(factor, axis=2).repeat(factor, axis=3)  # (row, column, height, width, 3)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    count, columns, height, width, channels = tiles.shape
    return tiles.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, channels)


def write_config(folder: pathlib.Path, flag_file: str) -> None:
    """Writes the flags of a job for TensorBoard's Text tab.

    Args:
        folder: Folder of the logs.
        flag_file: Content of the flag file.
    """
    indented = "\n".join(f"    {line}" for line in flag_file.splitlines())  # preformatted text in Markdown
    with tf.summary.create_file_writer(str(folder / "train")).as_default():
        tf.summary.text("flags", indented, step=0)


def write_history(folder: pathlib.Path, history: Sequence[dict[str, float]]) -> None:
    """Writes the epoch charts of a finished standard training.

    Args:
        folder: Folder of the logs.
        history: Metrics by name for each epoch, with the prefix "val_" for the validation part.
    """
    for run, chosen in (("train", False), ("validation", True)):
        with tf.summary.create_file_writer(str(folder / run)).as_default():
            for epoch, logs in enumerate(history):
                for name, value in logs.items():
                    if name.startswith("val_") == chosen:
                        name = name.removeprefix("val_")
                        tf.summary.scalar(f"epoch/{_STANDARD_NAMES.get(name, name)}", value, step=epoch)


def write_result(
    folder: pathlib.Path,
    *,
    settings: dict[str, bool | int | float | str],
    figures: dict[str, float],
    confusion: np.ndarray,
    class_names: tuple[str, ...],
) -> None:
    """Writes the result of a job: the hyperparameters with the test metrics, and a picture of the confusion matrix.

    Args:
        folder: Folder of the logs.
        settings: Hyperparameters by name.
        figures: Test metrics by name.
        confusion: Confusion matrix (num_classes, num_classes), with the true classes in rows.
        class_names: Names of the classes.
    """
    with tf.summary.create_file_writer(str(folder / "test")).as_default():
        hparams.hparams(settings)
        for name, value in figures.items():
            tf.summary.scalar(f"test/{name}", value, step=0)
        tf.summary.image("confusion", _confusion_picture(confusion, class_names)[None], step=0)


def write_test_figures(folder: pathlib.Path, *, figures: dict[str, float], sheet: np.ndarray) -> None:
    """Writes the test metrics of a network for detection or segmentation, and the picture of its examples.

    Args:
        folder: Folder of the logs.
        figures: Test metrics by name.
        sheet: Picture (height, width, 3) uint8.
    """
    with tf.summary.create_file_writer(str(folder / "test")).as_default():
        for name, value in figures.items():
            tf.summary.scalar(f"test/{name}", value, step=0)
        tf.summary.image("examples", sheet[None], step=0)


def axis_name(name: str, length: int = 24) -> str:
    """Returns a class name as a label for matplotlib: shortened, and with "$" escaped.

    Args:
        name: Name of the class.
        length: Highest number of characters.
    """
    name = " ".join(name.split())
    name = name if len(name) <= length else f"{name[: length - 1]}…"
    return name.replace("$", r"\$")


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draws which share of each true class (row) got each prediction (column). The caller must close the figure.

    Args:
        confusion: Confusion matrix (num_classes, num_classes), with the true classes in rows.
        class_names: Names of the classes.
    """
    count = len(class_names)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    names = [axis_name(name) for name in class_names]
    # With few classes the plot is small, so that its text is legible when a page or TensorBoard enlarges it.
    side = min(max(2.5, 1.0 + 0.3 * count) + 0.08 * max(map(len, names)), 14)
    figure, axes = pyplot.subplots(figsize=(side + 0.9, side), layout="constrained")
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xlabel("prediction")
    axes.set_ylabel("true class")
    if count <= 50:  # more names would be illegible
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= 20:
        for row, column in np.ndindex(count, count):
            if confusion[row, column]:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=color)
    return figure


def _confusion_picture(confusion: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Returns the drawn confusion matrix as pixels (height, width, 4), uint8."""
    figure = confusion_figure(confusion, class_names)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    pyplot.close(figure)
    picture: np.ndarray = tf.io.decode_png(buffer.getvalue()).numpy()
    return picture
