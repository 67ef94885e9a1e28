"""Puts versions in place: writes them under a temporary name first, and renames them when they are complete."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import stat
import time
import uuid
from collections.abc import Iterator

import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.serving.artifacts.card import FORMATS
from robust_tf.serving.model.folders import MAX_VERSION, SAVED_MODEL, version_folders

_ABANDONED_AFTER_SECONDS = 60
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644


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


def format_folder(base: pathlib.Path, format_name: str) -> pathlib.Path:
    """Returns the folder that holds the versions of a model in one format.

    SavedModels are in the model's folder itself, because TensorFlow Serving looks for them there. The versions of any
    other format are in a subfolder. Its name is not a number, so TensorFlow Serving ignores it, and it cannot clash
    with the name of another model. Whoever copies or deletes a model's folder copies or deletes all of its formats.

    Args:
        base: Folder of the model.
        format_name: Name in `FORMATS`.

    Example:
        >>> format_folder(pathlib.Path("export/pets"), "onnx").as_posix()
        'export/pets/onnx'
    """
    return base if FORMATS[format_name].file == SAVED_MODEL else base / format_name


def check_version(folder: pathlib.Path, version: int) -> None:
    """Refuses the number of a version that is out of range or exists already.

    Args:
        folder: Folder of the versions of one format.
        version: Number of the version.

    Raises:
        UserError: The number is refused.
    """
    if not 1 <= version <= MAX_VERSION:
        raise UserError(f"A version must be a number from 1 to {MAX_VERSION}. Received: version={version}.")
    there = version_folders(folder)
    if version in there:
        raise UserError(
            f"A published version is never overwritten. Received: version={version}, and {there[version]} exists. "
            f"Use --version={max(there) + 1}, or leave the flag out for the next free number."
        )


@contextlib.contextmanager
def staging_folder(base: pathlib.Path, world_readable: bool) -> Iterator[pathlib.Path]:
    """Creates a temporary folder beside the versions. Its name is not a number, so servers ignore it.

    Args:
        base: Folder of the versions of one format.
        world_readable: Whether every user may read the folders that are created for it.

    Raises:
        UserError: The folder cannot be written, or something in the block cannot be written.
    """
    staging = base / f".export-{uuid.uuid4().hex[:12]}"
    try:
        missing = [folder for folder in (base, *base.parents) if not folder.exists()]
        staging.mkdir(parents=True)
        if world_readable:
            for folder in missing:
                folder.chmod(_FOLDER_MODE)
        _remove_abandoned(base)
        with locked(staging):
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
def locked(folder: pathlib.Path) -> Iterator[None]:
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
                with locked(folder):
                    shutil.rmtree(folder)


def make_readable(folder: pathlib.Path) -> None:
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


def sync(folder: pathlib.Path) -> None:
    """Writes everything in a folder to the disk, so that a power failure after the rename leaves no empty files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename_into_place(staging: pathlib.Path, base: pathlib.Path, version: int | None) -> pathlib.Path:
    """Turns a staging folder into a version, by a single rename.

    Args:
        staging: Folder from `staging_folder`.
        base: Folder of the model.
        version: Number of the version. None takes the next number that no format of the model has.

    Returns:
        The folder of the version.

    Raises:
        UserError: The version exists.
        OSError: The folder cannot be renamed.
    """
    folder = staging.parent
    while True:
        number = _next_version(base) if version is None else version
        check_version(folder, number)
        target = folder / str(number)
        try:
            # Fails if another exporter was faster, because a rename never replaces a folder that holds files.
            staging.rename(target)
        except OSError:
            if version is None and target.is_dir():
                continue
            raise
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return target


def _next_version(base: pathlib.Path) -> int:
    """Returns the next number that no format has, so that a number stands for the same weights in all formats."""
    return 1 + max(max(version_folders(format_folder(base, name)), default=0) for name in FORMATS)
