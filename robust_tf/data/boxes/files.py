"""Finds the files of detection and segmentation data sets: the folders of the parts, image sizes, and the split."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence

from PIL import Image

from robust_tf.data.folder_scan import FolderScan, ImageFile
from robust_tf.data.records import printable
from robust_tf.errors import UserError

# Names of the folder of each part, in lower case.
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}
# Share of the images that becomes the test part if there is none.
_TEST_FRACTION = 0.2
# Up to this number of images, every file is opened when the data set is, which takes some seconds.
MOST_OPENED_FILES = 4000

_ORIENTATION_TAG = 0x0112


def part_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the folders of the parts of a data set: "train", "test" and "validation", those that exist.

    If there is a validation folder but no test folder, it is the test part, as in COCO and ImageNet.

    Raises:
        UserError: If two folders stand for the same part, or if the folder has parts but none for training.
    """
    part_of = {name: part for part, names in _PARTS.items() for name in names}
    parts: dict[str, pathlib.Path] = {}
    for path in sorted(root.iterdir()):
        part = part_of.get(path.name.casefold())
        if part is None or not path.is_dir():
            continue
        if part in parts:
            raise UserError(
                f"A data set has one folder for each part. Received: {parts[part].name} and {path.name} in "
                f"{printable(str(root))}. Merge the two, or move one of them away."
            )
        parts[part] = path
    if parts and "train" not in parts:
        names = " and ".join(path.name for path in parts.values())
        raise UserError(
            f"A data set with parts needs a folder that is called train. Received: {printable(str(root))} with "
            f"{names}, but without train."
        )
    if "validation" in parts and "test" not in parts:
        parts["test"] = parts.pop("validation")
    return parts


def stem_of(path: str, folder: pathlib.Path) -> str:
    """Returns the path of a file within a folder without its suffix. An image and its annotations have it in common."""
    return str(pathlib.PurePath(path).relative_to(folder).with_suffix(""))


def images_by_stem(folder: pathlib.Path, scan: FolderScan) -> dict[str, ImageFile]:
    """Returns the images in a folder and its subfolders by their path within it without the suffix, sorted.

    Args:
        folder: Folder with images. Other files in it are left out.
        scan: Scan that collects the names of other files.

    Raises:
        UserError: If an image cannot be read, or if two images differ only in the suffix.
    """
    found: dict[str, ImageFile] = {}
    for file in scan.images(folder):
        stem = stem_of(file.path, folder)
        if stem in found:
            raise UserError(
                "The names of images must differ in more than the suffix, because annotations belong to an image by "
                f"name. Received: {printable(found[stem].path)} and {printable(file.path)}. Rename one of them."
            )
        found[stem] = file
    if scan.bad:
        path, reason = next(iter(scan.bad.items()))
        more = f" and {len(scan.bad) - 1} more" if len(scan.bad) > 1 else ""
        raise UserError(
            "Images must be JPEG, PNG, GIF, BMP or WebP files that can be read. Received: "
            f"{printable(path)} ({reason}){more}. Convert or repair them, or remove them and their annotations."
        )
    return found


def image_file(path: pathlib.Path) -> ImageFile | None:
    """Returns the record of an image file, or None if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return ImageFile(str(path), status.st_size, status.st_mtime_ns, "")


def image_size(path: str) -> tuple[int, int, int]:
    """Returns the height and the width of an image as it is stored, and its EXIF orientation, 1 to 8.

    Raises:
        UserError: If the file is not an image that can be read.
    """
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1) if image.format == "JPEG" else 1
            return image.height, image.width, orientation if orientation in range(1, 9) else 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"Every image must be a file that can be read. Received: {printable(path)} ({printable(str(error))}). "
            "Repair it, or remove it and its annotations."
        ) from error


def is_turned(stored: tuple[int, int, int], height: float, width: float) -> bool | None:
    """Compares the size of an image with the one that its annotations are made for.

    Args:
        stored: Height, width and EXIF orientation of the image, see `image_size`.
        height: Height of the image in the annotations, in pixels.
        width: Width of the image in the annotations, in pixels.

    Returns:
        False if the sizes are equal, True if they are equal after the image is turned as its EXIF data says, and None
        if they differ.
    """
    if (height, width) == stored[:2]:
        return False
    return True if stored[2] >= 5 and (width, height) == stored[:2] else None


def turned_note(count: int) -> tuple[str, ...]:
    """Returns a note about images whose annotations are made for the image as EXIF data turns it, or nothing."""
    if not count:
        return ()
    return (
        f"The annotations of {count:,} images belong to the image as its EXIF data turns it. Use --exif=apply, or they "
        "lie in the wrong places.",
    )


def chosen_for_testing(names: Sequence[str], seed: int) -> set[str]:
    """Returns the fifth of the names that becomes the test part. It rarely changes when names are added.

    Args:
        names: Names of the images within the folder.
        seed: Seed for the choice.

    Raises:
        UserError: If there are fewer than two images.
    """
    if len(names) < 2:
        raise UserError(
            f"A data set without a test part needs two or more images, of which a fifth becomes the test part. "
            f"Received: {len(names)}. Add some images."
        )

    def rank(name: str) -> bytes:
        return hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest()

    return set(sorted(names, key=rank)[: max(1, round(_TEST_FRACTION * len(names)))])


def check_split_seed(split_seed: int, test_part: object) -> None:
    """Refuses a seed for the choice of the test part if the data set has a test part.

    Args:
        split_seed: Seed, 0 if none is given.
        test_part: Test part of the data set, for the message.
    """
    if split_seed:
        raise UserError(
            "split_seed is only for a folder without a test part. Received: "
            f"split_seed={split_seed}, and the test part {printable(str(test_part))}."
        )


def fingerprint_of(files: Iterable[tuple[ImageFile, bytes]], root: pathlib.Path, settings: object) -> str:
    """Returns a text that changes when files or their labels change.

    Args:
        files: Each file, and bytes that stand for its label.
        root: Folder of the data set, whose own path makes no difference.
        settings: Further settings on which the content depends.
    """
    digest = hashlib.sha256(repr(settings).encode("utf-8", "surrogateescape"))
    for file, label in files:
        digest.update(os.fsencode(f"{os.path.relpath(file.path, root)}\t{file.num_bytes}\t{file.changed}\n"))
        digest.update(hashlib.sha256(label).digest())
    return digest.hexdigest()


def check_folder(root: pathlib.Path) -> None:
    """Refuses a path that is not a folder."""
    if not root.is_dir():
        raise UserError(
            f"folder:PATH needs the path of a folder of images. Received: {printable(str(root))}, which is not a "
            "folder. Correct the path."
        )
