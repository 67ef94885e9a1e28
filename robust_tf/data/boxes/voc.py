"""Reads annotations in the XML format of Pascal VOC."""

import pathlib
import xml.etree.ElementTree as ElementTree

import numpy as np

from robust_tf.data.boxes.files import image_file, images_by_stem, stem_of
from robust_tf.data.boxes.records import AnnotatedImage
from robust_tf.data.folder_scan import FolderScan, ImageFile
from robust_tf.data.records import few, printable
from robust_tf.errors import UserError

_REPAIR = "Correct the file, or remove it and its image."


def read_voc_folder(folder: pathlib.Path) -> list[AnnotatedImage]:
    """Reads a folder of images and XML files of the same names.

    The two lie next to each other, or in the subfolders `images` and `annotations`.

    Args:
        folder: Folder of one part.

    Raises:
        UserError: If an image has no XML file or the other way round, or if a file is faulty.
    """
    images_folder = _subfolder(folder, ("images", "JPEGImages"))
    xml_folder = _subfolder(folder, ("annotations", "Annotations"))
    images = images_by_stem(images_folder, FolderScan())
    files: dict[str, pathlib.Path] = {}
    for path in sorted(xml_folder.rglob("*")):
        if path.suffix.casefold() == ".xml" and not path.name.startswith("."):
            stem = stem_of(str(path), xml_folder)
            if stem in files:
                raise UserError(
                    f"Every image must have one XML file. Received: {printable(str(files[stem]))} and "
                    f"{printable(str(path))}. Remove one of the two."
                )
            files[stem] = path
    without_xml = [image.path for stem, image in images.items() if stem not in files]
    if without_xml:
        raise UserError(
            f"Every image needs an XML file of the same name in {printable(str(xml_folder))}. Received: none for "
            f"{few(without_xml)}. Remove the images, or write an XML file without objects for an image that shows none."
        )
    without_image = [str(path) for stem, path in files.items() if stem not in images]
    if without_image:
        raise UserError(
            f"Every XML file needs an image of the same name in {printable(str(images_folder))}. Received: none for "
            f"{few(without_image)}. Add the images, or remove the files."
        )
    return [read_voc_file(files[stem], image) for stem, image in images.items()]


def read_voc_list(root: pathlib.Path, part: str) -> list[AnnotatedImage] | None:
    """Reads the images that a list of VOC's own folder layout names.

    Args:
        root: Folder with Annotations, JPEGImages and ImageSets.
        part: Name of the list in ImageSets/Main: "train", "val", "trainval" or "test".

    Returns:
        The images in the order of their names. None if there is no such list, or if none of its images has an XML
        file, as for the test part of VOC2012.

    Raises:
        UserError: If an image or an XML file is missing, a name occurs twice, or a file is faulty.
    """
    path = root / "ImageSets" / "Main" / f"{part}.txt"
    names = listed_names(path)
    if names is None:
        return None
    xml_files = {name: root / "Annotations" / f"{name}.xml" for name in names}
    missing = [str(file) for file in xml_files.values() if not file.is_file()]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(
            f"Every image of a list needs an XML file. Received: {printable(str(path))}, and no {few(missing)}. Add "
            "the files, or take the names off the list."
        )
    return [read_voc_file(xml_files[name], voc_image(root, name, path)) for name in sorted(names)]


def listed_names(path: pathlib.Path) -> list[str] | None:
    """Returns the names in a list of VOC, the first word of each line. None if there is no such list, or an empty one.

    Raises:
        UserError: If a name occurs twice, or if the file cannot be read.
    """
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the list {printable(str(path))}: {error}. Repair the file.") from error
    names = [line.split()[0] for line in lines if line.strip()]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise UserError(
            f"Every image must be listed once. Received: {few(repeated)} twice in {printable(str(path))}. Remove the "
            "repeated lines."
        )
    return names or None


def voc_image(root: pathlib.Path, name: str, where: pathlib.Path) -> ImageFile:
    """Returns the image of a name in VOC's own folder layout.

    Args:
        root: Folder with JPEGImages.
        name: Name without suffix.
        where: List that has the name, for the message.

    Raises:
        UserError: If there is no such image.
    """
    for suffix in (".jpg", ".jpeg", ".png", ".JPG"):
        file = image_file(root / "JPEGImages" / f"{name}{suffix}")
        if file is not None:
            return file
    raise UserError(
        f"Every image of a list must exist. Received: {printable(str(where))}, and no "
        f"{printable(str(root / 'JPEGImages' / name))}.jpg. Add the image, or take the name off the list."
    )


def read_voc_file(path: pathlib.Path, image: ImageFile) -> AnnotatedImage:
    """Reads the boxes of one XML file.

    VOC numbers pixels from 1 and includes the last one, so a box over the whole of an image of width w has xmin = 1
    and xmax = w. Its edges here are left = xmin - 1 = 0 and right = xmax = w. Objects that are marked as difficult
    become crowd boxes, which count neither as hits nor as misses, as in VOC's own evaluation.

    Args:
        path: XML file.
        image: Image that it belongs to.

    Raises:
        UserError: If the file is not VOC's XML, has a document type declaration, or a box without four numbers.

    Source: Everingham et al., The PASCAL Visual Object Classes Challenge 2012 Development Kit, section 6.
    """
    where = printable(str(path))
    root = _parsed(path)
    if root.tag != "annotation":
        raise UserError(
            f"VOC's XML files hold one element called annotation. Received: {printable(root.tag)} in {where}. {_REPAIR}"
        )
    names, edges, crowd = [], [], []
    for number, element in enumerate(root.findall("object"), 1):
        what = f"object {number} of {where}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise UserError(f"Every object needs a name, which is its class. Received: none for {what}. {_REPAIR}")
        left, top, right, bottom = (
            _number(element, f"bndbox/{edge}", what) for edge in ("xmin", "ymin", "xmax", "ymax")
        )
        names.append(name)
        edges.append((top - 1.0, left - 1.0, bottom, right))
        crowd.append((element.findtext("difficult") or "").strip().casefold() in ("1", "true"))
    size = None
    if root.find("size") is not None:
        height, width = (_number(root, f"size/{side}", where) for side in ("height", "width"))
        size = (height, width) if height > 0 and width > 0 else None  # some programs write 0 for an unknown size
    return AnnotatedImage(
        file=image,
        where=f"image {printable(image.path)}",
        size=size,
        edges=np.array(edges, np.float64).reshape(-1, 4),
        classes=tuple(names),
        crowd=tuple(crowd),
        box_names=tuple(f"object {number} of {where}" for number in range(1, len(names) + 1)),
    )


def _parsed(path: pathlib.Path) -> ElementTree.Element:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {printable(str(path))}: {error.strerror}. Make it readable.") from error
    # A declaration may define entities that expand to gigabytes or read other files. VOC's files have none. The zeros
    # are those of UTF-16.
    if b"<!DOCTYPE" in content.replace(b"\0", b"").upper():
        raise UserError(
            "Annotations must be XML without a document type declaration. Received: <!DOCTYPE in "
            f"{printable(str(path))}. Remove the declaration."
        )
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: an unknown encoding
        raise UserError(
            f"Annotations must be an XML file. Received: {printable(str(path))} ({error}). {_REPAIR}"
        ) from error


def _number(element: ElementTree.Element, key: str, what: str) -> float:
    text = element.findtext(key)
    try:
        return float(text or "")
    except ValueError:
        raise UserError(f"{key} must be a number. Received: {text!r} for {what}. {_REPAIR}") from None


def _subfolder(folder: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path:
    return next((folder / name for name in names if (folder / name).is_dir()), folder)
