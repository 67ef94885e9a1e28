"""Counters and histograms with TensorFlow Serving's names, in the text format of Prometheus."""

import bisect
import threading
from collections import defaultdict

_PREFIX = ":tensorflow:serving:"
# Upper bounds of the histogram buckets, in microseconds and in examples. They are the same as in TensorFlow Serving, so
# dashboards made for it work here.
_LATENCY_BOUNDS = [10 * 1.8**exponent for exponent in range(33)]
_EXAMPLE_BOUNDS = [2.0**exponent for exponent in range(15)]


class Metrics:
    """The metrics of one server. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, ...], int] = defaultdict(int)
        self._logged: dict[tuple[str, ...], int] = defaultdict(int)
        self._examples: dict[str, int] = defaultdict(int)
        self._example_counts: dict[tuple[str, ...], _Histogram] = defaultdict(lambda: _Histogram(_EXAMPLE_BOUNDS))
        self._request_latency: dict[tuple[str, ...], _Histogram] = defaultdict(_latency_histogram)
        self._runtime_latency: dict[tuple[str, ...], _Histogram] = defaultdict(_latency_histogram)
        self._warmup_latency: dict[tuple[str, ...], _Histogram] = defaultdict(_latency_histogram)

    def count_request(self, model_name: str, status: str) -> None:
        """Counts one answered request.

        Args:
            model_name: Name of the model.
            status: Name of the canonical code, "OK" for success.
        """
        with self._lock:
            self._counts[model_name, status] += 1

    def count_log(self, model_name: str, status: str) -> None:
        """Counts one request that was to be logged.

        Args:
            model_name: Name of the model.
            status: "OK" if it was logged, or else the canonical code of the reason.
        """
        with self._lock:
            self._logged[model_name, status] += 1

    def observe(self, model_name: str, method: str, entrypoint: str, *, microseconds: float) -> None:
        """Records the time that a successful request took.

        Args:
            model_name: Name of the model.
            method: "predict", "classify", "regress" or "multi_inference".
            entrypoint: "REST" or "GRPC".
            microseconds: Time from the arrival of the request to its reply.
        """
        with self._lock:
            self._request_latency[model_name, method, entrypoint].add(microseconds)

    def observe_run(self, model_name: str, method: str, *, microseconds: float, examples: int) -> None:
        """Records one run of a model.

        Args:
            model_name: Name of the model.
            method: "predict", "classify" or "regress".
            microseconds: Time of the run.
            examples: Number of examples in it.
        """
        with self._lock:
            self._runtime_latency[model_name, method, "TF"].add(microseconds)
            self._examples[model_name] += examples
            self._example_counts[model_name,].add(examples)

    def observe_warmup(self, model_path: str, status: str, *, microseconds: float) -> None:
        """Records the warm-up of a version.

        Args:
            model_path: Folder of the version.
            status: Name of the canonical code, "OK" for success.
            microseconds: Time of the warm-up.
        """
        with self._lock:
            self._warmup_latency[model_path, status].add(microseconds)

    def render(self) -> str:
        """Returns all metrics in the text format of Prometheus."""
        with self._lock:
            lines = _counter_lines("request_count", ("model_name", "status"), self._counts)
            lines += _counter_lines("request_log_count", ("model_name", "status_code"), self._logged)
            lines += _counter_lines(
                "request_example_count_total", ("model",), {(name,): n for name, n in self._examples.items()}
            )
            lines += _histogram_lines("request_example_counts", ("model",), self._example_counts)
            lines += _histogram_lines("request_latency", ("model_name", "API", "entrypoint"), self._request_latency)
            lines += _histogram_lines("runtime_latency", ("model_name", "API", "runtime"), self._runtime_latency)
            lines += _histogram_lines("model_warmup_latency", ("model_path", "status"), self._warmup_latency)
        return "\n".join(lines) + "\n"


class _Histogram:
    def __init__(self, bounds: list[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


def _latency_histogram() -> _Histogram:
    return _Histogram(_LATENCY_BOUNDS)


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    escaped = (value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in values)
    return ",".join(f'{name}="{value}"' for name, value in zip(names, escaped, strict=True))


def _counter_lines(name: str, label_names: tuple[str, ...], values: dict[tuple[str, ...], int]) -> list[str]:
    lines = [f"# TYPE {_PREFIX}{name} counter"]
    return lines + [f"{_PREFIX}{name}{{{_labels(label_names, key)}}} {value}" for key, value in values.items()]


def _histogram_lines(
    name: str, label_names: tuple[str, ...], histograms: dict[tuple[str, ...], _Histogram]
) -> list[str]:
    lines = [f"# TYPE {_PREFIX}{name} histogram"]
    for key, histogram in histograms.items():
        labels = _labels(label_names, key)
        below = 0
        for bound, count in zip([*(f"{bound:g}" for bound in histogram.bounds), "+Inf"], histogram.counts, strict=True):
            below += count
            lines.append(f'{_PREFIX}{name}_bucket{{{labels},le="{bound}"}} {below}')
        lines.append(f"{_PREFIX}{name}_sum{{{labels}}} {histogram.total:g}")
        lines.append(f"{_PREFIX}{name}_count{{{labels}}} {below}")
    return lines
