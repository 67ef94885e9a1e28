"""Loading and unloading versions while the server runs.

The folders of the models are watched. A new version is loaded and warmed up, then becomes available by one assignment
under a lock. The version that it replaces is closed when the last request that uses it has ended. Loading never blocks
a request.
"""

import contextlib
import dataclasses
import gc
import logging
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from robust_tf.serving.model.folders import complete_versions, why_no_version
from robust_tf.serving.model.served_model import ServedModel
from robust_tf.serving.model.session import without_path
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.model.warmup import replay_warmup
from robust_tf.serving.server.metrics import Metrics
from robust_tf.serving.server.model_settings import ModelSettings, RequestLogging

# Path, size in bytes and time of the last change of each file.
_Fingerprint = tuple[tuple[str, int, int], ...]

_LOG = logging.getLogger(__name__)
_ENDED_KEPT = 16  # number of unloaded versions of a model that its status still shows
_SECONDS_BETWEEN_WARNINGS = 30.0  # between two warnings with the same text


@dataclasses.dataclass
class Version:
    """One version of a model. The lock of the `ModelManager` guards it.

    Attributes:
        number: Number of the version.
        path: Folder of the version.
        state: Its state, with the names of TensorFlow Serving.
        error: Reason why it could not be loaded, or None.
        model: The model, while it is loaded.
        in_flight: Number of requests that use it.
        fingerprint: Identifies the content of the folder when the version was loaded.
        failures: Number of times that loading it has failed while it is tried again.
        retry_at: Time of the next try on the clock of `time.monotonic`. None if it is not tried again.
    """

    number: int
    path: pathlib.Path
    state: str = "START"
    error: ServingError | None = None
    model: ServedModel | None = None
    in_flight: int = 0
    fingerprint: _Fingerprint = ()
    failures: int = 0
    retry_at: float | None = None

    @property
    def client_error(self) -> ServingError | None:
        """The error as clients may see it, without the path on this machine."""
        return self.error and ServingError(self.error.code, without_path(self.error.message, self.path))


