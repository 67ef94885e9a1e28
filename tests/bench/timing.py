"""Fair timings: all cases take turns in one process, so that a busy moment of the machine slows down all of them."""

import dataclasses
import pathlib
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of the calls of one case, in seconds.

    Attributes:
        first: Time of the first call, including tracing and compilation.
        repeats: Times of the measured calls, in their order.
    """

    first: float
    repeats: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.repeats)


def interleaved(cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int) -> dict[str, Timing]:
    """Times the cases in turns: in each round, every case runs once.

    Args:
        cases: Functions by name. Each returns when its work is done; on an accelerator, it has to fetch its result.
        repeats: Number of measured calls of each case, at least 1.
        warmup: Number of calls of each case before these, at least 1. The first one is reported as `Timing.first`.

    Returns:
        The timings, by the names of the cases.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"`repeats` and `warmup` must be at least 1. Received: repeats={repeats}, warmup={warmup}.")
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
    """Returns the peak memory of this process so far, in MiB. It never falls, so each case needs a new process."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # On Linux, getrusage starts from the peak of the process that started this one.
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in bytes on macOS


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
