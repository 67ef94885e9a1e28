"""Output of the programs: one console, and progress bars with the rate and the remaining time."""

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

Batch = tuple[Any, Any]

# All output goes through one console, so that a progress bar and printed lines do not overwrite each other.
console = Console(highlight=False, markup=False, soft_wrap=True)


class _Remaining(ProgressColumn):
    """Shows the remaining time of a task, whose field `ends` is a value of `time.perf_counter`, or None if unknown.

    Rich's own column shows nothing if more than half a minute passes between two updates, as happens in attacks.
    """

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        return Text("" if ends is None else _eta(max(ends - time.perf_counter(), 0.0)))


def end_time(seconds: float | None) -> float | None:
    """Returns the value that `time.perf_counter` will have in `seconds`, or None if `seconds` is None."""
    return None if seconds is None else time.perf_counter() + seconds


def _eta(seconds: float) -> str:
    return f"ETA {datetime.timedelta(seconds=round(seconds))}"


def progress_bar() -> Progress:
    """Returns a progress bar; its tasks have the fields `rate`, `ends` and `figures`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        _Remaining(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log file gets only the lines of `LogLines`
    )


def speed_text(rate: float, unit: str = "images") -> str:
    """Returns a rate such as "120 images/s", or nothing for a rate of 0.

    Args:
        rate: Units per second.
        unit: Name of the units.
    """
    if not rate:
        return ""
    return f"{rate:.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


class LogLines:
    """Prints the progress once a minute where no bar can be drawn, such as in a log file.

    Args:
        every: Seconds between two lines.
    """

    def __init__(self, *, every: float = 60.0) -> None:
        self._every = every
        self._last = time.perf_counter()

    def update(
        self, name: str, *, done: float, total: float, rate: str, seconds: float | None, figures: str = ""
    ) -> None:
        """Prints a line if the last one is old enough.

        Args:
            name: Name of the work.
            done: Units of work that are done.
            total: Units of work in total.
            rate: Speed, as `speed_text` returns it.
            seconds: Remaining time in seconds. With None, which means unknown, nothing is printed.
            figures: Text for the end of the line.
        """
        now = time.perf_counter()
        if console.is_terminal or now - self._last < self._every or seconds is None:
            return
        self._last = now
        line = f"{name}  {done / total:.0%} of all  {rate}  {_eta(seconds)}"
        console.print(f"{line}  {figures}" if figures else line)


class Meter:
    """A progress bar over units of work; see `meter`.

    Args:
        name: Name of the work.
        bar: Progress bar that shows it.
        total: Units of work in total.
        unit: Name of the units.
    """

    def __init__(self, name: str, bar: Progress, *, total: float, unit: str) -> None:
        self._name, self._bar, self._unit = name, bar, unit
        self._task = bar.add_task(name, total=total, rate="", ends=None, figures="")
        self._total = total
        self._lines = LogLines()
        self._start = time.perf_counter()
        self._first: float | None = None

    def update(self, done: float, figures: str = "", *, total: float | None = None) -> None:
        """Updates the bar.

        The first call sets the starting point, which is not 0 if interrupted work continues. The rate is measured from
        there.

        Args:
            done: Units of work that are done.
            figures: Text beside the bar.
            total: Units of work in total; None if it is still the same.
        """
        self._total = self._total if total is None else total
        self._first = done if self._first is None else self._first
        per_second = (done - self._first) / max(time.perf_counter() - self._start, 1e-9)
        rate, seconds = speed_text(per_second, self._unit), (self._total - done) / per_second if per_second else None
        ends = end_time(seconds)
        self._bar.update(self._task, completed=done, total=self._total, rate=rate, ends=ends, figures=figures)
        self._lines.update(self._name, done=done, total=self._total, rate=rate, seconds=seconds, figures=figures)


@contextlib.contextmanager
def meter(name: str, *, total: float, unit: str = "images") -> Iterator[Meter]:
    """Yields a progress bar with rate and remaining time; a log file gets a line once a minute instead.

    Args:
        name: Name of the work.
        total: Units of work in total.
        unit: Name of the units.
    """
    with progress_bar() as bar:
        yield Meter(name, bar, total=total, unit=unit)


@contextlib.contextmanager
def only_a_warning(what: str) -> Iterator[None]:
    """Turns any error inside the block into one warning, for output that a finished job can do without.

    Args:
        what: What the block writes, for the warning.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  # drawing can fail in many ways, but a finished job must not fail
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        console.print(f"WARNING: {what} could not be written. Received: {reason[:300]}", markup=False, soft_wrap=True)


def track(batches: Iterable[Batch], name: str, *, num_images: int) -> Iterator[Batch]:
    """Yields the batches one by one, and shows a progress bar that counts their images.

    Args:
        batches: Batches (images, labels).
        name: Name of the work.
        num_images: Number of images in all batches.
    """
    with meter(name, total=num_images) as bar:
        images = 0
        bar.update(images)
        for batch in batches:
            yield batch
            images += len(batch[1])
            bar.update(images)
