"""Reads a folder of images that has one folder for each class."""

import abc
import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from robust_tf.data.folder_scan import OUTSIDE_FOLDERS, FolderScan, ImageFile
from robust_tf.data.records import LabeledImages, check_class_names, few, printable
from robust_tf.errors import UserError

# Names of the folder of each part, in lower case.
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}
# Share of each class that becomes the test part if there is no test folder.
_TEST_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class FilePart(abc.ABC):
    """Image files in the order of the examples. See `Part` for the methods. Subclasses know the labels.

    Attributes:
        paths: Paths of the images.
    """

    paths: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        """Number of images."""
        return len(self.paths)

    def records(self) -> tf.data.Dataset:
        """Returns a dataset of (index, encoded image, label)."""
        return tf.data.Dataset.range(len(self.paths)).map(self.record, num_parallel_calls=tf.data.AUTOTUNE)

    def record(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns one record by its number. With this method, examples can be read in any order.

        Args:
            index: Number of the example, an integer scalar.

        Returns:
            The index, the encoded image and the label.
        """
        return index, tf.io.read_file(tf.gather(self._path_table, index)), self.label(index)

    @abc.abstractmethod
    def label(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the label of an example by its number, an integer scalar."""

    def labels(self) -> np.ndarray:
        """Returns zeros, (num_examples,) int64, for images whose label is not a class."""
        return np.zeros(self.num_examples, np.int64)

    def name(self, index: int) -> str:
        """Returns the path of an image."""
        return printable(self.paths[index])

    @functools.cached_property
    def _path_table(self) -> tf.Tensor:
        return path_table(self.paths)


@dataclasses.dataclass(frozen=True)
class FolderPart(FilePart):
    """Image files and their classes.

    Attributes:
        targets: Label of each image.
    """

    targets: tuple[int, ...]

    def label(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the class of an example by its number, an integer scalar."""
        return tf.gather(self._label_table, index)

    @functools.cached_property
    def _label_table(self) -> tf.Tensor:
        with tf.init_scope():
            return tf.constant(self.labels())

    def labels(self) -> np.ndarray:
        """Returns all labels, (num_examples,) int64."""
        return np.array(self.targets, np.int64)


def path_table(paths: Sequence[str]) -> tf.Tensor:
    """Returns paths as a tensor of strings, outside of the graph of the function that happens to use it first."""
    with tf.init_scope():
        # As bytes, because the name of a file may not be valid text.
        return tf.constant([os.fsencode(path) for path in paths], tf.string)


def open_folder(root: pathlib.Path, *, split_seed: int = 0, skip_bad_images: bool = False) -> LabeledImages:
    """Opens a folder of images.

    The folder has one of these layouts. Images may also lie in subfolders of a class folder.

    * root/{train,test}/<class>/<image>, and optionally root/val/<class>/<image> for a validation part.
    * root/{train,val}/<class>/<image>, the layout of ImageNet. Here val is the test part.
    * root/<class>/<image> or root/train/<class>/<image>. A fifth of each class becomes the test part. The part of an
      image depends on its name and on `split_seed`, so it rarely changes when images are added.

    The names of these folders may contain capital letters, and training, testing, valid and validation are accepted as
    well. A file is recognized as an image by its suffix or, if it has no known suffix, by its first bytes. All other
    files are listed in `left_out` of the result.

    Args:
        root: Path of the folder.
        split_seed: Seed for the choice of the test part, if the folder has none.
        skip_bad_images: Whether to leave out images that are empty, unreadable or in a format that TensorFlow cannot
            decode, instead of raising an error.

    Raises:
        UserError: If there is no such folder, if it has fewer than two classes, if a class has no images, if the name
            of a class is not one line of text, if an image cannot be read and `skip_bad_images` is false, or if
            `split_seed` is given for a folder that has a test part.
    """
    if not root.is_dir():
        raise UserError(
            "folder:PATH needs the path of a folder of images. Received: "
            f"{printable(str(root))}, which is not a folder."
        )
    scan = FolderScan()
    train_root, test_root, validation_root = _part_roots(root, scan)
    train = _files(train_root, scan)
    validation = _files(validation_root, scan) if validation_root else []
    if test_root is None:
        train, test = _split(train, train_root, split_seed)
    elif split_seed:
        raise UserError(
            "split_seed is only for a folder of images without a test part. Received: "
            f"split_seed={split_seed}, and a folder with {test_root}."
        )
    else:
        test = _files(test_root, scan)
    if scan.bad and not skip_bad_images:
        first, reason = next(iter(scan.bad.items()))
        more = f" and {len(scan.bad) - 1} more" if len(scan.bad) > 1 else ""
        raise UserError(
            "Images must be JPEG, PNG, GIF, BMP or WebP files that can be read. Received: "
            f"{printable(first)} ({reason}){more}. Convert or repair them, remove them, or "
            "leave such images out with skip_bad_images=True (--skip_bad_images)."
        )
    if scan.without_images:
        bad = f", and images in the data set that cannot be read ({len(scan.bad)})" if scan.bad else ""
        raise UserError(
            f"Every class needs images in its folder or a subfolder. Received: none in {few(scan.without_images)}{bad}."
        )
    everything = [*train, *validation, *test]
    class_names = tuple(sorted({file.class_name for file in everything}))
    if len(class_names) < 2:
        raise UserError(
            f"A data set needs two or more classes. Received: only {class_names[0]!r} in {printable(str(train_root))}."
        )
    number = {name: label for label, name in enumerate(class_names)}

    def part(files: Sequence[ImageFile]) -> FolderPart:
        return FolderPart(tuple(file.path for file in files), tuple(number[file.class_name] for file in files))

    return LabeledImages(
        class_names=class_names,
        train=part([*train, *validation]),
        test=part(test),
        validation=np.repeat([False, True], [len(train), len(validation)]) if validation else None,
        num_bytes=sum(file.num_bytes for file in everything),
        fingerprint=_fingerprint(everything, root, split_seed),
        trusted=False,
        left_out=scan.left_out(),
        bad_images=tuple(f"{printable(path)} ({reason})" for path, reason in scan.bad.items()),
    )


def _part_roots(root: pathlib.Path, scan: FolderScan) -> tuple[pathlib.Path, pathlib.Path | None, pathlib.Path | None]:
    """Returns the folders of the training, test and validation part. The last two are None if they are missing."""
    folders = scan.class_folders(root)
    part_of = {name: part for part, names in _PARTS.items() for name in names}
    parts: dict[str, pathlib.Path] = {}
    others = []
    for folder in folders:
        part = part_of.get(folder.name.casefold())
        if part is None:
            others.append(folder)
        elif part in parts:
            raise UserError(
                f"A folder of images has one folder for each part. Received: {parts[part].name} and {folder.name} in "
                f"{printable(str(root))}. Merge the two, or move one of them away."
            )
        else:
            parts[part] = folder
    if others and not any(_has_folders(folder) for folder in parts.values()):
        return root, None, None  # classes that happen to be called train, test or valid
    if parts and "train" not in parts:
        names = " and ".join(folder.name for folder in parts.values())
        raise UserError(
            f"A folder of images with parts needs one that is called train. Received: {printable(str(root))} with "
            f"{names}, but without train."
        )
    if not parts:
        return root, None, None
    if list(parts) == ["train"] and any(FolderScan().images(folder) for folder in others):
        raise UserError(
            "A folder of images holds either the folders of its parts or those of its classes. Received: "
            f"{parts['train'].name} and {few([folder.name for folder in others])} in {printable(str(root))}. Use the "
            f"folder of the part, folder:{printable(str(parts['train']))}, or rename the class."
        )
    for folder in others:
        scan.leave_out(OUTSIDE_FOLDERS, str(folder))
    if "test" not in parts:
        return parts["train"], parts.get("validation"), None
    return parts["train"], parts["test"], parts.get("validation")


def _has_folders(folder: pathlib.Path) -> bool:
    return bool(FolderScan().class_folders(folder))


def _files(folder: pathlib.Path, scan: FolderScan) -> list[ImageFile]:
    """Returns the images of all classes, sorted by class and name."""
    classes = scan.class_folders(folder)
    if not classes:
        raise UserError(
            "A folder of images needs one folder for each class. Received: "
            f"{printable(str(folder))}, which holds no folder."
        )
    check_class_names((path.name for path in classes), where=str(folder))
    return [file for path in classes for file in scan.images(path)]


def _split(files: list[ImageFile], folder: pathlib.Path, seed: int) -> tuple[list[ImageFile], list[ImageFile]]:
    """Splits the images into training and test images, which keep their order."""

    def rank(file: ImageFile) -> bytes:
        return hashlib.sha256(os.fsencode(f"{seed}/{pathlib.Path(file.path).relative_to(folder)}")).digest()

    of_class = collections.defaultdict(list)
    for file in files:
        of_class[file.class_name].append(file)
    test = set()
    for members in of_class.values():
        test.update(sorted(members, key=rank)[: max(1, round(_TEST_FRACTION * len(members)))])
    return [file for file in files if file not in test], [file for file in files if file in test]


def _fingerprint(files: Sequence[ImageFile], root: pathlib.Path, split_seed: int) -> str:
    digest = hashlib.sha256(str(split_seed).encode())
    for file in files:
        digest.update(os.fsencode(f"{os.path.relpath(file.path, root)}\t{file.num_bytes}\t{file.changed}\n"))
    return digest.hexdigest()
