"""Loading and unloading versions while the server runs.

The folders of the models are watched. A new version is loaded and warmed up, then becomes available by one assignment
under a lock. The version that it replaces is closed when the last request that uses it has ended. Loading never blocks
a request.
"""

import contextlib
import dataclasses
import gc
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from robust_tf.serving.model.folders import complete_versions, why_no_version
from robust_tf.serving.model.served_model import ServedModel
from robust_tf.serving.model.session import without_path
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.model.warmup import replay_warmup
from robust_tf.serving.server.metrics import Metrics
from robust_tf.serving.server.model_settings import ModelSettings

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
    """

    number: int
    path: pathlib.Path
    state: str = "START"
    error: ServingError | None = None
    model: ServedModel | None = None
    in_flight: int = 0
    fingerprint: _Fingerprint = ()

    @property
    def client_error(self) -> ServingError | None:
        """The error as clients may see it, without the path on this machine."""
        return self.error and ServingError(self.error.code, without_path(self.error.message, self.path))


class ModelManager:
    """The models of one server and their loaded versions.

    Args:
        load: Function that loads the version in a folder, or raises `ServingError`.
        poll_seconds: Interval in seconds at which to look at the folders. 0 looks only when `configure` is called.
        warm_up: Whether to run the warm-up requests of a version before clients may use it.
        labels_before_versions: Whether to accept a new label before its version is available.
        metrics: Metrics that record the time of each warm-up.
    """

    def __init__(
        self,
        load: Callable[[pathlib.Path], ServedModel],
        *,
        poll_seconds: float = 1.0,
        warm_up: bool = True,
        labels_before_versions: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        self._load = load
        self._poll_seconds = poll_seconds
        self._warm_up = warm_up
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
            wanted = {model.name: self._bring_in_wanted(model) for model in models}
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
        """Starts watching the folders, unless `poll_seconds` is 0."""
        if self._poll_seconds > 0:
            self._poller.start()

    def stop(self) -> None:
        """Stops watching the folders and frees all models. Requests that are still running end with CANCELLED."""
        self._stopping.set()
        if self._poller.is_alive():
            self._poller.join()
        with self._lock:
            versions = [version for of_model in self._versions.values() for version in of_model.values()]
        self.configure([])
        for version in versions:
            with self._lock:
                model, version.model = version.model, None
            if model is not None:
                model.close()

    def failures(self) -> list[str]:
        """Returns one line for each version that could not be loaded."""
        with self._lock:
            return [
                f"{name} version {version.number}: {version.error}"
                for name, versions in self._versions.items()
                for version in versions.values()
                if version.error
            ]

    def ready(self) -> bool:
        """Returns whether every model has an available version."""
        with self._lock:
            return all(self._available(name) for name in self._settings)

    def names(self) -> list[str]:
        """Returns the names of the configured models."""
        with self._lock:
            return sorted(self._settings)

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
        while not self._stopping.wait(self._poll_seconds):
            with self._updating:
                self._update()

    def _update(self) -> None:
        """Looks at the folders once, loads new versions and unloads those that are no longer wanted."""
        with self._lock:
            settings = list(self._settings.values())
        for model in settings:
            self._let_go(model.name, self._bring_in_wanted(model))

    def _bring_in_wanted(self, model: ModelSettings) -> dict[int, pathlib.Path] | None:
        """Loads the new versions of a model. Returns the wanted versions, or None if the folder can't be read."""
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
            for number, path in sorted(wanted.items()):
                self._bring_in(model.name, number, path)
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

    def _bring_in(self, name: str, number: int, path: pathlib.Path) -> None:
        with self._lock:
            known = self._versions[name].get(number)
            if known and known.state == "AVAILABLE":
                return
        fingerprint = _fingerprint(path)
        if known and known.error and known.fingerprint == fingerprint:
            return  # loading would fail again until the files change
        version = Version(number, path, state="LOADING", fingerprint=fingerprint)
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
            _LOG.error("Model %s version %d cannot be served: %s", name, number, error)
            with self._lock:
                version.state, version.error = "END", error
            return
        with self._lock:
            version.model, version.state = model, "AVAILABLE"
        _LOG.info("Model %s version %d is available", name, number)

    def _replay_warmup(self, model: ServedModel) -> None:
        start, status, requests = time.perf_counter(), "OK", 0
        try:
            requests = replay_warmup(model)
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
                version.state, model, version.model = "END", version.model, None
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
