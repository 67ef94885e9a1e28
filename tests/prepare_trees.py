"""Makes tiles of aerial pictures with the boxes of the trees on them, from the Python package deepforest.

    pip download --no-deps deepforest==2.1.0
    python tests/prepare_trees.py trees --wheel=deepforest-2.1.0-py3-none-any.whl

The package (MIT license) holds four annotated pictures with 951 boxes in all. Two of the pictures become the training
tiles and the two others the test tiles. A tile has 256x256 pixels. A box that lies on the edge of a tile is cut off,
and left out if less than 40 % of its area is on the tile. The folder can be read with --task_type=detection.
"""

import argparse
import io
import json
import pathlib
import xml.etree.ElementTree as ElementTree
import zipfile

from PIL import Image

FOLDER = "deepforest/data/"
PICTURES = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "OSBS_029"),
    "test": ("2019_YELL_2_541000_4977000_image_crop", "SOAP_061"),
}
STEPS = {"train": 128, "test": 256}  # pixels from one tile to the next; training tiles overlap
SIZE = 256
LEAST_INSIDE = 0.4
EDGES = ("xmin", "ymin", "xmax", "ymax")


def boxes_of(content: bytes) -> list[tuple[float, ...]]:
    """Returns the boxes (left, top, right, bottom) in an annotation of Pascal VOC."""
    found = ElementTree.fromstring(content).findall("object/bndbox")
    return [tuple(float(box.findtext(edge, "nan")) for edge in EDGES) for box in found]


def inside(box: tuple[float, ...], x: int, y: int) -> list[float] | None:
    """Returns the part of a box on a tile as [x, y, width, height], or None if too little of it is there."""
    left, top, right, bottom = box
    width = min(right, x + SIZE) - max(left, x)
    height = min(bottom, y + SIZE) - max(top, y)
    if min(width, height) <= 0 or width * height < LEAST_INSIDE * (right - left) * (bottom - top):
        return None
    return [max(left, x) - x, max(top, y) - y, width, height]


def starts(length: int, step: int) -> list[int]:
    """Returns the first pixels of the tiles along one side."""
    return sorted({*range(0, length - SIZE + 1, step), length - SIZE})


def main() -> None:
    """Reads the arguments and makes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder to make")
    parser.add_argument("--wheel", type=pathlib.Path, required=True, help="wheel of deepforest 2.1.0")
    arguments = parser.parse_args()
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise SystemExit(f"error: The folder must be new or empty. Received: {arguments.folder}.")
    with zipfile.ZipFile(arguments.wheel) as archive:
        for part, names in PICTURES.items():
            folder = arguments.folder / part
            (folder / "images").mkdir(parents=True)
            records: list[dict[str, object]] = []
            annotations: list[dict[str, object]] = []
            for name in names:
                boxes = boxes_of(archive.read(f"{FOLDER}{name}.xml"))
                with Image.open(io.BytesIO(archive.read(f"{FOLDER}{name}.png"))) as image:
                    picture = image.convert("RGB")
                for y in starts(picture.height, STEPS[part]):
                    for x in starts(picture.width, STEPS[part]):
                        file = f"{name}_{y}_{x}.png"
                        picture.crop((x, y, x + SIZE, y + SIZE)).save(folder / "images" / file)
                        number = len(records)
                        records.append({"id": number, "file_name": file, "width": SIZE, "height": SIZE})
                        for box in filter(None, (inside(each, x, y) for each in boxes)):
                            entry = {"id": len(annotations), "image_id": number, "category_id": 1, "bbox": box}
                            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
            content = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
            (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
            print(f"{part}: {len(records)} tiles, {len(annotations)} boxes")


if __name__ == "__main__":
    main()
