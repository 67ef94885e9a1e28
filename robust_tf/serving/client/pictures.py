"""Finds the pictures in folders. A file is recognized by its first bytes, not by its suffix."""

import dataclasses
import pathlib
from collections.abc import Sequence

from robust_tf.errors import UserError

_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".jxl"}
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")
_KINDS = "JPEG, PNG, GIF, BMP, WebP or JPEG XL"


@dataclasses.dataclass
class Pictures:
    """The result of a search for pictures.

    Attributes:
        entries: Pairs of a path and a reason. The reason is "" for a picture that can be sent. For a file that looks
            like a picture but cannot be sent, it says why.
        hidden: Number of hidden files, such as ._cat.jpg. They are not sent.
        others: Number of other files in the folders. They are not sent.
    """

    entries: list[tuple[pathlib.Path, str]] = dataclasses.field(default_factory=list)
    hidden: int = 0
    others: int = 0

    def left_out_line(self) -> str:
        """Returns one line about the hidden and other files, or "" if there are none."""
        counts = [(self.hidden, "hidden file", "hidden files"), (self.others, "other file", "other files")]
        texts = [f"{count} {one if count == 1 else many}" for count, one, many in counts if count]
        return f"Not sent: {' and '.join(texts)}." if texts else ""


def find_pictures(names: Sequence[str]) -> Pictures:
    """Finds the pictures among files and folders.

    Args:
        names: Paths of files and folders. Folders are searched with their subfolders. A file that is named
            directly counts as a picture; the server will report it if it is not one.

    Raises:
        UserError: A path does not exist, or there is no picture at all.
    """
    found = Pictures()
    for path in map(pathlib.Path, names):
        if path.is_dir():
            _search(path, found)
        elif path.is_file():
            found.entries.append((path, ""))
        elif path.is_symlink():
            found.entries.append((path, "a link to a file that does not exist"))
        elif path.exists():
            found.entries.append((path, "not a regular file"))
        else:
            raise UserError(f"There is no such file or folder. Received: {path}.")
    if not found.entries:
        received = f"{', '.join(names)}. {found.left_out_line()}".strip()
        raise UserError(f"There is no picture ({_KINDS}) in the folder. Received: {received}")
    return found


def _search(folder: pathlib.Path, found: Pictures) -> None:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_dir():
            continue
        should_be_one = path.suffix.lower() in _SUFFIXES
        if hidden:
            found.hidden += 1
        elif not path.is_file():
            if should_be_one:
                reason = "a link to a file that does not exist" if path.is_symlink() else "not a regular file"
                found.entries.append((path, reason))
            else:
                found.others += 1
        else:
            _look_at(path, should_be_one, found)


def _look_at(path: pathlib.Path, should_be_one: bool, found: Pictures) -> None:
    try:
        with path.open("rb") as file:
            beginning = file.read(12)
    except OSError as error:
        found.entries.append((path, f"can't be read: {error.strerror}"))
        return
    if beginning.startswith(_BEGINNINGS) or (beginning[:4], beginning[8:]) == (b"RIFF", b"WEBP"):
        # A text file may also start with "BM".
        if beginning.startswith(b"BM") and not should_be_one:
            found.others += 1
        else:
            found.entries.append((path, ""))
    elif should_be_one:
        found.entries.append((path, f"the file is not a {_KINDS} image" if beginning else "the file is empty"))
    else:
        found.others += 1
