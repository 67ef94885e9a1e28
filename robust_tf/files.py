"""Files that are either the old one or the whole new one, never half of it."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

from robust_tf.errors import UserError


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


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically; NaN and infinity are refused, since JSON has neither."""
    with replaced_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def cache_folder(folder: str | pathlib.Path | None = None) -> pathlib.Path:
    """Where what can be made again is kept: `folder`, by default `robust_tf` in the user's cache folder."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(folder or pathlib.Path(users) / "robust_tf").expanduser()
