"""The outputs of a frozen backbone, computed once and kept on disk.

A store is a folder `<digest>/` of
    key.json             what the features are of: weights, data, preprocessing, views
    train_view0.f32, ... raw float32 rows, one for each image, in the order of the part; also validation.f32
    complete.json        shape and SHA-256 of each of these files; written last
A file is only ever appended to, so that its length says where an interrupted run has to go on.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from huggingface_hub.utils import WeakFileLock

from robust_tf.data import TaskData
from robust_tf.errors import UserError
from robust_tf.files import is_not_writable, temporary_cache, write_json
from robust_tf.models import features_of

Batches = Iterable[tuple[Any, Any]]
_FORMAT = 1
_KEY, _COMPLETE = "key.json", "complete.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Stored features of the training and the validation part.

    Attributes:
        train: for each view (num_train, feature_dim) float32, on disk.
        train_labels: (num_train,) int32.
        validation: (num_validation, feature_dim) float32, on disk.
        validation_labels: (num_validation,) int32.
        hits: rows (an image in a view) that were in the store.
        computed: rows that the backbone had to be run for.
    """

    train: tuple[np.ndarray, ...]
    train_labels: np.ndarray
    validation: np.ndarray
    validation_labels: np.ndarray
    hits: int
    computed: int


@dataclasses.dataclass(frozen=True)
class _File:
    """One file of a store: its name, its number of rows, and the batches that follow a given number of them."""

    name: str
    rows: int
    batches_from: Callable[[int], tf.data.Dataset]


