"""What programs print: one console, and bars with the rate and the remaining time."""

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
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


def end_time(seconds: float | None) -> float | None:
    return None if seconds is None else time.perf_counter() + seconds


def _eta(seconds: float) -> str:
    return f"ETA {datetime.timedelta(seconds=round(seconds))}"


def progress_bar() -> Progress:
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


def speed_text(rate: float, unit: str = "images") -> str:
    if not rate:
        return ""
    return f"{rate:.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


class LogLines:
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
        self._lines = LogLines()
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
        rate, seconds = speed_text(per_second, self._unit), (self._total - done) / per_second if per_second else None
        ends = end_time(seconds)
        self._bar.update(self._task, completed=done, total=self._total, rate=rate, ends=ends, figures=figures)
        self._lines.update(self._name, done=done, total=self._total, rate=rate, seconds=seconds, figures=figures)


@contextlib.contextmanager
def meter(name: str, *, total: float, unit: str = "images") -> Iterator[Meter]:
    """A bar over `total` units of work, with rate and remaining time; in a log file a line once a minute."""
    with progress_bar() as bar:
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
