"""The outputs of a frozen backbone, computed once and kept on disk.

A store is a folder `<digest>/` with these files:

    key.json             format number, and what determines the features: weights, data, preprocessing, views
    train_view0.f32, ... raw float32 rows, one for each image, in the order of the training part
    validation.f32       the same for the validation part
    complete.json        number of rows and SHA-256 of each of these files; written last

The digest is computed from key.json, so features of other weights or images, or in another format, are in another
folder. Rows are only ever appended to a file, so its length tells where an interrupted run has to continue.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from huggingface_hub.utils import WeakFileLock

from robust_tf.data import TaskData
from robust_tf.errors import UserError
from robust_tf.files import is_not_writable, temporary_cache, write_json
from robust_tf.models import features_of
from robust_tf.sharing import is_sharing, shared

# Raise this number when the content of a store changes. Stores of other formats are then not found, and the features
# are computed again.
_FORMAT = 1
_KEY, _COMPLETE = "key.json", "complete.json"
# Jobs of one process share the features of a whole part up to this size, and if they use enough of its images.
_MOST_SHARED_BYTES = 256 * 1024**2
_LEAST_SHARE_USED = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Stored features of the training part and the validation part.

    A row is the feature vector of one image in one view.

    Attributes:
        train: Features of the training images in each view, (num_train, feature_dim) float32, mapped from disk.
        train_labels: Labels of the training images, (num_train,) int32.
        validation: Features of the validation images, (num_validation, feature_dim) float32, mapped from disk.
        validation_labels: Labels of the validation images, (num_validation,) int32.
        hits: Number of rows that were already stored.
        computed: Number of rows that the backbone had to compute.
    """

    train: tuple[np.ndarray, ...]
    train_labels: np.ndarray
    validation: np.ndarray
    validation_labels: np.ndarray
    hits: int
    computed: int


@dataclasses.dataclass(frozen=True)
class _File:
    """One file of a store.

    Attributes:
        name: Name of the file.
        rows: Number of rows of the complete file.
        batches_from: Function that takes the number of rows to skip and returns batches with the remaining rows.
    """

    name: str
    rows: int
    batches_from: Callable[[int], tf.data.Dataset]


def _without_progress(batches: Iterable[Any], _name: str, *, num_images: int) -> Iterator[tuple[Any, Any]]:
    """Passes the batches on and shows nothing."""
    del num_images
    return iter(batches)


def stored_features(
    classifier: keras.Model,
    task: TaskData,
    *,
    views: int,
    cache_dir: pathlib.Path,
    features_cache_size_gb: float,
    track: Callable[..., Iterator[tuple[Any, Any]]] = _without_progress,
) -> Features:
    """Returns the features of a task's training and validation images, and computes those that are not stored yet.

    View 0 of a training image is the same as in evaluation. The other views are augmented as in training, with the
    task's seed. If a call is interrupted, the next one continues where it stopped.

    A folder that cannot be written to is still read if it holds all features. Otherwise a temporary folder is used
    instead.

    Args:
        classifier: Classifier whose features, the outputs of `features_of`, are computed in inference mode.
        task: Task with the images.
        views: Number of views of each training image, at least 1.
        cache_dir: Folder of cached files. The stores are in its subfolder "features".
        features_cache_size_gb: Limit for the size of all stores together, in GB (1e9 bytes). If it would be exceeded,
            the least recently used stores are deleted.
        track: Function of (batches, name, num_images) that passes the batches on and shows the progress.

    Returns:
        The features and the labels.

    Raises:
        UserError: The store holds other features or is damaged, or the limit or the disk is too small. Features that
            have been computed are kept.
    """
    folder, max_bytes = cache_dir / "features", features_cache_size_gb * 1e9
    backbone = features_of(classifier, name="backbone")
    key = store_key(backbone, task, views)
    if is_sharing() and views == 1 and _is_worth_sharing(task, backbone.output_shape[-1]):
        with contextlib.suppress(tf.errors.OpError):  # a broken image that this task does not even use
            return _shared_features(backbone, task, key)
    store = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    row_bytes = 4 * backbone.output_shape[-1]
    files = _files(task, views)

    compute = _function_of(backbone, key)

    def fill(store: pathlib.Path) -> int:
        """Completes a store and returns the number of rows that were computed."""
        with contextlib.ExitStack() as stack:
            try:
                store.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(WeakFileLock(_lock_of(store)))
            except OSError as error:
                if not (is_not_writable(error) and os.path.exists(store / _COMPLETE)):
                    raise
            else:
                # An interrupted store needs this too, because other stores may have taken the space it still needs.
                _make_room(store, row_bytes * sum(file.rows for file in files), max_bytes)
            if (store / _KEY).exists():
                _check_key(store, key)
            else:
                write_json(store / _KEY, key)
            with contextlib.suppress(OSError):  # it may belong to another user or be on a read-only disk
                os.utime(store / _KEY)  # time of the last use: the least recently used stores are deleted first
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
            f"Cannot write features into {store}: {error.strerror or error}. The features that have been computed are "
            "kept. Free some space, or move the folder and name it by cache_dir, and run the same command again."
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


