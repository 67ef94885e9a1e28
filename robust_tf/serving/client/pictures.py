"""Which files of a folder are pictures: by their first bytes, so that neither a suffix nor its absence decides."""

import dataclasses
import pathlib
from collections.abc import Sequence

from robust_tf.errors import UserError

_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".jxl"}
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")
_KINDS = "JPEG, PNG, GIF, BMP, WebP or JPEG XL"


@dataclasses.dataclass
class Pictures:
    """What was found under the names that somebody gave.

    Attributes:
        entries: each picture, and each file that should be one and can't be sent, with the reason ("" for pictures).
        hidden: number of hidden files, such as ._cat.jpg; none is sent.
        others: number of other files in the folders; none is sent.
    """

    entries: list[tuple[pathlib.Path, str]] = dataclasses.field(default_factory=list)
    hidden: int = 0
    others: int = 0

    def left_out_line(self) -> str:
        """One line about the files that are not sent, "" when there are none."""
        counts = [(self.hidden, "hidden file", "hidden files"), (self.others, "other file", "other files")]
        texts = [f"{count} {one if count == 1 else many}" for count, one, many in counts if count]
        return f"Not sent: {' and '.join(texts)}." if texts else ""


def find_pictures(names: Sequence[str]) -> Pictures:
    """The pictures among files, and those in folders and their sub-folders.

    A file that was named itself counts as a picture, whatever its content: the server says what it thinks of it.

    Raises:
        UserError: a name stands for nothing, or there is no picture at all.
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
            found.entries.append((path, "no regular file"))
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
                reason = "a link to a file that does not exist" if path.is_symlink() else "no regular file"
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
        # "BM" begins many a text too.
        if beginning.startswith(b"BM") and not should_be_one:
            found.others += 1
        else:
            found.entries.append((path, ""))
    elif should_be_one:
        found.entries.append((path, f"the file is no {_KINDS}" if beginning else "the file is empty"))
    else:
        found.others += 1