def stored_features(
    classifier: keras.Model,
    task: TaskData,
    *,
    views: int,
    folder: pathlib.Path,
    max_bytes: float,
    track: Callable[..., Iterator[tuple[Any, Any]]] = lambda batches, name, *, num_images: iter(batches),
) -> Features:
    """The features of a task's training and validation images: read where they are stored, computed where not.

    View 0 of a training image is the one of evaluation; the others are augmented as in training, by the task's seed.
    Interrupted, it goes on where it stopped when it is called again.

    Args:
        classifier: its features are those of `features_of`; run in inference mode.
        task: whose images.
        views: of each training image, at least 1.
        folder: of all stores.
        max_bytes: what all stores together may take; the ones that were not used for longest are deleted for it.
        track: passes batches on and shows the progress; called with them, a name and `num_images`.

    Raises:
        UserError: the store there holds other features or is damaged, or `max_bytes` or the disk is too small. What
            has been computed is kept.

    A folder that can't be written is read where it holds all features; otherwise a temporary one takes its place.
    """
    backbone = features_of(classifier, name="backbone")
    key = store_key(backbone, task, views)
    store = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    row_bytes = 4 * backbone.output_shape[-1]
    files = _files(task, views)

    # Traced once for all files.
    @tf.function(input_signature=[tf.TensorSpec([None, *backbone.input_shape[1:]], tf.float32)])
    def compute(images: tf.Tensor) -> tf.Tensor:
        return tf.cast(backbone(images, training=False), tf.float32)

    def fill(store: pathlib.Path) -> int:
        """Completes a store, and returns the number of rows that were computed."""
        with contextlib.ExitStack() as stack:
            try:
                store.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(WeakFileLock(_lock_of(store)))
            except OSError as error:
                if not (is_not_writable(error) and os.path.exists(store / _COMPLETE)):
                    raise
            else:
                # For an interrupted store too: others may have taken the room that it still needs.
                _make_room(store, row_bytes * sum(file.rows for file in files), max_bytes)
            if (store / _KEY).exists():
                _check_key(store, key)
            else:
                write_json(store / _KEY, key)
            with contextlib.suppress(OSError):  # it may be another user's, or on a read-only disk
                os.utime(store / _KEY)  # of the last use: the oldest go first
            computed = sum(_complete_file(store, file, row_bytes, compute, track) for file in files)
            _check_or_seal(store, files, row_bytes)
            return computed

    try:
        try:
            computed = fill(store)
        except OSError as error:
            if not is_not_writable(error):
                raise
            store = temporary_cache(error, folder) / store.name
            computed = fill(store)
    except OSError as error:
        raise UserError(
            f"Cannot write features into {store}: {error.strerror or error}. What has been computed is kept: free "
            "some space, or move the folder and name it by --cache_dir, and the same command goes on."
        ) from error

    def rows(name: str, count: int) -> np.ndarray:
        return np.memmap(store / name, np.float32, mode="r", shape=(count, row_bytes // 4))

    return Features(
        train=tuple(rows(file.name, file.rows) for file in files[:-1]),
        train_labels=task.train_examples.labels(),
        validation=rows(files[-1].name, files[-1].rows),
        validation_labels=task.validation_examples.labels(),
        hits=sum(file.rows for file in files) - computed,
        computed=computed,
    )


def store_key(backbone: keras.Model, task: TaskData, views: int) -> dict[str, Any]:
    """Everything that decides the features, as JSON."""
    weights = hashlib.sha256()
    for weight in backbone.get_weights():
        weights.update(f"{weight.shape} {weight.dtype}".encode() + weight.tobytes())
    preprocessing: dict[str, Any] = dataclasses.asdict(task.preprocessing)
    for name in ("decoding", "highest_float"):
        if getattr(task.preprocessing, name) == getattr(type(task.preprocessing), name):
            del preprocessing[name]  # not in the keys of stores that are older than these settings
    if views == 1:  # nothing is augmented
        preprocessing |= {"augmentation": None, "rand_augment": None}
    return {
        "format": _FORMAT,
        "weights": weights.hexdigest(),
        "layers": hashlib.sha256(backbone.to_json().encode()).hexdigest(),  # normalisation and precision among them
        "data": task.fingerprint,
        "preprocessing": preprocessing,
        "views": views,
        "seed": task.seed if views > 1 else None,
    }


def _files(task: TaskData, views: int) -> list[_File]:
    train = [
        _File(f"train_view{view}.f32", task.num_train, functools.partial(task.train_view, view))
        for view in range(views)
    ]
    return [*train, _File("validation.f32", task.num_validation, task.validation_from)]


def _check_key(store: pathlib.Path, key: dict[str, Any]) -> None:
    try:
        found = json.loads((store / _KEY).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if found != key:
        there = found if isinstance(found, dict) else {}
        different = [name for name in key if there.get(name) != key[name]]
        raise UserError(
            f"The stored features in {store} are of something else than their folder says: {', '.join(different)} "
            "differ. They are not used. Delete this folder; it is made again."
        )


def _complete_file(
    store: pathlib.Path,
    file: _File,
    row_bytes: int,
    compute: Callable[[tf.Tensor], tf.Tensor],
    track: Callable[..., Iterator[tuple[Any, Any]]],
) -> int:
    """Appends the missing rows to a file, and returns their number."""
    path = store / file.name
    done = path.stat().st_size // row_bytes if path.exists() else 0
    if done >= file.rows or (store / _COMPLETE).exists():
        return 0  # too long or too short after all: `_check_or_seal` says so
    missing = file.rows - done
    with path.open("ab") as target:
        target.truncate(done * row_bytes)  # a row that was half written
        for images, _ in track(file.batches_from(done), path.stem, num_images=missing):
            # write(), not a memory map: on a full disk the one is an error, the other kills the process.
            target.write(compute(images).numpy().tobytes())
            target.flush()
        os.fsync(target.fileno())
    return missing


def _check_or_seal(store: pathlib.Path, files: list[_File], row_bytes: int) -> None:
    """Compares a complete store with what was noted when it was completed, or notes it."""
    sizes = {file.name: (store / file.name).stat().st_size if (store / file.name).exists() else 0 for file in files}
    wrong = [file.name for file in files if sizes[file.name] != file.rows * row_bytes]
    state = {file.name: {"rows": file.rows, "sha256": _sha256(store / file.name)} for file in files}
    complete = store / _COMPLETE
    if not wrong and complete.exists():
        noted = json.loads(complete.read_text(encoding="utf-8"))
        wrong = [name for name in state if noted.get(name) != state[name]]
    if wrong:
        raise UserError(
            f"The stored features in {store} are damaged: {', '.join(wrong)} changed since they were written. They are "
            "not used. Delete this folder; it is made again."
        )
    if not complete.exists():
        write_json(complete, state)


def _make_room(store: pathlib.Path, needed: int, max_bytes: float) -> None:
    """Deletes the other stores that were not used for longest until `store` may grow to `needed` bytes."""
    folder = store.parent
    if needed > max_bytes:
        raise UserError(
            f"These features take {needed / 1e9:.3g} GB, and --features_cache_size_gb allows {max_bytes / 1e9:.3g}. "
            f"Allow more, or take fewer --views. Received: --features_cache_size_gb={max_bytes / 1e9:g}."
        )
    others = [path.parent for path in folder.glob(f"*/{_KEY}") if path.parent != store]
    others.sort(key=lambda other: (other / _KEY).stat().st_mtime)
    total = sum(_num_bytes(other) for other in others)
    for oldest in others:
        if total + needed <= max_bytes:
            break
        # None that is written to, or that belongs to another user.
        with contextlib.suppress(TimeoutError, PermissionError), WeakFileLock(_lock_of(oldest), timeout=0.1):
            num_bytes = _num_bytes(oldest)
            shutil.rmtree(oldest)
            total -= num_bytes
    if total + needed > max_bytes:
        raise UserError(
            f"These features take {needed / 1e9:.3g} GB, other jobs are writing {total / 1e9:.3g} GB just now, and "
            f"--features_cache_size_gb allows {max_bytes / 1e9:.3g} in all. Wait for them, or allow more. "
            f"Received: --features_cache_size_gb={max_bytes / 1e9:g}."
        )
    missing = needed - (_num_bytes(store) if store.exists() else 0)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"These features take {missing / 1e9:.3g} GB more, and {folder} has {free / 1e9:.3g} GB left. Nothing was "
            "written. Free some space, or name another folder by --cache_dir."
        )


def _lock_of(store: pathlib.Path) -> pathlib.Path:
    return store.with_name(f".{store.name}.lock")


def _num_bytes(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _sha256(path: pathlib.Path) -> str | None:
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