def _is_worth_sharing(task: TaskData, feature_dim: int) -> bool:
    total, used = len(task.train_examples.mask), task.num_train + task.num_validation
    return not task.skipped and used >= _LEAST_SHARE_USED * total and 4 * feature_dim * total <= _MOST_SHARED_BYTES


def _shared_features(backbone: keras.Model, task: TaskData, key: Mapping[str, Any]) -> Features:
    """Returns the features of a task from those of all images of its data set, which other jobs share.

    They are not stored on disk, because every draw of a few labels would need its own store.
    """
    compute, preprocessing = _function_of(backbone, key), json.dumps(key["preprocessing"], sort_keys=True)
    every = np.ones_like(task.train_examples.mask)
    whole = dataclasses.replace(task, train_examples=dataclasses.replace(task.train_examples, mask=every))
    computed = 0

    def compute_all() -> np.ndarray:
        nonlocal computed
        computed = len(every)
        return np.concatenate([compute(images).numpy() for images, _ in whole.train_view(0)])

    part = shared(
        ("features of a part", key["weights"], key["layers"], preprocessing, task.train_fingerprint), compute_all
    )
    train, validation = (part[examples.mask] for examples in (task.train_examples, task.validation_examples))
    return Features(
        train=(train,),
        train_labels=task.train_examples.labels(),
        validation=validation,
        validation_labels=task.validation_examples.labels(),
        hits=0 if computed else len(train) + len(validation),
        computed=computed,
    )


def test_features(classifier: keras.Model, task: TaskData) -> np.ndarray:
    """Returns the features of the test images. They are not stored on disk.

    Several jobs of one process that share objects compute them once.

    Args:
        classifier: Classifier whose features, the outputs of `features_of`, are computed in inference mode.
        task: Task with the images.

    Returns:
        (num_test, feature_dim) float32, in the order of `task.test`.
    """
    backbone = features_of(classifier, name="backbone")
    key = store_key(backbone, task, views=1)
    compute = _function_of(backbone, key)
    preprocessing = json.dumps(key["preprocessing"], sort_keys=True)
    return shared(
        ("test features", key["weights"], key["layers"], preprocessing, task.test_fingerprint),
        lambda: np.concatenate([compute(images).numpy() for images, _ in task.test]),
    )


