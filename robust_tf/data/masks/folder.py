"""Reads a folder of images with masks."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import tensorflow as tf

from robust_tf.data.boxes.files import (
    MOST_OPENED_FILES,
    check_folder,
    check_split_seed,
    chosen_for_testing,
    fingerprint_of,
    image_file,
    image_size,
    images_by_stem,
    is_turned,
    part_folders,
    turned_note,
)
from robust_tf.data.boxes.voc import listed_names, voc_image
from robust_tf.data.folder_records import FilePart, path_table
from robust_tf.data.folder_scan import FolderScan, ImageFile
from robust_tf.data.masks.mask_files import (
    IGNORED_IN_FILE,
    MOST_CLASSES,
    check_size,
    check_values,
    read_mask,
    to_bytes,
)
from robust_tf.data.masks.records import LabeledMasks
from robust_tf.data.records import check_class_names, few, printable
from robust_tf.errors import UserError

# The classes of Pascal VOC by their number in the palette of its masks.
VOC_CLASSES = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)


@dataclasses.dataclass(frozen=True)
class MaskFolderPart(FilePart):
    """Image files and their masks.

    Attributes:
        mask_paths: Paths of the masks.
        num_classes: Number of classes.
        is_checked: Whether all masks were checked when the data set was opened. If not, each is checked when it is
            read.
    """

    mask_paths: tuple[str, ...]
    num_classes: int
    is_checked: bool

    def label(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the encoded mask of an example."""
        label = tf.io.read_file(tf.gather(self._mask_path_table, index))
        if not self.is_checked:
            label = tf.ensure_shape(tf.numpy_function(self._checked, [index, label], tf.string, stateful=False), ())
        return label

    def _checked(self, index: np.int64, content: bytes | np.ndarray) -> bytes:
        path, encoded = self.mask_paths[int(index)], to_bytes(content)
        _check_pair(self.paths[int(index)], path, read_mask(encoded, printable(path)), self.num_classes)
        return encoded

    @functools.cached_property
    def _mask_path_table(self) -> tf.Tensor:
        return path_table(self.mask_paths)

    def masks(self) -> Iterator[np.ndarray]:
        """Yields each mask, (height, width) int32 with 255 for ignored pixels, in the order of the examples."""
        for path in self.mask_paths:
            yield _mask_of(path)


