"""Reads a folder of images with boxes, in a layout of COCO or of Pascal VOC."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from robust_tf.data.boxes.coco import read_coco
from robust_tf.data.boxes.files import (
    MOST_OPENED_FILES,
    check_folder,
    check_split_seed,
    chosen_for_testing,
    fingerprint_of,
    image_size,
    is_turned,
    part_folders,
    turned_note,
)
from robust_tf.data.boxes.records import AnnotatedImage, BoxFolderPart, LabeledBoxes, encode_label
from robust_tf.data.boxes.voc import read_voc_folder, read_voc_list
from robust_tf.data.records import check_class_names, few, printable
from robust_tf.errors import UserError

_LAYOUTS = (
    "annotations/instances_train*.json and instances_val*.json with the images in train*/ and val*/ (COCO), "
    "{train,test}/annotations.json, annotations.json, Annotations with JPEGImages and ImageSets (VOC), or images with "
    "an XML file for each"
)
# COCO rounds coordinates to hundredths of a pixel, so a box may end this far outside of the image.
_ROUNDING = 0.01


@dataclasses.dataclass
class _Found:
    """What a folder holds: the images of each part, and the categories by id or, from XML files, by name.

    Attributes:
        parts: Images of "train", "test" and "validation". Without "test", a fifth of "train" becomes the test part.
        categories: Names of the classes by the id or name that boxes refer to, in the order of the classes.
        leave_out_empty: Whether boxes without area are left out instead of being refused.
    """

    parts: dict[str, list[AnnotatedImage]]
    categories: dict[int, str] | dict[str, str]
    leave_out_empty: bool = False


def open_box_folder(root: pathlib.Path, *, split_seed: int = 0) -> LabeledBoxes:
    """Opens a folder of images with boxes.

    The folder has one of these layouts.

    * root/annotations/instances_train*.json and instances_val*.json, with the images in root/train*/ and root/val*/,
      as for COCO. The validation part is the test part.
    * root/{train,test}/annotations.json, and optionally root/val/annotations.json for a validation part. The images lie
      next to the JSON file or in a folder called images.
    * root/annotations.json for all images. A fifth of them becomes the test part. The part of an image depends on its
      name and on `split_seed`, so it rarely changes when images are added.
    * root/Annotations/*.xml, root/JPEGImages and root/ImageSets/Main/{train,val,trainval,test}.txt, as for Pascal VOC.
      If the test images have no boxes, as in VOC2012, the validation part is the test part.
    * root/{train,test}/ or root alone with an XML file for each image, next to it, or with the images in `images` and
      the XML files in `annotations`.

    Classes are numbered in the order of COCO's category ids, or in the order of their names for XML files. COCO's crowd
    regions and the objects that VOC marks as difficult become crowd boxes, which count neither as hits nor as misses.
    Boxes that reach beyond their image are cut off at its edge, which a note says. COCO's own training part has two
    boxes without area; in its layout such boxes are left out, which a note says too.

    Args:
        root: Path of the folder.
        split_seed: Seed for the choice of the test part, if the folder has none.

    Raises:
        UserError: If the folder has no such layout, a file is missing or faulty, the parts have different categories,
            there is no class or no box for training, a box is not within its image, or `split_seed` is given for a
            folder that has a test part.
    """
    check_folder(root)
    found = _found(root)
    train, test, validation = (found.parts.get(part) for part in ("train", "test", "validation"))
    if not train or (test is not None and not test):
        raise UserError(
            f"A data set needs images for training and testing. Received: none in {printable(str(root))}. Add some."
        )
    if test is None:
        chosen = chosen_for_testing([_within(image, root) for image in train], split_seed)
        test = [image for image in train if _within(image, root) in chosen]
        train = [image for image in train if _within(image, root) not in chosen]
    else:
        check_split_seed(split_seed, f"in {root}")
    validation = validation or []
    class_names = tuple(found.categories.values())
    if not class_names:
        raise UserError(
            f"A detection data set needs one class or more. Received: none in {printable(str(root))}. List the "
            "categories, or add objects."
        )
    check_class_names(class_names, where=str(root))
    keys: list[int | str] = list(found.categories)
    numbers = {key: number for number, key in enumerate(keys)}
    everything = [*train, *validation, *test]
    cleaner = _Cleaner(numbers, found.leave_out_empty, open_files=len(everything) <= MOST_OPENED_FILES)
    labels = [cleaner.label(image) for image in everything]
    num_train = len(train) + len(validation)
    if not any(labels[:num_train]):
        raise UserError(f"A detection data set needs boxes for training. Received: none in {printable(str(root))}.")
    files = [image.file for image in everything]

    def part(first: int, last: int) -> BoxFolderPart:
        return BoxFolderPart(tuple(file.path for file in files[first:last]), tuple(labels[first:last]))

    settings = (split_seed, class_names, len(train), len(validation))
    return LabeledBoxes(
        class_names=class_names,
        train=part(0, num_train),
        test=part(num_train, len(files)),
        validation=np.repeat([False, True], [len(train), len(validation)]) if validation else None,
        num_bytes=sum(file.num_bytes for file in files),
        fingerprint=fingerprint_of(zip(files, labels, strict=True), root, settings),
        trusted=False,
        notes=cleaner.notes(),
    )


def _within(image: AnnotatedImage, root: pathlib.Path) -> str:
    return str(pathlib.PurePath(image.file.path).relative_to(root))


def _found(root: pathlib.Path) -> _Found:
    """Returns the content of the folder in the layout that it has."""
    if (root / "Annotations").is_dir() and (root / "ImageSets" / "Main").is_dir():
        return _from_voc(_voc_lists(root))
    instances = sorted((root / "annotations").glob("instances*.json"))
    if instances:
        return _coco_layout(root, instances)
    folders = part_folders(root)
    if folders:
        json_files = {part: _json_file(folder) for part, folder in folders.items()}
        with_json = {part: path for part, path in json_files.items() if path is not None}
        if not with_json:
            return _from_voc({part: read_voc_folder(folder) for part, folder in folders.items()})
        if len(with_json) < len(folders):
            without = [str(folder) for part, folder in folders.items() if part not in with_json]
            raise UserError(
                f"Every part needs a file of annotations. Received: no JSON file in {few(without)}, but "
                f"{few(list(map(str, with_json.values())))}. Add the annotations, or move the folder away."
            )
        return _from_coco({part: (path, [folders[part], folders[part] / "images"]) for part, path in with_json.items()})
    json_file = _json_file(root)
    if json_file is not None:
        return _from_coco({"train": (json_file, [root, root / "images"])})
    if next(root.rglob("*.xml"), None) is not None:
        return _from_voc({"train": read_voc_folder(root)})
    raise UserError(
        f"A folder for detection has one of these layouts: {_LAYOUTS}. Received: {printable(str(root))}, which has "
        "none of them."
    )


def _json_file(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns annotations.json, or the only JSON file of a folder if it has another name. None if there is no file."""
    if (folder / "annotations.json").is_file():
        return folder / "annotations.json"
    files = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if len(files) > 1:
        raise UserError(
            f"A folder of images has one file of annotations. Received: {few(list(map(str, files)))}. Call the right "
            "one annotations.json."
        )
    return files[0] if files else None


def _coco_layout(root: pathlib.Path, files: Sequence[pathlib.Path]) -> _Found:
    """Reads COCO's own layout, or a single file of the same name such as instances_default.json."""
    tags: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
    for path in files:
        tag = path.stem.removeprefix("instances").lstrip("_")
        tags[next((part for part in ("train", "val", "test") if tag.casefold().startswith(part)), "")].append(path)
    for paths in tags.values():
        if len(paths) > 1:
            raise UserError(
                f"A data set has one file of annotations for each part. Received: {few(list(map(str, paths)))}. Move "
                "the others away."
            )

    def source(tag: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
        name = tags[tag][0].stem.removeprefix("instances").lstrip("_")
        images = root / "images"
        folders = [root / name, images / name, images, root] if name else [images, root]
        return tags[tag][0], folders

    if "train" not in tags:
        if len(files) > 1:
            raise UserError(
                "A data set with parts needs annotations for training, instances_train*.json. Received: "
                f"{few(list(map(str, files)))}. Rename one of them."
            )
        return _from_coco({"train": source(next(iter(tags)))}, leave_out_empty=True)
    sources = {"train": source("train")}
    if "test" in tags:
        sources["test"] = source("test")
        if "val" in tags:
            sources["validation"] = source("val")
    elif "val" in tags:
        sources["test"] = source("val")
    return _from_coco(sources, leave_out_empty=True)


def _from_coco(sources: dict[str, tuple[pathlib.Path, list[pathlib.Path]]], *, leave_out_empty: bool = False) -> _Found:
    """Reads a JSON file for each part, whose images lie in one of the folders."""
    parts, first = {}, None
    for part, (path, folders) in sources.items():
        categories, parts[part] = read_coco(path, folders)
        if first is None:
            first = categories, path
        elif categories != first[0]:
            differing = sorted(set(categories.items()) ^ set(first[0].items()))
            shown = few([f"{name!r} with id {key}" for key, name in differing])
            raise UserError(
                f"All parts must list the same categories. Received: {shown} in only one of "
                f"{printable(str(first[1]))} and {printable(str(path))}. Make the two lists equal."
            )
    return _Found(parts, first[0] if first else {}, leave_out_empty)


def _voc_lists(root: pathlib.Path) -> dict[str, list[AnnotatedImage]]:
    """Reads the lists of VOC's own layout: training, test and, if there is a test part, validation images."""
    train, val, test = (read_voc_list(root, part) for part in ("train", "val", "test"))
    if train is None:
        train, val = read_voc_list(root, "trainval"), None
    if train is None:
        raise UserError(
            "VOC's layout needs the list ImageSets/Main/train.txt or trainval.txt, with an XML file for its images. "
            f"Received: neither in {printable(str(root))}. Add the list."
        )
    named = {"train": train, "test": val if test is None else test, "validation": None if test is None else val}
    return {part: images for part, images in named.items() if images is not None}


def _from_voc(parts: dict[str, list[AnnotatedImage]]) -> _Found:
    images: Iterable[AnnotatedImage] = (image for part in parts.values() for image in part)
    names = sorted({str(name) for image in images for name in image.classes})
    return _Found(parts, {name: name for name in names})


class _Cleaner:
    """Turns annotations into labels, and counts what it changed."""

    def __init__(self, numbers: dict[int | str, int], leave_out_empty: bool, open_files: bool) -> None:
        """Sets the number of each class, and whether to compare the size of every image with its annotations."""
        self._numbers = numbers
        self._leave_out_empty = leave_out_empty
        self._open_files = open_files
        self._clipped = self._turned = 0
        self._empty: list[str] = []

    def label(self, image: AnnotatedImage) -> bytes:
        """Returns the label of an image, with its boxes within the image.

        Raises:
            UserError: If a box has no area within the image, is not finite, or the size of the image is wrong.
        """
        height, width = self._size(image)
        if not len(image.edges):
            return b""
        top, left, bottom, right = image.edges.T
        finite = np.isfinite(image.edges).all(axis=1)
        empty = finite & ((bottom - top == 0) | (right - left == 0)) if self._leave_out_empty else np.zeros_like(finite)
        clipped = np.clip(image.edges, 0.0, [height, width, height, width]).astype(np.float32)
        wrong = ~finite | (bottom <= top) | (right <= left)
        outside = ~wrong & ((clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1]))
        if (bad := np.flatnonzero((wrong | outside) & ~empty)).size:
            self._refuse(image, int(bad[0]), (height, width), outside=bool(outside[bad[0]]))
        self._clipped += int((np.abs(clipped - image.edges).max(axis=1) > _ROUNDING)[~empty].sum())
        self._empty += [f"{image.box_names[box]} ({image.where})" for box in np.flatnonzero(empty)]
        classes = [self._numbers[name] for name in image.classes]
        return encode_label(np.column_stack([clipped, classes, image.crowd])[~empty])

    def notes(self) -> tuple[str, ...]:
        """Returns sentences about what was changed."""
        notes = list(turned_note(self._turned))
        if self._clipped:
            notes.append(f"Boxes that reach beyond their image and are cut off at its edge: {self._clipped:,}.")
        if self._empty:
            notes.append(f"Boxes without area, which are left out ({len(self._empty)}): {few(self._empty)}.")
        return tuple(notes)

    def _size(self, image: AnnotatedImage) -> tuple[float, float]:
        if image.size is not None and not self._open_files:
            return image.size
        stored = image_size(image.file.path)
        if image.size is None:
            return stored[:2]
        turned = is_turned(stored, *image.size)
        if turned is None:
            raise UserError(
                "The annotations of an image must state its true size. Received: "
                f"{image.size[1]:g}x{image.size[0]:g} pixels (width x height) for {image.where}, whose file has "
                f"{stored[1]}x{stored[0]}. Correct the size and the boxes, or replace the image."
            )
        self._turned += turned
        return image.size

    def _refuse(self, image: AnnotatedImage, box: int, size: tuple[float, float], *, outside: bool) -> None:
        numbers = ", ".join(f"{number:g}" for number in image.edges[box])
        rule = "A box must lie at least partly within its image" if outside else "A box must have a width and a height"
        more = f" The image has {size[1]:g}x{size[0]:g} pixels (width x height)." if outside else ""
        raise UserError(
            f"{rule}. Received: top, left, bottom and right {numbers} of {image.box_names[box]}, {image.where}.{more} "
            "Correct or remove the box."
        )
