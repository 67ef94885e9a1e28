"""Safe output: replaces files as a whole, and checks output folders before the work begins."""

import atexit
import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

from robust_tf.errors import UserError, warn_user


@contextlib.contextmanager
def replaced_atomically(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary file to write to, which replaces `path` when the block ends without an error.

    After an error the temporary file is removed, and `path` is as it was. The temporary file has the suffix of `path`,
    because Keras chooses the format by the suffix. It is in the same folder, so replacing `path` is a single rename on
    one file system.

    Args:
        path: File to write. Its folder is made if it does not exist.

    Yields:
        Path of the temporary file.

    Raises:
        UserError: The folder or the file cannot be written, for lack of permission or of disk space.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "figures" / "losses.csv"
        ...     with replaced_atomically(path) as temporary:
        ...         _ = temporary.write_text("epoch,loss")
        ...     path.read_text()
        'epoch,loss'
    """
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        kept = "the existing file is unchanged" if path.exists() else "nothing was left behind"
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}; {kept}. Free some disk space, or choose a folder that "
            "you are allowed to write to."
        ) from error


def check_output_folder(folder: pathlib.Path, flag: str) -> None:
    """Refuses a folder that cannot be made or written to. Programs call this before they do any work.

    Args:
        folder: Folder, which need not exist. It is not made.
        flag: Flag that chooses the folder, such as "--export_dir", for the message.

    Raises:
        UserError: The folder cannot be made or written to.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        # Permission bits say nothing about read-only disks, full disks and administrators, so try to write.
        trial = pathlib.Path(tempfile.mkdtemp(prefix=".robust_tf-", dir=there))
        try:
            (trial / folder.relative_to(there)).mkdir(parents=True, exist_ok=True)
            (trial / folder.relative_to(there) / "file").touch()
        finally:
            shutil.rmtree(trial)
    except OSError as error:
        raise UserError(
            f"{flag} needs a folder that can be made and written to. Received: {folder} "
            f"({there}: {error.strerror or error}). Choose another folder."
        ) from error


def check_output_file(path: pathlib.Path, flag: str) -> None:
    """Refuses a file that cannot be written. Programs call this before they do any work.

    Args:
        path: File, which may exist.
        flag: Flag that chooses the file, such as "--output", for the message.

    Raises:
        UserError: The path is a folder, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise UserError(f"{flag} is the file to write. Received: {path}, which is a folder. Choose another name.")
    check_output_folder(path.parent, flag)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file of indented JSON, atomically.

    Args:
        path: File to write.
        content: What to write. NaN and infinity are refused, because JSON has neither.

    Raises:
        UserError: The file cannot be written.
        ValueError: The content cannot be written as JSON.
    """
    with replaced_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


# Errors of the operating system for a folder that cannot be written to for reasons other than a full disk.
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def is_not_writable(error: OSError) -> bool:
    """Returns whether an error says that a folder cannot be written to at all. A full disk does not count."""
    return error.errno in _NOT_WRITABLE


def temporary_cache(reason: OSError, folder: pathlib.Path) -> pathlib.Path:
    """Returns a temporary folder to use instead of a cache folder that cannot be written to, and warns the user.

    The folder is removed when the process ends.

    Args:
        reason: Error from writing to the cache folder.
        folder: The cache folder, for the warning.
    """
    temporary = tempfile.mkdtemp(prefix="robust_tf-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    warn_user(
        f"Cannot write the cache folder {folder}: {reason.strerror or reason}. New files are kept in {temporary} "
        "until the program ends."
    )
    return pathlib.Path(temporary)


def cache_folder(folder: str | pathlib.Path | None = None) -> pathlib.Path:
    """Returns the cache folder, which is for files that can be created again.

    Args:
        folder: Folder that the user chose. Default: `robust_tf` in the user's cache folder.

    Example:
        >>> cache_folder("cache").name
        'cache'
    """
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = pathlib.Path(folder or pathlib.Path(users) / "robust_tf")
    try:
        return path.expanduser()
    except RuntimeError:  # a user without a home folder, as in some containers
        return pathlib.Path(tempfile.gettempdir()) / f"robust_tf-{os.getuid()}"
