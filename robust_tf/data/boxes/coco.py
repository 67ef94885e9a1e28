"""Reads a JSON file in COCO's "instances" format."""

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_tf.data.boxes.files import image_file
from robust_tf.data.boxes.records import AnnotatedImage
from robust_tf.data.folder_scan import ImageFile
from robust_tf.data.records import few, printable
from robust_tf.errors import UserError

_KEYS = ("images", "annotations", "categories")


def read_coco(path: pathlib.Path, folders: Sequence[pathlib.Path]) -> tuple[dict[int, str], list[AnnotatedImage]]:
    """Reads the images and boxes of one JSON file.

    Images without annotations are kept, without boxes. A box is [left, top, width, height] in pixels.

    Args:
        path: JSON file.
        folders: Folders in which the images may lie, in the order in which they are searched.

    Returns:
        The names of the categories by id, in ascending order, and the images in the order of their file names.

    Raises:
        UserError: If the file is no such JSON file, an id occurs twice or is unknown, an image file is missing, or a
            box is not four numbers.

    Source: https://cocodataset.org/#format-data
    """
    content = _content(path)
    where = printable(str(path))
    categories: dict[int, str] = {}
    for category in content["categories"]:
        key, name = _value(category, "id", int, "category", where), _value(category, "name", str, "category", where)
        if key in categories or name in categories.values():
            raise UserError(
                f"Every category must have its own id and name. Received: {name!r} with id {key} twice in {where}. "
                "Rename or remove one of the two."
            )
        categories[key] = name
    files: dict[int | str, ImageFile] = {}
    sizes: dict[int | str, tuple[float, float] | None] = {}
    image_of_file: dict[str, int | str] = {}
    for image in content["images"]:
        key = _value(image, "id", (int, str), "image", where)
        name = _value(image, "file_name", str, "image", where)
        if key in files or name in image_of_file:
            what = f"image id {key}" if key in files else f"file {printable(name)}"
            raise UserError(
                f"Every image must be listed once. Received: {what} twice in {where}. Remove or merge the entries."
            )
        files[key], image_of_file[name] = _found(name, folders, where), key
        height, width = image.get("height"), image.get("width")
        sizes[key] = (height, width) if _is_number(height) and _is_number(width) and height and width else None
    annotations: dict[int | str, list[dict[str, Any]]] = collections.defaultdict(list)
    for annotation in content["annotations"]:
        key = _value(annotation, "image_id", (int, str), "annotation", where)
        if key not in files:
            raise UserError(
                f"Every annotation must belong to an image of its file. Received: image_id {key} of "
                f"{_annotation(annotation)} in {where}. Remove the annotation, or list the image."
            )
        category = _value(annotation, "category_id", int, "annotation", where)
        if category not in categories:
            raise UserError(
                f"Every annotation must belong to a category of its file. Received: category_id {category} of "
                f"{_annotation(annotation)} in {where}, which lists {few(list(map(str, sorted(categories))))}. "
                "Correct the annotation, or list the category."
            )
        annotations[key].append(annotation)
    images = [
        _annotated(files[key], sizes[key], annotations[key], f"image {printable(name)} of {where}", where)
        for name, key in sorted(image_of_file.items())
    ]
    return dict(sorted(categories.items())), images


def _annotated(
    file: ImageFile, size: tuple[float, float] | None, annotations: list[dict[str, Any]], where: str, path: str
) -> AnnotatedImage:
    boxes = []
    for annotation in annotations:
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise UserError(
                f"bbox must be four numbers: left, top, width and height. Received: {box!r} of "
                f"{_annotation(annotation)} in {path}. Correct or remove the annotation."
            )
        boxes.append(box)
    left, top, width, height = np.array(boxes, np.float64).reshape(-1, 4).T
    return AnnotatedImage(
        file=file,
        where=where,
        size=size,
        edges=np.stack([top, left, top + height, left + width], axis=1),
        classes=tuple(annotation["category_id"] for annotation in annotations),
        crowd=tuple(bool(annotation.get("iscrowd")) for annotation in annotations),
        box_names=tuple(map(_annotation, annotations)),
    )


def _content(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read {printable(str(path))}: {error.strerror}. Make it readable.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Annotations must be a JSON file in COCO's format. Received: {printable(str(path))}, which is no JSON "
            f"({error}). Export the annotations again."
        ) from error
    keys = [printable(key) for key in content] if isinstance(content, dict) else [type(content).__name__]
    missing = [key for key in _KEYS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise UserError(
            f"A JSON file in COCO's format holds the lists images, annotations and categories. Received: "
            f"{printable(str(path))} without {' and '.join(missing)}, with {few(keys)}. Export the annotations in "
            "COCO's instances format."
        )
    for key in _KEYS:
        for entry in content[key]:
            if not isinstance(entry, dict):
                raise UserError(
                    f"The entries of {key} must be JSON objects, as in COCO's format. Received: {entry!r} in "
                    f"{printable(str(path))}. Export the annotations in COCO's instances format."
                )
    return content  # type: ignore[no-any-return]


def _found(name: str, folders: Sequence[pathlib.Path], where: str) -> ImageFile:
    parts = pathlib.PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in name:
        raise UserError(
            f"file_name must be a path within the folder of the images. Received: {printable(name)!r} in {where}. "
            "Write the path from the folder of the images on."
        )
    for folder in folders:
        if (folder / name).is_file() and (file := image_file(folder / name)) is not None:
            return file
    raise UserError(
        f"Every image of the annotations must exist. Received: {printable(name)}, which is not in "
        f"{' or '.join(printable(str(folder)) for folder in folders)}, from {where}. Copy the image there, or remove "
        "it from the annotations."
    )


def _value(entry: dict[str, Any], key: str, kind: type | tuple[type, ...], what: str, where: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = {int: "an integer", str: "a text"}.get(kind, "an integer or a text")  # type: ignore[arg-type]
        raise UserError(
            f"Every {what} needs {key}, {kinds}. Received: {value!r} in {where}. Export the annotations in COCO's "
            "instances format."
        )
    return value


def _annotation(annotation: dict[str, Any]) -> str:
    return f"annotation {printable(str(annotation.get('id', 'without id')))}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
