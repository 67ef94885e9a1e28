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

from robust_tf.data.folder_scan import OUTSIDE_FOLDERS, FolderScan, ImageFile
from robust_tf.data.records import LabeledImages, check_class_names, few, printable
from robust_tf.errors import UserError

# Spellings of a part's folder, whatever the case of their letters.
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}
# Share of each class that becomes the test part where there is no test folder.
_TEST_FRACTION = 0.2


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
            # As bytes: a name need not be text.
            return tf.constant([os.fsencode(path) for path in self.paths], tf.string)

    @functools.cached_property
    def _label_table(self) -> tf.Tensor:
        with tf.init_scope():
            return tf.constant(self.labels())

    def labels(self) -> np.ndarray:
        return np.array(self.targets, np.int64)

    def name(self, index: int) -> str:
        return printable(self.paths[index])


def open_folder(root: pathlib.Path, *, split_seed: int = 0, skip_bad_images: bool = False) -> LabeledImages:
    """Finds the images below `root`, in one of these layouts. An image may lie in sub-folders of its class's folder.

    * root/{train,test}/<class>/<image>, and root/val/<class>/<image> if there is a validation part;
    * root/{train,val}/<class>/<image>, as ImageNet comes: val is the test part;
    * root/<class>/<image> or root/train/<class>/<image>: a fifth of each class becomes the test part. An image's
      part is decided by its name and `split_seed`, so that it hardly changes when images are added.

    The parts may be written with capitals, or training, testing, valid and validation. A file is an image by its suffix
    or, if that says nothing, by its first bytes. Every other file is counted in `left_out`.

    Args:
        root: the folder.
        split_seed: of the test part where there is none.
        skip_bad_images: leave out images that are empty or unreadable or of a kind that TensorFlow does not read.

    Raises:
        UserError: no such folder, fewer than two classes, a class without images or with a name of several lines, an
            image to skip without `skip_bad_images`, or a `split_seed` for a folder that is split already.
    """
    if not root.is_dir():
        raise UserError(
            f"--dataset=folder: needs the path of a folder of images. Received: {printable(str(root))}, which is none."
        )
    scan = FolderScan()
    train_root, test_root, validation_root = _part_roots(root, scan)
    train = _files(train_root, scan)
    validation = _files(validation_root, scan) if validation_root else []
    if test_root is None:
        train, test = _split(train, train_root, split_seed)
    elif split_seed:
        raise UserError(f"--split_seed is for a folder without a test part. Received: {split_seed}, and {test_root}.")
    else:
        test = _files(test_root, scan)
    if scan.bad and not skip_bad_images:
        first, reason = next(iter(scan.bad.items()))
        raise UserError(
            "Images must be JPEG, PNG, GIF, BMP or WebP files that can be read. Received: "
            f"{printable(first)} ({reason}) and {len(scan.bad) - 1} more. Convert or repair them, take them out, or "
            "leave such images out with --skip_bad_images."
        )
    if scan.without_images:
        bad = f", and {len(scan.bad)} images there or elsewhere that cannot be read" if scan.bad else ""
        raise UserError(
            f"Every class needs images in its folder or below. Received: none in {few(scan.without_images)}{bad}."
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
    """The folders that hold the classes of training, test and validation; the last two may be missing."""
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
                f"{printable(str(root))}. Put them together, or take one of them out."
            )
        else:
            parts[part] = folder
    if others and not any(_has_folders(folder) for folder in parts.values()):
        return root, None, None  # classes that happen to be called train, test or valid
    if parts and "train" not in parts:
        names = " and ".join(folder.name for folder in parts.values())
        raise UserError(
            f"A folder with parts needs train. Received: {printable(str(root))} with {names}, but without train."
        )
    if not parts:
        return root, None, None
    if list(parts) == ["train"] and any(FolderScan().images(folder) for folder in others):
        raise UserError(
            "A folder of images holds either its parts or its classes. Received: "
            f"{parts['train'].name} and {few([folder.name for folder in others])} in {printable(str(root))}. Name the part "
            f"itself, --dataset=folder:{printable(str(parts['train']))}, or rename the class."
        )
    for folder in others:
        scan.leave_out(OUTSIDE_FOLDERS, str(folder))
    if "test" not in parts:
        return parts["train"], parts.get("validation"), None
    return parts["train"], parts["test"], parts.get("validation")


def _has_folders(folder: pathlib.Path) -> bool:
    return bool(FolderScan().class_folders(folder))


def _files(folder: pathlib.Path, scan: FolderScan) -> list[ImageFile]:
    """The images of all classes, sorted by class and name."""
    classes = scan.class_folders(folder)
    if not classes:
        raise UserError(
            f"A folder of images holds one folder for each class. Received: {printable(str(folder))}, which holds none."
        )
    check_class_names((path.name for path in classes), where=str(folder))
    return [file for path in classes for file in scan.images(path)]


def _split(files: list[ImageFile], folder: pathlib.Path, seed: int) -> tuple[list[ImageFile], list[ImageFile]]:
    """Train and test, in the order of the files."""

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
