"""Small data sets with boxes and masks."""

import json

import numpy as np
from PIL import Image

from tests.data.images import encoded, jpeg, write

# Sparse ids that are not in order, as after classes were removed.
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]


def coco(boxes, *, categories=CATEGORIES, first_id=1, suffix="jpg"):
    """The content of a JSON file. `boxes` has (category id, bbox[, iscrowd]) for each image; images are 16x12."""
    images, annotations = [], []
    for number, of_image in enumerate(boxes, first_id):
        images.append({"id": number, "file_name": f"{number:03d}.{suffix}", "width": 16, "height": 12})
        for category, bbox, *crowd in of_image:
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": bbox}
            annotations.append(annotation | {"iscrowd": crowd[0] if crowd else 0})
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(json_path, images_folder, content):
    """Writes a JSON file, and a JPEG of 16x12 pixels for each of its images."""
    write(json_path, json.dumps(content))
    for image in content["images"]:
        write(images_folder / image["file_name"], jpeg(image["id"]))


TRAIN = coco([[(17, [2, 1, 5, 4]), (90, [0, 0, 16, 12], 1)], [], [(3, [8.5, 2.25, 4, 6])]])
TEST = coco([[(3, [1, 2, 3, 4])], [(17, [1, 1, 1, 1])]], first_id=11)


def write_boxes(root, **parts):
    """Writes a training and a test part. `parts` has the content of their JSON files, if not TRAIN and TEST."""
    for part, content in {"train": TRAIN, "test": TEST, **parts}.items():
        write_coco(root / part / "annotations.json", root / part, content)
    return root


def turned_photo():
    """A JPEG of 12x16 pixels (width x height), which its EXIF data turns to 16x12."""
    image = Image.fromarray(np.zeros((16, 12, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


def mask_pixels(number, values=(0, 1, 2, 255)):
    """Pixels of 12x16, a different mask for each number."""
    pixels = np.random.default_rng(number).choice(values, (12, 16)).astype(np.uint8)
    pixels[0, : len(values)] = values
    return pixels


def gray(pixels):
    """A PNG without a palette."""
    return encoded(Image.fromarray(pixels), "PNG")


def palette(pixels):
    """A PNG whose values are positions in a palette of other colors, as VOC's masks are."""
    image = Image.new("P", pixels.shape[::-1])
    image.putdata(pixels.ravel().tolist())
    image.putpalette([value for number in range(256) for value in (255 - number, number // 2, 7)])
    return encoded(image, "PNG")


def write_pairs(root, count, *, first=0, encode=gray, values=(0, 1, 2, 255)):
    """Writes images of 12x16 pixels (height x width) and their masks."""
    for number in range(first, first + count):
        write(root / "images" / f"{number:02d}.jpg", jpeg(number))
        write(root / "masks" / f"{number:02d}.png", encode(mask_pixels(number, values)))
    return root


def write_masks(root, *, values=(0, 1, 2, 255)):
    """Writes a training and a test part."""
    write_pairs(root / "train", 3, values=values)
    write_pairs(root / "test", 2, first=10, values=values)
    return root
