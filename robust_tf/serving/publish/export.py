"""Publishes a classifier as a verified version in a folder that TensorFlow Serving watches."""

import contextlib
import dataclasses
import datetime
import fcntl
import os
import pathlib
import platform
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

import robust_tf
from robust_tf.data.transforms import AS_STORED, Decoding
from robust_tf.errors import UserError
from robust_tf.files import write_json
from robust_tf.models import plain_classifier
from robust_tf.models.folding import fold_batch_norm
from robust_tf.serving.model.folders import MAX_VERSION, version_folders
from robust_tf.serving.model.warmup import write_warmup
from robust_tf.serving.publish.probe import AttackProbe
from robust_tf.serving.publish.signatures import build_signatures
from robust_tf.serving.publish.verify import sample_requests, verify_export, warmup_logs

_ABANDONED_AFTER_SECONDS = 60
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644


def export_classifier(
    classifier: keras.Model,
    export_dir: str | os.PathLike[str],
    model_name: str,
    *,
    model_card: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    version: int | None = None,
    resize_size: int | None = None,
    decoding: Decoding = AS_STORED,
    attack_probe: AttackProbe | None = None,
    original: keras.Model | None = None,
    world_readable: bool = True,
) -> pathlib.Path:
    """Publishes a classifier as `export_dir/model_name/version`, ready for TensorFlow Serving.

    The version is first written under a temporary name and loaded as TensorFlow Serving loads it. Every signature is
    run and compared with `classifier.predict`, and the warm-up requests are replayed. Only then is the version renamed
    into place. So a server that watches the folder never sees part of a version, and an export that is interrupted or
    fails publishes nothing. The SavedModel is for inference only, so each BatchNorm after a float32 convolution is
    folded into the convolution.

    Args:
        classifier: Any Keras model that `plain_classifier` accepts, for images (batch, size, size, 3) in [0, 1].
        export_dir: Folder of all models.
        model_name: Name of the model in requests and of its folder. It must not contain "/" or ":".
        model_card: Facts to publish as `model_card.json`, such as data, metric, accuracies and license. Sizes,
            classes, pixel range and versions are added.
        labels: Names of the classes in the order of the logits. None names them "0", "1", ...
        version: Number of the version, at least 1. None takes the next free number.
        resize_size: Length to which the shorter side of an encoded image is resized before the center crop. None
            takes the size of the classifier's images.
        decoding: How EXIF rotation and transparency of encoded images are treated, as in training.
        attack_probe: Attack to serve as the signature `attack_probe`. None serves no attack.
        original: Model that `classifier` was made from. The served probabilities must equal those of this model.
        world_readable: Whether the version and the folders created for it get the modes 0755 and 0644 regardless of the
            umask. A server usually runs as another user, who could not read them under umask 077. With False, the
            umask decides.

    Returns:
        The folder of the new version.

    Raises:
        UserError: An argument is not valid, the version exists, the folder cannot be written, or the export does not
            give the same answers as the classifier.

    Example:
        >>> import tempfile
        >>> images = keras.Input((8, 8, 3))
        >>> classifier = keras.Model(images, keras.layers.Dense(2)(keras.layers.Flatten()(images)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_classifier(classifier, folder, "tiny", model_card={}, labels=["cat", "dog"]).name
        '1'
    """
    original = original or classifier
    classifier = plain_classifier(classifier)
    image_size, num_classes = _sizes(classifier)
    labels = _checked_labels(labels, num_classes)
    resize_size = image_size if resize_size is None else resize_size
    if resize_size < image_size:
        raise UserError(
            f"resize_size must be at least the classifier's image size, {image_size}. Received: "
            f"resize_size={resize_size}."
        )
    base = model_folder(pathlib.Path(export_dir), model_name)
    if version is not None:
        _check_version(base, version)

    served = fold_batch_norm(classifier)
    signatures = build_signatures(
        served, labels=labels, resize_size=resize_size, decoding=decoding, attack_probe=attack_probe
    )
    requests = sample_requests(image_size, attack_probe)
    with _staging_folder(base, world_readable) as staging:
        module = tf.Module()
        # Only the tf.Variables are stored. The weights of a Keras model would be stored twice, and TensorFlow Serving's
        # loader would not find Keras variables.
        module.weights = [weight.value for weight in served.weights]
        tf.saved_model.save(module, str(staging), signatures=signatures)
        (staging / "assets").mkdir(exist_ok=True)
        (staging / "assets" / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        write_json(
            staging / "model_card.json",
            dict(model_card)
            | {
                "model_name": model_name,
                "architecture": classifier.name,
                "classes": num_classes,
                "labels": list(labels),
                "image_size": image_size,
                "resize_size": resize_size,
                "pixel_range": [0.0, 1.0],
                **dataclasses.asdict(decoding),
                "attack_probe": None if attack_probe is None else vars(attack_probe),
                "exported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "export_versions": {
                    "robust_tf": robust_tf.__version__,
                    "tensorflow": tf.__version__,
                    "keras": keras.__version__,
                    "python": platform.python_version(),
                },
            },
        )
        write_warmup(staging, warmup_logs(model_name, requests))
        verify_export(
            staging,
            classifier,
            requests,
            labels=labels,
            resize_size=resize_size,
            decoding=decoding,
            original=original,
        )
        if world_readable:
            _make_readable(staging)
        _sync(staging)
        return _rename_into_place(staging, base, version)


