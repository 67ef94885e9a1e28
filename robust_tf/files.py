"""Files that are either the old one or the whole new one, never half of it."""

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
    """Gives a temporary sibling to write to; it replaces `path` when the block ends well, and is removed when not.

    The sibling keeps the suffix of `path` (Keras chooses the format by it) and lies in the same folder, so that the
    replacement is one rename on one file system.

    Raises:
        UserError: the folder or the file cannot be written (permission, full disk); `path` is as it was.
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
        kept = "the file that was there is unchanged" if path.exists() else "nothing was left behind"
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}; {kept}. Free some space, or choose a folder that "
            "you may write to."
        ) from error


def check_output_folder(folder: pathlib.Path, flag: str) -> None:
    """Refuses a folder that can't be made or written to, before the work whose results go there; leaves nothing behind.

    Args:
        folder: need not exist.
        flag: the flag that chooses it, e.g. "--export_dir", for the message.

    Raises:
        UserError: names the folder and the reason.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        # Permission bits don't tell what a read-only disk, a full one, or an administrator's account may do: try.
        trial = pathlib.Path(tempfile.mkdtemp(prefix=".robust_tf-", dir=there))
        try:
            (trial / folder.relative_to(there)).mkdir(parents=True, exist_ok=True)
            (trial / folder.relative_to(there) / "file").touch()
        finally:
            shutil.rmtree(trial)
    except OSError as error:
        raise UserError(
            f"{flag} needs a folder that can be made and written to. Received: {folder} "
            f"({there}: {error.strerror or error}). Choose another one."
        ) from error


def check_output_file(path: pathlib.Path, flag: str) -> None:
    """The same for a file, which may exist.

    Raises:
        UserError: it is a folder, or the folder that it belongs into can't be made or written to.
    """
    if path.is_dir():
        raise UserError(f"{flag} is a file to write. Received: {path}, which is a folder. Choose another name.")
    check_output_folder(path.parent, flag)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically; NaN and infinity are refused, since JSON has neither."""
    with replaced_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


# What an operating system says of a folder that cannot be written at all, however much room there is.
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def is_not_writable(error: OSError) -> bool:
    """Whether an error says that a folder cannot be written at all; a full disk is another matter."""
    return error.errno in _NOT_WRITABLE


def temporary_cache(reason: OSError, folder: pathlib.Path) -> pathlib.Path:
    """A folder to use in place of a cache folder that cannot be written; it goes when the process ends.

    Args:
        reason: why it cannot be.
        folder: the cache folder, for the warning.
    """
    temporary = tempfile.mkdtemp(prefix="robust_tf-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    warn_user(
        f"Cannot write the cache folder {folder}: {reason.strerror or reason}. What is made now is kept in {temporary} "
        "until the program ends."
    )
    return pathlib.Path(temporary)


def cache_folder(folder: str | pathlib.Path | None = None) -> pathlib.Path:
    """Where what can be made again is kept: `folder`, by default `robust_tf` in the user's cache folder."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = pathlib.Path(folder or pathlib.Path(users) / "robust_tf")
    try:
        return path.expanduser()
    except RuntimeError:  # a user without a home folder, as in some containers
        return pathlib.Path(tempfile.gettempdir()) / f"robust_tf-{os.getuid()}"
