"""Shows the progress of training: one bar for all epochs, and one line for each finished epoch."""

import time
from collections.abc import Callable
from typing import Any

import keras
from rich.progress import Progress, TaskID

from robust_tf.console import LogLines, console, end_time, progress_bar, speed_text


class ProgressBar(keras.callbacks.Callback):
    """Shows one progress bar for all epochs and prints one line for each finished epoch.

    Args:
        num_images: Number of training images in an epoch.
        batch_size: Number of images in a step.
        epochs: Number of epochs of the whole training.
        adversarial: Whether the compiled metrics are measured on adversarial images.
        epsilon: Function that returns the current epsilon of the attack. None if epsilon is constant during training.
        compiles: Whether XLA compiles the first step.
        metric: Name of the validation metric whose values "clean_..." and "robust_..." are in the logs. None for
            classification, whose accuracies are compiled metrics.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        epochs: int,
        adversarial: bool,
        epsilon: Callable[[], float] | None = None,
        compiles: bool = False,
        metric: str | None = None,
    ) -> None:
        super().__init__()
        self._metric = metric
        self.images_per_second = 0.0  # in the last epoch; other callbacks log it
        self._num_images, self._batch_size, self._epochs = num_images, batch_size, epochs
        self._adversarial, self._epsilon = adversarial, epsilon
        self._before_first_step = "compiling" if compiles else "starting"
        self._lines = LogLines()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epoch = self._first_epoch = 0
        self._traced = False
        self._loss: Any = None
        self._steps_ended: float | None = None
        self._between_epochs = 0.0  # seconds for validation, alarms and checkpoints after the last finished epoch

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts the bar."""
        self._bar, self._task = progress_bar(), None
        self._bar.start()
        self._traced = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts measuring the speed of the epoch."""
        if self._bar is not None and self._task is None:
            self._first_epoch = epoch
            # Without a total, the bar moves to and fro until the first step has ended.
            self._task = self._bar.add_task(self._before_first_step, total=None, rate="", ends=None, figures="")
        self._epoch = epoch
        self._start = time.perf_counter()
        if self._steps_ended is not None:
            self._between_epochs = self._start - self._steps_ended
        self._images_before_start = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Updates the bar. It shows the loss of the step before, which can be read without waiting for the device."""
        now = time.perf_counter()
        images = min((batch + 1) * self._batch_size, self._num_images)
        if not self._traced and images < self._num_images:
            # The first step of a run traces the graph, so its time says nothing about the speed.
            self._start, self._images_before_start = now, images
        else:
            self.images_per_second = (images - self._images_before_start) / (now - self._start)
        self._traced = True
        self._steps_ended = now
        rate, seconds = speed_text(self.images_per_second), None
        name = f"epoch {self._epoch + 1}/{self._epochs}"
        done = (self._epoch - self._first_epoch) * self._num_images + images
        if self.images_per_second:
            seconds = (self._total - done) / self.images_per_second
            seconds += (self._epochs - self._epoch) * self._between_epochs
        self._lines.update(name, done=done, total=self._total, rate=rate, seconds=seconds)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=name,
                completed=done,
                total=self._total,
                rate=rate,
                ends=end_time(seconds),
                figures="" if self._loss is None else f"loss {self._loss:.3f}",
            )
        self._loss = (logs or {}).get("loss")

    @property
    def _total(self) -> int:
        return (self._epochs - self._first_epoch) * self._num_images

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Prints the line of the epoch."""
        logs = logs or {}
        parts = [f"epoch {epoch + 1:>{len(str(self._epochs))}}/{self._epochs}", f"loss {logs['loss']:.3f}"]
        if self._metric is None:
            parts.append(_accuracies("train", logs, "", self._adversarial))
            parts.append(_accuracies("validation", logs, "val_", self._adversarial))
        else:
            parts.append(_measures(self._metric, logs))
        if self._epsilon is not None:
            parts.append(f"epsilon {self._epsilon():.4g}")
        parts.append(speed_text(self.images_per_second))
        console.print("  ".join(parts))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Removes the bar."""
        self.close()

    def close(self) -> None:
        """Removes the bar. `fit` does so when it ends; call this method after a `fit` that was interrupted."""
        if self._bar is not None:
            self._bar.stop()


def _accuracies(part: str, logs: dict[str, Any], prefix: str, adversarial: bool) -> str:
    if not adversarial:
        return f"{part} {logs[prefix + 'accuracy']:.1%}"
    clean = prefix + "clean_accuracy"  # not measured in training if that would need an extra forward pass
    shown = f"clean {logs[clean]:.1%} " if clean in logs else ""
    return f"{part} {shown}robust {logs[prefix + 'accuracy']:.1%}"


def _measures(metric: str, logs: dict[str, Any]) -> str:
    names = {kind: f"val_{kind}_{metric}" for kind in ("clean", "robust")}
    shown = " ".join(f"{kind} {logs[name]:.1%}" for kind, name in names.items() if name in logs)
    return f"validation loss {logs['val_loss']:.3f}  {metric.replace('_', ' ')} {shown}"
