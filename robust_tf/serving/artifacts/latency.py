"""The time that an artifact needs for an image."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_BATCH_SIZES = (1, 32)
_SECONDS = 1.0  # for each batch size
_MOST_RUNS = 30


def latency_entry(run: Callable[[np.ndarray], Any], image_size: int) -> dict[str, Any]:
    """Returns the median time per image, for single images and for batches, as a model card holds it.

    Args:
        run: Function to measure, from images (count, image_size, image_size, 3) float32 in [0, 1] to anything.
        image_size: Side of the images, in pixels.
    """
    milliseconds = {}
    for size in _BATCH_SIZES:
        images = np.random.default_rng(0).uniform(size=(size, image_size, image_size, 3)).astype(np.float32)
        run(images)  # prepares the memory for this batch size
        seconds: list[float] = []
        while len(seconds) < _MOST_RUNS and sum(seconds) < _SECONDS:
            start = time.perf_counter()
            run(images)
            seconds.append(time.perf_counter() - start)
        milliseconds[f"batch_{size}"] = float(f"{1000 * statistics.median(seconds) / size:.3g}")
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    return {"latency_ms_per_image": milliseconds, "latency_measured_on": machine}
