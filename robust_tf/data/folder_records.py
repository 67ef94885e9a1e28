"""Records of a folder of images, one folder in it for each class."""

import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from robust_tf.data.records import LabelledImages
from robust_tf.errors import UserError

# What `decode` reads.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
# Images all the same: to leave them out in silence would change the data set.
_OTHER_SUFFIXES = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg")
_VALIDATION_FOLDERS = ("val", "valid", "validation")
# Share of each class that becomes the test part where there is no test folder.
_TEST_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One image: its path, size in bytes, time of the last change in ns, and the name of its class."""

    path: str
    num_bytes: int
    changed: int
    class_name: str


@dataclasses.dataclass(frozen=True)
class FolderPart:
    """Image files and their labels, in order."""

    paths: tuple[str, ...]
    targets: tuple[int, ...]

    @property
    def num_examples(self) -> int:
        return len(self.paths)

    def records(self) -> tf.data.Dataset:
        return tf.data.Dataset.range(len(self.paths)).map(self.record, num_parallel_calls=tf.data.AUTOTUNE)

    def record(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """One record, read by its number: what lets a folder be read in any order."""
        return index, tf.io.read_file(tf.gather(self._path_table, index)), tf.gather(self._label_table, index)

    @functools.cached_property
    def _path_table(self) -> tf.Tensor:
        with tf.init_scope():  # made once, not in the graph of the function that happens to ask first
            return tf.constant(self.paths)

    @functools.cached_property
    def _label_table(self) -> tf.Tensor:
        with tf.init_scope():
            return tf.constant(self.labels())

    def labels(self) -> np.ndarray:
        return np.array(self.targets, np.int64)

    def name(self, index: int) -> str:
        return self.paths[index]


def open_folder(root: pathlib.Path, *, split_seed: int = 0) -> LabelledImages:
    """Reads the names of the images below `root`, in one of these layouts (hidden and other files don't count):

    * root/{train,test}/<class>/<image>, and root/val/<class>/<image> if there is a validation part;
    * root/{train,val}/<class>/<image>, as ImageNet comes: val is the test part;
    * root/<class>/<image> or root/train/<class>/<image>: a fifth of each class becomes the test part. An image's
      part is decided by its name and `split_seed`, so that it hardly changes when images are added.

    Raises:
        UserError: no such folder, fewer than two classes, a class without images, an image that is empty or unreadable
            or of a kind that TensorFlow does not read, two images of a class with one name, or a `split_seed` for a
            folder that is split already.
    """
    if not root.is_dir():
        raise UserError(f"--dataset=folder: needs the path of a folder of images. Received: {root}, which is none.")
    train_root = root / "train" if (root / "train").is_dir() else root
    validation_root = next((root / name for name in _VALIDATION_FOLDERS if (root / name).is_dir()), None)
    test_root = root / "test" if (root / "test").is_dir() else None
    other_part = test_root or validation_root
    if train_root == root and other_part:
        raise UserError(f"A folder with parts needs train. Received: {root} with {other_part.name}, but without train.")
    if test_root is None:
        test_root, validation_root = validation_root, None
    train = _files(train_root)
    validation = _files(validation_root) if validation_root else []
    if test_root is None:
        train, test = _split(train, train_root, split_seed)
    elif split_seed:
        raise UserError(f"--split_seed is for a folder without a test part. Received: {split_seed}, and {test_root}.")
    else:
        test = _files(test_root)

    everything = [*train, *validation, *test]
    class_names = tuple(sorted({file.class_name for file in everything}))
    if len(class_names) < 2:
        raise UserError(f"A data set needs two or more classes. Received: only {class_names[0]!r} in {train_root}.")
    number = {name: label for label, name in enumerate(class_names)}

    def part(files: Sequence[ImageFile]) -> FolderPart:
        return FolderPart(tuple(file.path for file in files), tuple(number[file.class_name] for file in files))

    return LabelledImages(
        class_names=class_names,
        train=part([*train, *validation]),
        test=part(test),
        validation=np.repeat([False, True], [len(train), len(validation)]) if validation else None,
        num_bytes=sum(file.num_bytes for file in everything),
        fingerprint=_fingerprint(everything, root, split_seed),
        trusted=False,
    )


def _files(folder: pathlib.Path) -> list[ImageFile]:
    """The images of all classes, sorted by class and name."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"A folder of images holds one folder for each class. Received: {folder}, which holds none.")
    return [file for name in classes for file in _files_of_class(folder / name)]


def _files_of_class(folder: pathlib.Path) -> list[ImageFile]:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = [entry.name for entry in entries if not entry.name.startswith(".")]
    other = [name for name in names if name.lower().endswith(_OTHER_SUFFIXES)]
    if other:
        raise UserError(
            f"TensorFlow reads {', '.join(_SUFFIXES)} images. Received: {folder / other[0]} and {len(other) - 1} more "
            "of another kind in this folder. Convert them, or take them out."
        )
    files = [_file(folder, name) for name in names if name.lower().endswith(_SUFFIXES)]
    if not files:
        raise UserError(f"Every class needs images directly in its folder. Received: none in {folder}.")
    stems = collections.defaultdict(list)
    for file in files:
        stems[pathlib.Path(file.path).stem.casefold()].append(file.path)
    for same in stems.values():
        if len(same) > 1:
            raise UserError(
                "Two images of a class must not have one name (the suffix and capital letters aside): such pairs are "
                f"mostly one image twice, and some file systems keep only one. Received: {same[0]} and {same[1]}."
            )
    return files


def _file(folder: pathlib.Path, name: str) -> ImageFile:
    path = folder / name
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"Cannot read the image {path}: {error.strerror}. Repair it, or take it out.") from error
    if not status.st_size:
        raise UserError(f"The image {path} is empty (0 bytes). Repair it, or take it out.")
    if not os.access(path, os.R_OK):
        raise UserError(f"Cannot read the image {path}: permission denied. Repair it, or take it out.")
    return ImageFile(str(path), status.st_size, status.st_mtime_ns, folder.name)


def _split(files: list[ImageFile], folder: pathlib.Path, seed: int) -> tuple[list[ImageFile], list[ImageFile]]:
    """Train and test, in the order of the files."""

    def rank(file: ImageFile) -> bytes:
        return hashlib.sha256(f"{seed}/{pathlib.Path(file.path).relative_to(folder)}".encode()).digest()

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
        digest.update(f"{os.path.relpath(file.path, root)}\t{file.num_bytes}\t{file.changed}\n".encode())
    return digest.hexdigest()