def open_mask_folder(root: pathlib.Path, *, split_seed: int = 0) -> LabeledMasks:
    """Opens a folder of images with masks.

    The folder has one of these layouts. Image and mask have the same name except for the suffix, which is .png for
    masks.

    * root/{train,test}/{images,masks}, and optionally root/val/{images,masks} for a validation part.
    * root/{images,masks}. A fifth of the images becomes the test part. The part of an image depends on its name and on
      `split_seed`, so it rarely changes when images are added.
    * root/JPEGImages, root/SegmentationClass and root/ImageSets/Segmentation/{train,val,trainval,test}.txt, as for
      Pascal VOC. If the test images have no masks, as in VOC2012, the validation part is the test part.

    root/classes.txt lists the names of the classes, one on each line. Without it, the classes are those of VOC in VOC's
    layout, and otherwise "class 0" to the highest value in the masks for training, of which only some are read if there
    are more than 4,000. Up to this number of images, all masks are checked here, and otherwise when they are read.

    Args:
        root: Path of the folder.
        split_seed: Seed for the choice of the test part, if the folder has none.

    Raises:
        UserError: If the folder has no such layout, an image or a mask is missing or faulty, a mask has another size
            than its image or a value without a class, there are fewer than two classes, or `split_seed` is given for a
            folder that has a test part.
    """
    check_folder(root)
    parts, known_classes = _found(root)
    train, test, validation = (parts.get(part) for part in ("train", "test", "validation"))
    if not train or (test is not None and not test):
        raise UserError(
            f"A data set needs images for training and testing. Received: none in {printable(str(root))}. Add some."
        )
    if test is None:
        chosen = chosen_for_testing([_within(pair, root) for pair in train], split_seed)
        test = [pair for pair in train if _within(pair, root) in chosen]
        train = [pair for pair in train if _within(pair, root) not in chosen]
    else:
        check_split_seed(split_seed, f"in {root}")
    validation = validation or []
    everything = [*train, *validation, *test]
    class_names = _listed_classes(root) or known_classes or _counted_classes([*train, *validation], root)
    if not 2 <= len(class_names) <= MOST_CLASSES:
        raise UserError(
            f"A data set for segmentation needs 2 to {MOST_CLASSES} classes. Received: {len(class_names)} in "
            f"{printable(str(root))}. The value 255 stands for ignored pixels; if it is the only class in your masks, "
            "write 1 instead."
        )
    check_class_names(class_names, where=str(root))
    is_checked = len(everything) <= MOST_OPENED_FILES
    turned = _check_pairs(everything, len(class_names)) if is_checked else 0
    num_train = len(train) + len(validation)

    def part(pairs: Sequence[_Pair]) -> MaskFolderPart:
        return MaskFolderPart(
            tuple(pair.image.path for pair in pairs),
            tuple(pair.mask.path for pair in pairs),
            len(class_names),
            is_checked,
        )

    def mask_state(mask: ImageFile) -> bytes:
        return f"{os.path.relpath(mask.path, root)}\t{mask.num_bytes}\t{mask.changed}".encode(
            "utf-8", "surrogateescape"
        )

    settings = (split_seed, class_names, len(train), len(validation))
    return LabeledMasks(
        class_names=class_names,
        train=part(everything[:num_train]),
        test=part(everything[num_train:]),
        validation=np.repeat([False, True], [len(train), len(validation)]) if validation else None,
        num_bytes=sum(pair.image.num_bytes + pair.mask.num_bytes for pair in everything),
        fingerprint=fingerprint_of(((pair.image, mask_state(pair.mask)) for pair in everything), root, settings),
        trusted=False,
        notes=turned_note(turned),
    )


@dataclasses.dataclass(frozen=True)
class _Pair:
    """An image and its mask."""

    image: ImageFile
    mask: ImageFile


def _within(pair: _Pair, root: pathlib.Path) -> str:
    return str(pathlib.PurePath(pair.image.path).relative_to(root))


def _found(root: pathlib.Path) -> tuple[dict[str, list[_Pair]], tuple[str, ...]]:
    """Returns the pairs of each part, and the names of the classes if the layout is VOC's."""
    if (root / "SegmentationClass").is_dir() and (root / "ImageSets" / "Segmentation").is_dir():
        return _voc_lists(root), VOC_CLASSES
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return {"train": _pairs(root)}, ()
    folders = part_folders(root)
    if not folders:
        raise UserError(
            "A folder for segmentation has one of these layouts: {images,masks}, {train,test}/{images,masks}, or "
            f"JPEGImages, SegmentationClass and ImageSets/Segmentation (VOC). Received: {printable(str(root))}, which "
            "has none of them."
        )
    return {part: _pairs(folder) for part, folder in folders.items()}, ()


def _pairs(folder: pathlib.Path) -> list[_Pair]:
    images_folder, masks_folder = folder / "images", folder / "masks"
    for path in (images_folder, masks_folder):
        if not path.is_dir():
            raise UserError(
                "Each part of a data set for segmentation needs the folders images and masks. Received: no "
                f"{printable(str(path))}. Add the folder."
            )
    images, masks = images_by_stem(images_folder, FolderScan()), images_by_stem(masks_folder, FolderScan())
    without_mask = [image.path for stem, image in images.items() if stem not in masks]
    if without_mask:
        raise UserError(
            f"Every image needs a mask of the same name in {printable(str(masks_folder))}. Received: none for "
            f"{few(without_mask)} ({len(without_mask)}). Add the masks, or remove the images."
        )
    without_image = [mask.path for stem, mask in masks.items() if stem not in images]
    if without_image:
        raise UserError(
            f"Every mask needs an image of the same name in {printable(str(images_folder))}. Received: none for "
            f"{few(without_image)} ({len(without_image)}). Add the images, or remove the masks."
        )
    return [_Pair(image, masks[stem]) for stem, image in images.items()]