def _function_of(backbone: keras.Model, key: Mapping[str, Any]) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns the function of images that computes the features. It is traced once for all files of a store.

    Args:
        backbone: Model from images to features.
        key: Key of a store with these features.
    """

    @tf.function(input_signature=[tf.TensorSpec([None, *backbone.input_shape[1:]], tf.float32)])
    def compute(images: tf.Tensor) -> tf.Tensor:
        return tf.cast(backbone(images, training=False), tf.float32)

    function: Callable[[tf.Tensor], tf.Tensor] = shared(("features", key["weights"], key["layers"]), lambda: compute)
    return function


def store_key(backbone: keras.Model, task: TaskData, views: int) -> dict[str, Any]:
    """Returns everything that the features depend on, as JSON values by name.

    Args:
        backbone: Model from images to features.
        task: Task with the images.
        views: Number of views of each training image.
    """
    # Jobs that share a backbone share its layers, so its digests are computed once for all of them.
    layers = tuple(backbone.layers)
    weights, structure = shared(("digests", layers), lambda: _digests(backbone))
    preprocessing: dict[str, Any] = dataclasses.asdict(task.class_preprocessing)
    for name in ("decoding", "highest_float"):
        if getattr(task.preprocessing, name) == getattr(type(task.preprocessing), name):
            del preprocessing[name]  # stores that are older than these settings do not have them in their keys
    if views == 1:  # nothing is augmented
        preprocessing |= {"augmentation": None, "rand_augment": None}
    return {
        "format": _FORMAT,
        "weights": weights,
        "layers": structure,
        "data": task.fingerprint,
        "preprocessing": preprocessing,
        "views": views,
        "seed": task.seed if views > 1 else None,
    }


def _digests(backbone: keras.Model) -> tuple[str, str]:
    """Returns the SHA-256 of the weights of a backbone, and of its layers with their normalization and precision."""
    weights = hashlib.sha256()
    for weight in backbone.get_weights():
        weights.update(f"{weight.shape} {weight.dtype}".encode() + weight.tobytes())
    return weights.hexdigest(), hashlib.sha256(backbone.to_json().encode()).hexdigest()


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
        if "format" in there and there["format"] != _FORMAT:
            raise UserError(
                f"The stored features in {store} have a format that this version of robust_tf does not read. Received: "
                f"format {there['format']}, needed: format {_FORMAT}. Delete this folder, and it is made again."
            )
        different = [name for name in key if there.get(name) != key[name]]
        raise UserError(
            f"The stored features in {store} are not the ones that belong there: {', '.join(different)} differ. They "
            "are not used. Delete this folder, and it is made again."
        )


def _complete_file(
    store: pathlib.Path,
    file: _File,
    row_bytes: int,
    compute: Callable[[tf.Tensor], tf.Tensor],
    track: Callable[..., Iterator[tuple[Any, Any]]],
) -> int:
    """Appends the missing rows to a file and returns their number."""
    path = store / file.name
    done = path.stat().st_size // row_bytes if path.exists() else 0
    if done >= file.rows or (store / _COMPLETE).exists():
        return 0  # if the length is wrong, `_check_or_seal` refuses the file
    missing = file.rows - done
    with path.open("ab") as target:
        target.truncate(done * row_bytes)  # removes a row that was half written
        for images, _ in track(file.batches_from(done), path.stem, num_images=missing):
            # Not through a memory map: a full disk would kill the process, while write() raises an error.
            target.write(compute(images).numpy().tobytes())
            target.flush()
        os.fsync(target.fileno())
    return missing


def _check_or_seal(store: pathlib.Path, files: list[_File], row_bytes: int) -> None:
    """Checks a complete store against the digests in complete.json, or writes that file if there is none."""
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
            "not used. Delete this folder, and it is made again."
        )
    if not complete.exists():
        write_json(complete, state)


def _make_room(store: pathlib.Path, needed: int, max_bytes: float) -> None:
    """Makes room for a store to grow to `needed` bytes by deleting other stores, the least recently used first."""
    folder = store.parent
    if needed > max_bytes:
        raise UserError(
            f"These features take {needed / 1e9:.3g} GB, which is more than the limit for all stored features. "
            f"Received: features_cache_size_gb={max_bytes / 1e9:g}. Raise the limit, or use fewer views."
        )
    others = [path.parent for path in folder.glob(f"*/{_KEY}") if path.parent != store]
    others.sort(key=lambda other: (other / _KEY).stat().st_mtime)
    total = sum(_num_bytes(other) for other in others)
    for oldest in others:
        if total + needed <= max_bytes:
            break
        # Stores that are being written or that belong to another user are kept.
        with contextlib.suppress(TimeoutError, PermissionError), WeakFileLock(_lock_of(oldest), timeout=0.1):
            num_bytes = _num_bytes(oldest)
            shutil.rmtree(oldest)
            total -= num_bytes
    if total + needed > max_bytes:
        raise UserError(
            f"These features take {needed / 1e9:.3g} GB, and other jobs are writing {total / 1e9:.3g} GB right now. "
            "Together this is more than the limit for all stored features. "
            f"Received: features_cache_size_gb={max_bytes / 1e9:g}. Wait for the other jobs, or raise the limit."
        )
    missing = needed - (_num_bytes(store) if store.exists() else 0)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"These features take {missing / 1e9:.3g} GB more, and {folder} has {free / 1e9:.3g} GB left. Nothing was "
            "written. Free some space, or name another folder by cache_dir."
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