def _sizes(classifier: keras.Model) -> tuple[int, int]:
    """Returns the side of the images and the number of classes."""
    _, height, width, channels = classifier.input_shape
    if height is None or height != width or channels != 3:
        raise UserError(
            "Serving needs a classifier of square RGB images of a fixed size. Received: input shape "
            f"{classifier.input_shape}."
        )
    return height, classifier.output_shape[-1]


def _checked_labels(labels: Sequence[str] | None, num_classes: int) -> list[str]:
    if labels is None:
        return [str(index) for index in range(num_classes)]
    if len(labels) != num_classes:
        raise UserError(
            f"Each of the classifier's {num_classes} classes needs a label. Received: {len(labels)} labels."
        )
    for label in labels:
        if not label.strip() or "\n" in label or "\r" in label:
            raise UserError(f"A label must be one line of text that is not empty. Received: {label!r}.")
    if len(set(labels)) != len(labels):
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        raise UserError(f"Labels must differ from each other. Received more than once: {', '.join(twice)}.")
    return list(labels)


def model_folder(export_dir: pathlib.Path, model_name: str) -> pathlib.Path:
    """Returns the folder that holds the versions of a model.

    Args:
        export_dir: Folder of all models.
        model_name: Name of the model.

    Raises:
        UserError: The name is not valid.

    Example:
        >>> model_folder(pathlib.Path("export"), "pets").as_posix()
        'export/pets'
    """
    if not model_name or set(model_name) & set("/:\\\0") or model_name.startswith("."):
        raise UserError(
            "A model name must be the name of a folder, without '/', '\\' and ':', and must not start with a dot. "
            f"Received: {model_name!r}."
        )
    return export_dir / model_name


def _check_version(base: pathlib.Path, version: int) -> None:
    if not 1 <= version <= MAX_VERSION:
        raise UserError(f"A version must be a number from 1 to {MAX_VERSION}. Received: version={version}.")
    there = version_folders(base)
    if version in there:
        raise UserError(
            f"A published version is never overwritten. Received: version={version}, and {there[version]} exists. "
            f"Use --version={max(there) + 1}, or leave the flag out for the next free number."
        )


@contextlib.contextmanager
def _staging_folder(base: pathlib.Path, world_readable: bool) -> Iterator[pathlib.Path]:
    """Creates a temporary folder beside the versions. Its name is not a number, so servers ignore it."""
    staging = base / f".export-{uuid.uuid4().hex[:12]}"
    try:
        missing = [folder for folder in (base, *base.parents) if not folder.exists()]
        staging.mkdir(parents=True)
        if world_readable:
            for folder in missing:
                folder.chmod(_FOLDER_MODE)
        _remove_abandoned(base)
        with _locked(staging):
            yield staging
    except (OSError, tf.errors.OpError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error.message
        raise UserError(
            f"Cannot write a version to {base}: {reason}. Nothing was published. Free some space, or choose a folder "
            "that you may write to with --export_dir."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a folder during the block. If the process dies, the lock is released.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(base: pathlib.Path) -> None:
    """Removes the folders of exporters that were killed. No process holds a lock on them."""
    for folder in base.glob(".export-*"):
        # Another process may just have removed its folder, or created it without having locked it yet.
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                with _locked(folder):
                    shutil.rmtree(folder)


def _make_readable(folder: pathlib.Path) -> None:
    """Lets every user read a folder and its contents, but only the owner write."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(_FOLDER_MODE if path.is_dir() else _FILE_MODE)


def readers_of(version_dir: pathlib.Path) -> str:
    """Returns a sentence that says who can read a published version, and names any folder that keeps other users out.

    Args:
        version_dir: Folder of the version.
    """
    for folder in (version_dir, *version_dir.resolve().parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            return f"other users cannot read it: {folder} has mode {stat.S_IMODE(mode):04o}"
    return "every user of this machine can read it"


def _sync(folder: pathlib.Path) -> None:
    """Writes everything in a folder to the disk, so that a power failure after the rename leaves no empty files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename_into_place(staging: pathlib.Path, base: pathlib.Path, version: int | None) -> pathlib.Path:
    while True:
        number = max(version_folders(base), default=0) + 1 if version is None else version
        _check_version(base, number)
        target = base / str(number)
        try:
            # Fails if another exporter was faster, because a rename never replaces a folder that holds files.
            staging.rename(target)
        except OSError:
            if version is None and target.is_dir():
                continue
            raise
        descriptor = os.open(base, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return target
