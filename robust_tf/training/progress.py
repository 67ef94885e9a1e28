"""What a long job shows while it runs: a bar with rate and remaining time, and a line that stays for each epoch."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

Batch = tuple[Any, Any]

# One console for all output: a bar and lines printed beside it must not write over each other.
console = Console(highlight=False, markup=False, soft_wrap=True)


class _Remaining(ProgressColumn):
    """Counts down to `ends`, in seconds of the clock, or None: unknown.

    Rich's own column knows nothing where two updates are half a minute apart, as they are in an attack.
    """

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        return Text("" if ends is None else _eta(max(ends - time.perf_counter(), 0.0)))


def _ends(seconds: float | None) -> float | None:
    return None if seconds is None else time.perf_counter() + seconds


def _eta(seconds: float) -> str:
    return f"ETA {datetime.timedelta(seconds=round(seconds))}"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        _Remaining(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log file gets the lines only
    )


def _speed(rate: float, unit: str = "images") -> str:
    if not rate:
        return ""
    return f"{rate:.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


class _LogLines:
    """Where no bar can be drawn (a log file), says once a minute how far the work is."""

    def __init__(self, *, every: float = 60.0) -> None:
        self._every = every
        self._last = time.perf_counter()

    def update(
        self, name: str, *, done: float, total: float, rate: str, seconds: float | None, figures: str = ""
    ) -> None:
        now = time.perf_counter()
        if console.is_terminal or now - self._last < self._every or seconds is None:
            return
        self._last = now
        line = f"{name}  {done / total:.0%} of all  {rate}  {_eta(seconds)}"
        console.print(f"{line}  {figures}" if figures else line)


class Meter:
    """A bar over units of work; see `meter`."""

    def __init__(self, name: str, bar: Progress, *, total: float, unit: str) -> None:
        self._name, self._bar, self._unit = name, bar, unit
        self._task = bar.add_task(name, total=total, rate="", ends=None, figures="")
        self._total = total
        self._lines = _LogLines()
        self._start = time.perf_counter()
        self._first: float | None = None

    def update(self, done: float, figures: str = "", *, total: float | None = None) -> None:
        """Moves it to `done` units of `total` (None: as before), with figures beside it.

        The first call says where the work starts, which is not 0 when it was interrupted before: the rate is that
        since then.
        """
        self._total = self._total if total is None else total
        self._first = done if self._first is None else self._first
        per_second = (done - self._first) / max(time.perf_counter() - self._start, 1e-9)
        rate, seconds = _speed(per_second, self._unit), (self._total - done) / per_second if per_second else None
        self._bar.update(self._task, completed=done, total=self._total, rate=rate, ends=_ends(seconds), figures=figures)
        self._lines.update(self._name, done=done, total=self._total, rate=rate, seconds=seconds, figures=figures)


@contextlib.contextmanager
def meter(name: str, *, total: float, unit: str = "images") -> Iterator[Meter]:
    """A bar over `total` units of work, with rate and remaining time; in a log file a line once a minute."""
    with _bar() as bar:
        yield Meter(name, bar, total=total, unit=unit)


@contextlib.contextmanager
def only_a_warning(what: str) -> Iterator[None]:
    """Turns any error inside the block into one warning line, for work after a finished job has been written."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # drawing can fail in many ways, and none may end a finished job
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        console.print(f"WARNING: {what} could not be written. Received: {reason[:300]}", markup=False, soft_wrap=True)


def track(batches: Iterable[Batch], name: str, *, num_images: int) -> Iterator[Batch]:
    """Passes the (images, labels) batches on, with a bar in images."""
    with meter(name, total=num_images) as bar:
        images = 0
        bar.update(images)
        for batch in batches:
            yield batch
            images += len(batch[1])
            bar.update(images)


class ProgressBar(keras.callbacks.Callback):
    """A bar over all epochs, and one line for each finished one.

    Args:
        num_images: training images in an epoch.
        batch_size: images a step.
        epochs: of the whole training.
        adversarial: whether the compiled figures are those on adversarial images.
        epsilon: gives the radius of training, if it changes and is to be shown.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        epochs: int,
        adversarial: bool,
        epsilon: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()
        self.images_per_second = 0.0  # of the last epoch; other callbacks log it
        self._num_images, self._batch_size, self._epochs = num_images, batch_size, epochs
        self._adversarial, self._epsilon = adversarial, epsilon
        self._lines = _LogLines()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epoch = self._first_epoch = 0
        self._traced = False
        self._steps_ended: float | None = None
        self._between_epochs = 0.0  # seconds for validation, alarms and checkpoints, after the last epoch seen

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._bar, self._task = _bar(), None
        self._bar.start()
        self._traced = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._bar is not None and self._task is None:
            self._first_epoch = epoch
            self._task = self._bar.add_task("", total=self._total, rate="", ends=None, figures="")
        self._epoch = epoch
        self._start = time.perf_counter()
        if self._steps_ended is not None:
            self._between_epochs = self._start - self._steps_ended
        self._images_before_start = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        now = time.perf_counter()
        images = min((batch + 1) * self._batch_size, self._num_images)
        if not self._traced and images < self._num_images:
            # The first step of a run traces the graph: its seconds say nothing about the rate.
            self._start, self._images_before_start = now, images
        else:
            self.images_per_second = (images - self._images_before_start) / (now - self._start)
        self._traced = True
        self._steps_ended = now
        rate, seconds = _speed(self.images_per_second), None
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
                rate=rate,
                ends=_ends(seconds),
                figures=f"loss {(logs or {}).get('loss', float('nan')):.3f}",
            )

    @property
    def _total(self) -> int:
        return (self._epochs - self._first_epoch) * self._num_images

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs or {}
        parts = [f"epoch {epoch + 1:>{len(str(self._epochs))}}/{self._epochs}", f"loss {logs['loss']:.3f}"]
        parts.append(_accuracies("train", logs, "", self._adversarial))
        parts.append(_accuracies("validation", logs, "val_", self._adversarial))
        if self._epsilon is not None:
            parts.append(f"epsilon {self._epsilon():.4g}")
        parts.append(_speed(self.images_per_second))
        console.print("  ".join(parts))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; `fit` does it unless it is interrupted."""
        if self._bar is not None:
            self._bar.stop()


def _accuracies(part: str, logs: dict[str, Any], prefix: str, adversarial: bool) -> str:
    if not adversarial:
        return f"{part} {logs[prefix + 'accuracy']:.1%}"
    clean = prefix + "clean_accuracy"  # not measured in training where it would cost too much
    shown = f"clean {logs[clean]:.1%} " if clean in logs else ""
    return f"{part} {shown}robust {logs[prefix + 'accuracy']:.1%}"
