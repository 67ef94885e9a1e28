"""Finds the images in a folder, and records which files were left out and why."""

import collections
import dataclasses
import os
import pathlib
import stat

from robust_tf.data.records import LeftOut
from robust_tf.errors import UserError

# Formats that `decode` reads.
_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp"})
# Other image formats. Leaving such files out silently would change the data set.
_OTHER_SUFFIXES = frozenset(
    ".tif .tiff .heic .heif .avif .jp2 .j2k .jxl .svg .svgz .ppm .pgm .pbm .pnm .tga .psd .ico "
    ".cr2 .nef .arw .dng".split()
)
_SYSTEM_NAMES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"})
_HEAD_BYTES = 512
# First bytes of the formats that `decode` reads. BMP and WebP are recognized by later bytes, too.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")
_BMP_HEADER_SIZES = frozenset({12, 40, 52, 56, 64, 108, 124})
_OTHER_SIGNATURES = (
    *(b"II*\0", b"MM\0*", b"8BPS", b"\xff\x0a", b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\0\0\1\0"),
)
_OTHER_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis"})

HIDDEN = "hidden and system files"
DANGLING = "broken links"
OTHER_FILES = "files that are not images"
OUTSIDE = "images outside of the class folders"
OUTSIDE_FOLDERS = "folders that belong to no part"
_LOOPS = "links to a folder that contains them"


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One image file.

    Attributes:
        path: Path of the file.
        num_bytes: Size in bytes.
        changed: Time of the last change, in nanoseconds.
        class_name: Name of the class.
    """

    path: str
    num_bytes: int
    changed: int
    class_name: str


class FolderScan:
    """Collects the images of class folders and the names of all other files.

    Attributes:
        bad: Images that TensorFlow cannot read: path -> what is wrong.
        without_images: Class folders that hold no readable image.
    """

    def __init__(self) -> None:
        self.bad: dict[str, str] = {}
        self.without_images: list[str] = []
        # The inner dictionaries serve as ordered sets, because a folder may be scanned twice.
        self._left_out: dict[str, dict[str, None]] = collections.defaultdict(dict)

    def class_folders(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Returns the folders that lie directly in a folder, sorted by name. Leaves out the files next to them."""
        return [path for path in self._entries(folder) if not self._is_file(path)]

    def leave_out(self, what: str, path: str) -> None:
        """Records that a file or folder is not part of the data set.

        Args:
            what: Kind of the file, as a plural for messages.
            path: Path of the file.
        """
        self._left_out[what][path] = None

    def images(self, folder: pathlib.Path) -> list[ImageFile]:
        """Returns the images in a class folder and its subfolders, sorted by name."""
        parents = {*folder.absolute().parents, *folder.resolve().parents}
        found = self._images(folder, folder.name, tuple(_identity(path) for path in parents))
        if not found:
            self.without_images.append(str(folder))
        return found

    def left_out(self) -> tuple[LeftOut, ...]:
        """Returns everything that was found but is not part of the data set."""
        return tuple(LeftOut(what, tuple(paths)) for what, paths in self._left_out.items())

    def _images(self, folder: pathlib.Path, class_name: str, above: tuple[tuple[int, int], ...]) -> list[ImageFile]:
        identity = _identity(folder)
        if identity in above:
            self.leave_out(_LOOPS, str(folder))
            return []
        found = []
        for path in self._entries(folder):
            if path.is_dir():
                found += self._images(path, class_name, (*above, identity))
            elif self._is_image(path):
                status = path.stat()
                found.append(ImageFile(str(path), status.st_size, status.st_mtime_ns, class_name))
        return found

    def _is_file(self, path: pathlib.Path) -> bool:
        """Returns whether an entry next to class folders is a file, and leaves it out in this case."""
        if path.is_dir():
            return False
        if self._is_image(path) or self.bad.pop(str(path), ""):
            self.leave_out(OUTSIDE, str(path))
        return True

    def _entries(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Returns the existing files and folders in a folder that are not hidden, sorted by name."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise UserError(f"Cannot read the folder {folder}: {error.strerror}. Make it readable.") from error
        entries = []
        for name in names:
            path = folder / name
            if name.startswith(".") or name.casefold() in _SYSTEM_NAMES:
                self.leave_out(HIDDEN, str(path))
                continue
            try:
                path.stat()
            except PermissionError:
                self.bad[str(path)] = "permission denied"
            except OSError:  # a link to a missing file, or to itself
                self.leave_out(DANGLING, str(path))
            else:
                entries.append(path)
        return entries

    def _is_image(self, path: pathlib.Path) -> bool:
        """Returns whether a file is a readable image, and records what is wrong if it is not."""
        status, suffix = path.stat(), path.suffix.lower()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            self.leave_out(OTHER_FILES, str(path))
            return False
        is_named_image = suffix in _SUFFIXES or suffix in _OTHER_SUFFIXES
        if is_named_image and not status.st_size:
            self.bad[str(path)] = "empty, 0 bytes"
            return False
        if not os.access(path, os.R_OK):
            self.bad[str(path)] = "permission denied"
            return False
        if suffix in _SUFFIXES:
            return True
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        if _is_decodable(head):
            return True
        if suffix in _OTHER_SUFFIXES or _is_other_image(head):
            self.bad[str(path)] = "unsupported image format"
        else:
            self.leave_out(OTHER_FILES, str(path))
        return False


def _identity(folder: pathlib.Path) -> tuple[int, int]:
    """Returns numbers that are the same for a folder and all links to it, and different for any other folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_decodable(head: bytes) -> bool:
    """Returns whether a file that begins with these bytes has a format that `decode` reads."""
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    if head.startswith(b"BM"):  # a text file may begin with these letters, too
        return int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES
    return head.startswith(_SIGNATURES)


def _is_other_image(head: bytes) -> bool:
    if head[4:8] == b"ftyp":
        return head[8:12] in _OTHER_BRANDS
    return head.startswith(_OTHER_SIGNATURES) or b"<svg" in head.lower()