class ModelManager:
    """The models of one server and their loaded versions.

    Args:
        load: Function that loads the version in a folder, or raises `ServingError`.
        poll_seconds: Interval in seconds at which to look at the folders. 0 looks only when `configure` is called.
        warm_up: Number of times to run each warm-up request of a version before clients may use it.
        load_retries: Number of times to try again to load a version after a failure.
        retry_seconds: Time in seconds between two tries.
        load_threads: Number of versions to load at the same time. 0 loads one after the other.
        unload_threads: Number of threads that free unloaded versions. 0 lets the last request to a version free it.
        labels_before_versions: Whether to accept a new label before its version is available.
        metrics: Metrics that record the time of each warm-up.
    """

    def __init__(
        self,
        load: Callable[[pathlib.Path], ServedModel],
        *,
        poll_seconds: float = 1.0,
        warm_up: int = 1,
        load_retries: int = 0,
        retry_seconds: float = 60.0,
        load_threads: int = 0,
        unload_threads: int = 0,
        labels_before_versions: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        self._load = load
        self._poll_seconds = poll_seconds
        self._warm_up = warm_up
        self._load_retries = load_retries
        self._retry_seconds = max(0.0, retry_seconds)
        self._loaders = ThreadPoolExecutor(load_threads, "loader") if load_threads else None
        self._unloaders = ThreadPoolExecutor(unload_threads, "unloader") if unload_threads else None
        self._labels_before_versions = labels_before_versions
        self._metrics = metrics or Metrics()
        self._lock = threading.Lock()
        self._updating = threading.Lock()
        self._settings: dict[str, ModelSettings] = {}
        self._versions: dict[str, dict[int, Version]] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._warned: dict[str, tuple[str, float]] = {}
        self._stopping = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="version-poller", daemon=True)

    def configure(self, models: Sequence[ModelSettings]) -> None:
        """Serves these models from now on, and no others. Returns once the versions in their folders are loaded.

        Args:
            models: Settings of the models.

        Raises:
            ServingError: A label names a version that is not available (FAILED_PRECONDITION). The models are served
                anyway, with the labels that they had before.
        """
        with self._updating:
            with self._lock:
                before, self._settings = self._settings, {model.name: model for model in models}
                # If the path of a model changes, so do its versions, even if their numbers stay the same.
                moved = [
                    n for n in before if n not in self._settings or self._settings[n].base_path != before[n].base_path
                ]
                gone = [version for name in moved for version in self._take(name)]
                for model in models:
                    self._versions.setdefault(model.name, {})
                    self._labels.setdefault(model.name, {})
            self._close_unused(gone)
            wanted = self._bring_in_wanted(models)
            try:
                # Labels change after new versions are loaded and before old ones are unloaded, so they always point to
                # a loaded version.
                self._assign_labels(models, wanted)
            finally:
                for name, versions in wanted.items():
                    self._let_go(name, versions)
            for model in models:
                for finding in model.label_findings(_present(model)):
                    if finding.due:
                        self._warn(f"label {finding.text}", finding.text)

    def start_polling(self) -> None:
        """Starts watching the folders. If `poll_seconds` is 0, only versions that are to be tried again are loaded."""
        self._poller.start()

    def stop(self) -> None:
        """Stops watching the folders and frees all models. Requests that are still running end with CANCELLED."""
        self._stopping.set()
        if self._poller.is_alive():
            self._poller.join()
        with self._lock:
            versions = [version for of_model in self._versions.values() for version in of_model.values()]
        self.configure([])
        loaders, self._loaders, unloaders, self._unloaders = self._loaders, None, self._unloaders, None
        for threads in (loaders, unloaders):
            if threads is not None:
                threads.shutdown()
        for version in versions:
            self._free(version)

    def failures(self) -> list[str]:
        """Returns one line for each version that could not be loaded."""
        with self._lock:
            return [
                f"{name} version {version.number}: {version.error}"
                for name, versions in self._versions.items()
                for version in versions.values()
                if version.error
            ]

    def seconds_to_retry(self) -> float:
        """Returns the time in seconds until a version is to be tried again, or infinity if there is none."""
        now = time.monotonic()
        with self._lock:
            times = [
                version.retry_at - now
                for versions in self._versions.values()
                for version in versions.values()
                if version.retry_at is not None
            ]
        return max(0.0, min(times, default=math.inf))

    def ready(self) -> bool:
        """Returns whether every model has an available version."""
        with self._lock:
            return all(self._available(name) for name in self._settings)

    def names(self) -> list[str]:
        """Returns the names of the configured models."""
        with self._lock:
            return sorted(self._settings)

    def request_logging(self, name: str) -> RequestLogging | None:
        """Returns which requests to a model are logged, or None for none."""
        with self._lock:
            settings = self._settings.get(name)
        return settings.logging if settings else None

    @contextlib.contextmanager
    def lease(self, name: str, *, version: int | None = None, label: str = "") -> Iterator[tuple[int, ServedModel]]:
        """Yields the number and the model of a version, and keeps it loaded during the block.

        Args:
            name: Name of the model.
            version: Number of the version. None takes the latest.
            label: Label of the version. Give a version or a label, not both.

        Raises:
            ServingError: There is no such version (NOT_FOUND), or the label is unknown (INVALID_ARGUMENT).
        """
        with self._lock:
            if label:
                if name in self._settings and label not in self._labels[name]:
                    raise ServingError("INVALID_ARGUMENT", f"Unrecognized servable version label: {label}")
                version = self._labels.get(name, {}).get(label)
            available = self._available(name)
            number = max(available, default=None) if version is None else version
            if number not in available:
                raise _not_found(name, version)
            leased = available[number]
            leased.in_flight += 1
            model = leased.model
        try:
            yield leased.number, model  # type: ignore[misc]  # an available version has a model
        finally:
            with self._lock:
                leased.in_flight -= 1
            self._close_unused([leased])

    def states(self, name: str, version: int | None = None) -> list[tuple[int, str, ServingError | None]]:
        """Returns the number, state and error of each version of a model, the highest number first.

        Args:
            name: Name of the model.
            version: Number of the only version to return. None returns all.

        Raises:
            ServingError: There is no such model or version (NOT_FOUND).
        """
        with self._lock:
            versions = self._versions.get(name, {})
            if not versions:
                raise ServingError("NOT_FOUND", f"Could not find any versions of model {name}")
            if version is not None and version not in versions:
                raise ServingError("NOT_FOUND", f"Could not find version {version} of model {name}")
            chosen = sorted(versions, reverse=True) if version is None else [version]
            return [(number, versions[number].state, versions[number].client_error) for number in chosen]

    def _poll(self) -> None:
        while not self._stopping.wait(min(self._poll_seconds or 1.0, self.seconds_to_retry())):
            if self._poll_seconds > 0 or self.seconds_to_retry() == 0:
                with self._updating:
                    self._update()

    def _update(self) -> None:
        """Looks at the folders once, loads new versions and unloads those that are no longer wanted."""
        with self._lock:
            settings = list(self._settings.values())
        # One model after the other, so that at most one old version is in memory next to its successor.
        for models in [settings] if self._loaders else [[model] for model in settings]:
            for name, wanted in self._bring_in_wanted(models).items():
                self._let_go(name, wanted)

    def _bring_in_wanted(self, models: Sequence[ModelSettings]) -> dict[str, dict[int, pathlib.Path] | None]:
        """Loads the new versions of some models.

        Returns:
            The wanted versions of each model, or None for a model whose folder cannot be read.
        """
        wanted = {model.name: self._wanted(model) for model in models}
        versions = [
            (name, number, path) for name, found in wanted.items() for number, path in sorted((found or {}).items())
        ]
        each = self._loaders.map if self._loaders else map
        could_read = list(each(lambda version: self._bring_in(*version), versions))
        for (name, _, _), read in zip(versions, could_read, strict=True):
            if not read:
                wanted[name] = None
        return wanted

    def _wanted(self, model: ModelSettings) -> dict[int, pathlib.Path] | None:
        """Returns the folders of the versions to serve, or None if the folder of the model cannot be read."""
        try:
            # Versions that appear or vanish while the folder is being read may be missed. If one replaces another at
            # that moment, the first look finds neither, but the second look finds the new one.
            wanted = model.wanted(complete_versions(model.base_path)) or model.wanted(
                complete_versions(model.base_path)
            )
            if wanted:
                self._warned.pop(model.name, None)
            else:
                self._warn(model.name, _why_nothing(model))
        except OSError as error:  # the folder may be readable at the next look
            self._warn(model.name, f"Cannot look for versions of model {model.name}: {error}")
            return None
        return wanted

    def _warn(self, subject: str, message: str) -> None:
        """Logs a new warning about a subject at once, and repeats the same warning only from time to time."""
        said, when = self._warned.get(subject, ("", 0.0))
        now = time.monotonic()
        if message != said or now - when >= _SECONDS_BETWEEN_WARNINGS:
            self._warned[subject] = message, now
            _LOG.warning("%s", message)

    def _bring_in(self, name: str, number: int, path: pathlib.Path) -> bool:
        """Loads a version, unless it is available or would fail again. Returns whether its folder can be read."""
        with self._lock:
            known = self._versions[name].get(number)
            if known and known.state == "AVAILABLE":
                return True
        try:
            fingerprint = _fingerprint(path)
        except OSError as error:  # the folder may be readable at the next look
            self._warn(name, f"Cannot look for versions of model {name}: {error}")
            return False
        failures = 0
        if known and known.fingerprint == fingerprint:
            if known.error or (known.retry_at is not None and time.monotonic() < known.retry_at):
                return True  # loading would fail again until the files change or the time has come
            failures = known.failures
        version = Version(number, path, state="LOADING", fingerprint=fingerprint, failures=failures)
        with self._lock:
            self._versions[name][number] = version
        try:
            model = self._load(path)
            try:
                if self._warm_up:
                    self._replay_warmup(model)
            except ServingError:
                model.close()
                raise
        except ServingError as error:
            self._note_failure(name, version, error)
            return True
        with self._lock:
            version.model, version.state, version.failures = model, "AVAILABLE", 0
        _LOG.info("Model %s version %d is available", name, number)
        return True

    def _note_failure(self, name: str, version: Version, error: ServingError) -> None:
        with self._lock:
            version.failures += 1
            if version.failures <= self._load_retries:
                version.retry_at = time.monotonic() + self._retry_seconds
            else:
                version.state, version.error, version.failures = "END", error, 0
        if version.retry_at is None:
            _LOG.error("Model %s version %d cannot be served: %s", name, version.number, error)
        else:
            _LOG.warning(
                "Model %s version %d cannot be loaded (try %d of %d), next try in %g s: %s",
                name,
                version.number,
                version.failures,
                self._load_retries + 1,
                self._retry_seconds,
                error,
            )

    def _replay_warmup(self, model: ServedModel) -> None:
        start, status, requests = time.perf_counter(), "OK", 0
        try:
            requests = replay_warmup(model, iterations=self._warm_up)
        except ServingError as error:
            status = error.code
            raise
        finally:
            if requests or status != "OK":
                microseconds = (time.perf_counter() - start) * 1e6
                self._metrics.observe_warmup(str(model.path), status, microseconds=microseconds)

    def _leaving(self, name: str, wanted: Mapping[int, pathlib.Path] | None) -> list[Version]:
        """Returns the versions to unload: none before a wanted version is available. The caller holds the lock."""
        available = self._available(name)
        if wanted is None or (wanted and not available.keys() & wanted.keys()):
            return []
        return [version for number, version in available.items() if number not in wanted]

    def _let_go(self, name: str, wanted: Mapping[int, pathlib.Path] | None) -> None:
        """Unloads the versions that `_leaving` returns, and forgets old unloaded ones."""
        with self._lock:
            versions = self._versions[name]
            leaving = self._leaving(name, wanted)
            for version in leaving:
                version.state = "UNLOADING"
            for number, version in versions.items():
                if wanted is not None and number not in wanted and version.retry_at is not None:
                    version.state, version.retry_at = "END", None
            ended = sorted(number for number, version in versions.items() if version.state == "END")
            for number in ended[:-_ENDED_KEPT]:
                del versions[number]
        self._close_unused(leaving)

    def _take(self, name: str) -> list[Version]:
        """Removes a model and returns its versions; the caller holds the lock."""
        versions = list(self._versions.pop(name).values())
        self._labels.pop(name, None)
        for version in versions:
            version.state = "UNLOADING"
        return versions

    def _close_unused(self, versions: Sequence[Version]) -> None:
        """Frees the versions that are being unloaded and that no request uses anymore."""
        for version in versions:
            with self._lock:
                if version.state != "UNLOADING" or version.in_flight:
                    continue
                version.state = "END"
            if self._unloaders is None:
                self._free(version)
            else:
                self._unloaders.submit(self._free, version)

    def _free(self, version: Version) -> None:
        with self._lock:
            model, version.model = version.model, None
        if model is not None:
            model.close()
            del model
            gc.collect()  # a graph refers to itself, so only the garbage collector frees its memory
            _LOG.info("Version %s is unloaded", version.path)

    def _available(self, name: str) -> dict[int, Version]:
        """Returns the available versions of a model; the caller holds the lock."""
        return {
            number: version for number, version in self._versions.get(name, {}).items() if version.state == "AVAILABLE"
        }

    def _assign_labels(
        self, models: Sequence[ModelSettings], wanted: Mapping[str, Mapping[int, pathlib.Path] | None]
    ) -> None:
        with self._lock:
            for model in models:
                known = self._labels[model.name]
                leaving = {version.number for version in self._leaving(model.name, wanted[model.name])}
                staying = self._available(model.name).keys() - leaving
                for label, number in model.labels.items():
                    new_and_allowed = self._labels_before_versions and label not in known
                    if number not in staying and not new_and_allowed:
                        raise ServingError(
                            "FAILED_PRECONDITION",
                            f"Request to assign label to version {number} of model {model.name}, which is not "
                            "currently available for inference",
                        )
            for model in models:
                self._labels[model.name] = dict(model.labels)


def _present(model: ModelSettings) -> dict[int, pathlib.Path]:
    try:
        return complete_versions(model.base_path)
    except OSError:  # `_bring_in_wanted` has logged it already
        return {}


def _why_nothing(model: ModelSettings) -> str:
    beginning = f"No version of model {model.name} to serve under {model.base_path}"
    absence = why_no_version(model.base_path)
    if absence is not None:
        return f"{beginning}. {absence.reason}"
    there = ", ".join(map(str, sorted(_present(model))))
    return f"{beginning}: the policy {model.policy} asks for versions that are not there. Received: versions {there}."


def _not_found(name: str, version: int | None) -> ServingError:
    asked = f"Latest({name})" if version is None else f"Specific({name}, {version})"
    return ServingError("NOT_FOUND", f"Servable not found for request: {asked}")


def _fingerprint(path: pathlib.Path) -> _Fingerprint:
    """Returns a value that changes whenever a file in the folder does."""
    stats = [(str(file), file.stat()) for file in sorted(path.rglob("*"))]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
