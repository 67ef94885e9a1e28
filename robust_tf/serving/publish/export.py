"""From a classifier to a checked version in a folder that TF Serving watches, all of it or nothing."""

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

    The version is written under another name beside its place, loaded as TensorFlow Serving loads it, every
    signature run and compared with `classifier.predict`, the warm-up requests replayed, and only then renamed into
    place. A server that watches the folder never sees a part of it, and an export that is stopped or goes wrong
    publishes nothing. BatchNorm after a convolution is folded into it (float32): the SavedModel is for inference.

    Args:
        classifier: any Keras model that `plain_classifier` takes, for images (batch, H, W, 3) in [0, 1], H = W.
        export_dir: the folder of all models.
        model_name: the name in requests, and of the folder; without "/" and ":".
        model_card: facts to publish as `model_card.json` (data, metric, accuracies, licence, ...). What the classifier
            itself tells (sizes, classes, pixel range, versions) is added.
        labels: class names in the order of the logits; "0", "1", ... when None.
        version: at least 1; None takes the next free one.
        resize_size: what encoded images' shorter side is resized to before the centre crop; None takes the size of
            the classifier's images.
        decoding: how EXIF rotation and transparency of encoded images are treated, as in training.
        attack_probe: serve this attack as the signature `attack_probe`.
        original: the model that `classifier` was made from. The served probabilities must equal the ones that it gives.
        world_readable: give the version, and the folders made for it, the modes 0755 and 0644, whatever the umask
            is: a server usually runs as a user who could not read them under umask 077. False keeps the umask.

    Returns:
        The folder of the new version.

    Raises:
        UserError: an argument is at fault, the version exists, the folder cannot be written, or the export does not
            answer as the classifier does.
    """
    original = original or classifier
    classifier = plain_classifier(classifier)
    image_size, num_classes = _sizes(classifier)
    labels = _checked_labels(labels, num_classes)
    resize_size = image_size if resize_size is None else resize_size
    if resize_size < image_size:
        raise UserError(
            f"resize_size is at least the classifier's image size, {image_size}. Received: resize_size={resize_size}."
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
        # The tf.Variables themselves: a Keras model (or Keras variables) here would be stored twice over, or not be
        # found again by TensorFlow Serving's loader.
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
    """Side of the images and number of classes."""
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
            f"One label for each of the classifier's {num_classes} classes is needed. Received: {len(labels)} labels."
        )
    for label in labels:
        if not label.strip() or "\n" in label or "\r" in label:
            raise UserError(f"A label is one line of text that is not empty. Received: {label!r}.")
    if len(set(labels)) != len(labels):
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        raise UserError(f"Labels must differ from each other. Received more than once: {', '.join(twice)}.")
    return list(labels)


def model_folder(export_dir: pathlib.Path, model_name: str) -> pathlib.Path:
    """Where the versions of a model lie. Raises UserError for a name that is none of a folder."""
    if not model_name or set(model_name) & set("/:\\\0") or model_name.startswith("."):
        raise UserError(
            "A model name is a folder's name without '/', '\\' and ':' that doesn't start with a dot. Received: "
            f"{model_name!r}."
        )
    return export_dir / model_name


def _check_version(base: pathlib.Path, version: int) -> None:
    if not 1 <= version <= MAX_VERSION:
        raise UserError(f"A version is a number from 1 to {MAX_VERSION}. Received: version={version}.")
    there = version_folders(base)
    if version in there:
        raise UserError(
            f"A published version is never overwritten. Received: version={version}, and {there[version]} exists. "
            f"Take --version={max(there) + 1}, or none for the next free one."
        )


@contextlib.contextmanager
def _staging_folder(base: pathlib.Path, world_readable: bool) -> Iterator[pathlib.Path]:
    """A folder beside the versions whose name is no number, so no server looks into it; gone after the block."""
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
    """Holds a lock on a folder that ends with the process, however that ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(base: pathlib.Path) -> None:
    """Removes what exporters that were killed have left: folders that nobody holds the lock of."""
    for folder in base.glob(".export-*"):
        # Another process's folder may be gone by now, or be too young to be locked yet.
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                with _locked(folder):
                    shutil.rmtree(folder)


def _make_readable(folder: pathlib.Path) -> None:
    """Lets every user read a folder and what is in it, and its owner alone write."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(_FOLDER_MODE if path.is_dir() else _FILE_MODE)


def readers_of(version_dir: pathlib.Path) -> str:
    """Says who can read a published version, and names the folder that keeps other users from it."""
    for folder in (version_dir, *version_dir.resolve().parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            return f"other users cannot read it: {folder} has mode {stat.S_IMODE(mode):04o}"
    return "every user of this machine can read it"


def _sync(folder: pathlib.Path) -> None:
    """Everything below a folder onto the disk, so that a power cut after the rename can't leave empty files."""
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
            staging.rename(target)  # fails when another exporter was quicker: a folder with files is never replaced
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
