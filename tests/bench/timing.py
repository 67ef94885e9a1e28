"""Fair timings: all cases in one process, taken in turns, so that a busy moment hits each of them."""

import dataclasses
import pathlib
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long the calls of one case took, in seconds.

    Attributes:
        first: the first call, with its tracing and compilation.
        repeats: the timed calls, in their order.
    """

    first: float
    repeats: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.repeats)


def interleaved(cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int) -> dict[str, Timing]:
    """Times cases in turns: round by round each case once.

    Args:
        cases: by name, a call that returns when its work is done (on an accelerator: that fetches its result).
        repeats: timed calls of each case, at least 1.
        warmup: calls of each case before that, at least 1; the very first one is reported as `Timing.first`.

    Returns:
        The timings by the names of the cases.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"`repeats` and `warmup` are at least 1. Received: repeats={repeats}, warmup={warmup}.")
    first = {}
    for name, call in cases.items():
        first[name] = _seconds(call)
        for _ in range(warmup - 1):
            call()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            times[name].append(_seconds(call))
    return {name: Timing(first=first[name], repeats=tuple(times[name])) for name in cases}


def peak_memory() -> float:
    """The most memory that this process has held so far, in MiB. It never falls: one process for each case, then."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Not getrusage there: a Linux process starts with the peak of the one that started it.
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: in bytes


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