def _voc_lists(root: pathlib.Path) -> dict[str, list[_Pair]]:
    train, val, test = (_voc_list(root, part) for part in ("train", "val", "test"))
    if train is None:
        train, val = _voc_list(root, "trainval"), None
    if train is None:
        raise UserError(
            "VOC's layout needs the list ImageSets/Segmentation/train.txt or trainval.txt, with masks for its images. "
            f"Received: neither in {printable(str(root))}. Add the list."
        )
    named = {"train": train, "test": val if test is None else test, "validation": None if test is None else val}
    return {part: pairs for part, pairs in named.items() if pairs is not None}


def _voc_list(root: pathlib.Path, part: str) -> list[_Pair] | None:
    """Returns the pairs that a list names. None if there is no such list, or if none of its images has a mask."""
    path = root / "ImageSets" / "Segmentation" / f"{part}.txt"
    names = listed_names(path)
    if names is None:
        return None
    masks = {name: image_file(root / "SegmentationClass" / f"{name}.png") for name in sorted(names)}
    missing = [name for name, mask in masks.items() if mask is None]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(
            f"Every image of a list needs a mask in SegmentationClass. Received: {printable(str(path))}, and no mask "
            f"for {few(missing)} ({len(missing)}). Add the masks, or take the names off the list."
        )
    return [_Pair(voc_image(root, name, path), mask) for name, mask in masks.items() if mask is not None]


def _listed_classes(root: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the classes in classes.txt, or nothing if there is no such file."""
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {printable(str(path))}: {error}. Save it as UTF-8 text.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    names = tuple(line.strip() for line in lines)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(
            f"The names of classes must differ. Received: {few(repeated)} twice in {printable(str(path))}. Rename one."
        )
    if not names:
        raise UserError(
            f"classes.txt lists the names of the classes, one on each line. Received: {printable(str(path))}, which is "
            "empty. List the classes, or remove the file."
        )
    return names


def _counted_classes(pairs: Sequence[_Pair], root: pathlib.Path) -> tuple[str, ...]:
    """Returns "class 0" to the highest value in the masks. Of many masks, reads some that are evenly spaced."""
    step = -(-len(pairs) // MOST_OPENED_FILES)
    highest = max(_in_parallel(lambda pair: _highest(_mask_of(pair.mask.path)), pairs[::step]), default=0)
    if highest >= MOST_CLASSES:
        raise UserError(
            f"The pixels of a mask must be 0 to {MOST_CLASSES - 1}, the numbers of the classes, or 255 for ignored "
            f"pixels. Received: {highest} in the masks of {printable(str(root))}. Correct the masks."
        )
    return tuple(f"class {number}" for number in range(highest + 1))


def _highest(mask: np.ndarray) -> int:
    return int(mask[mask != IGNORED_IN_FILE].max(initial=0))


def _mask_of(path: str) -> np.ndarray:
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the mask {printable(path)}: {error.strerror}. Make it readable.") from error
    return read_mask(content, printable(path))


def _check_pairs(pairs: Sequence[_Pair], num_classes: int) -> int:
    """Checks all masks, and returns the number of those that belong to the image as EXIF turns it."""
    checks = _in_parallel(
        lambda pair: _check_pair(pair.image.path, pair.mask.path, _mask_of(pair.mask.path), num_classes), pairs
    )
    return sum(checks)


def _check_pair(image: str, path: str, mask: np.ndarray, num_classes: int) -> bool:
    """Checks a mask, and returns whether it belongs to the image as its EXIF data turns it."""
    check_values(mask, num_classes, printable(path))
    stored = image_size(image)
    turned = is_turned(stored, *mask.shape)
    if turned is None:
        check_size(mask, *stored[:2], printable(path))
    return bool(turned)


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def _in_parallel(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Yields the results of a function in the order of the items. Pillow decodes outside of Python's lock."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(function, items)
