"""Makes scenes of garments on textures, with boxes and masks, from Fashion-MNIST and the Debian package ufoai-textures.

    apt-get install ufoai-textures
    python tests/prepare_scenes.py scenes [--num_train=2000] [--num_test=500] [--data_dir=TFDS_FOLDER]

A scene has 96x96 pixels, and one to four garments on a texture, each 24 to 44 pixels wide. The folder can be read with
--task_type=detection (train/ and test/ have an annotations.json in the format of COCO) and with
--task_type=segmentation (train/masks/ and test/masks/, where 0 is the background). Test scenes consist of the test
images of Fashion-MNIST, on textures that no training scene has.
"""

import argparse
import io
import json
import pathlib
import zipfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from robust_tf.console import meter

PACKAGE = pathlib.Path("/usr/share/games/ufoai/base/0textures.pk3")
# Folders of the package whose textures are photographs of surfaces.
FOLDERS = (
    "tex_nature",
    "tex_buildings",
    "tex_material",
    "tex_streets",
    "tex_terrain",
    "tex_dirt",
    "tex_buildings_snow",
)
NOT_COLORS = ("_nm", "_sm", "_gm", "_rm")  # endings of normal maps and the like
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIZE = 96
SMALLEST, LARGEST = 24, 44  # width of a garment's square, in pixels
MOST_GARMENTS = 4
MOST_OVERLAP = 0.25  # of the area of a new garment's box
VISIBLE = 24  # a garment's pixel belongs to it if it is at least this bright, of 255


def textures(package: pathlib.Path) -> list[np.ndarray]:
    """Returns the color textures as arrays (height, width, 3) uint8, at least as large as a scene."""
    found = []
    with zipfile.ZipFile(package) as archive:
        for name in sorted(archive.namelist()):
            path = pathlib.PurePosixPath(name)
            is_color = path.suffix in (".png", ".jpg") and not path.stem.endswith(NOT_COLORS)
            if is_color and path.parent.name in FOLDERS:
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    if min(image.size) >= SIZE:
                        found.append(np.asarray(image.convert("RGBA").convert("RGB")))
    return found


def scene(
    rng: np.random.Generator, texture: np.ndarray, garments: list[tuple[np.ndarray, int]]
) -> tuple[np.ndarray, np.ndarray, list[tuple[list[int], int]]]:
    """Returns a scene (SIZE, SIZE, 3) uint8, its mask (SIZE, SIZE) uint8, and its boxes [x, y, width, height]."""
    top, left = (int(rng.integers(0, side - SIZE + 1)) for side in texture.shape[:2])
    picture = texture[top : top + SIZE, left : left + SIZE].copy()
    mask, taken = np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE), bool)
    boxes = []
    for pixels, label in garments:
        width = int(rng.integers(SMALLEST, LARGEST + 1))
        garment = np.asarray(Image.fromarray(pixels).resize((width, width), Image.Resampling.BILINEAR))
        if rng.random() < 0.5:
            garment = garment[:, ::-1]
        visible = garment >= VISIBLE
        rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        visible, garment = (a[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] for a in (visible, garment))
        height, width = visible.shape
        for _ in range(20):
            y, x = int(rng.integers(0, SIZE - height + 1)), int(rng.integers(0, SIZE - width + 1))
            if taken[y : y + height, x : x + width].mean() <= MOST_OVERLAP:
                break
        else:
            continue
        window = (slice(y, y + height), slice(x, x + width))
        picture[window][visible] = garment[visible][:, None]
        mask[window][visible] = label + 1
        taken[window] = True
        boxes.append(([x, y, width, height], label))
    return picture, mask, boxes


def write_part(
    folder: pathlib.Path, count: int, surfaces: list[np.ndarray], images: np.ndarray, labels: np.ndarray, seed: int
) -> None:
    """Writes the scenes of one part."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    records, annotations = [], []
    with meter(folder.name, total=count) as bar:
        for number in range(count):
            bar.update(number)
            chosen = rng.integers(0, len(images), int(rng.integers(1, MOST_GARMENTS + 1)))
            texture = surfaces[int(rng.integers(0, len(surfaces)))]
            picture, mask, boxes = scene(rng, texture, [(images[index], int(labels[index])) for index in chosen])
            name = f"{number:05d}.png"
            Image.fromarray(picture).save(folder / "images" / name)
            Image.fromarray(mask).save(folder / "masks" / name)
            records.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
            for box, label in boxes:
                entry = {"id": len(annotations), "image_id": number, "category_id": label + 1, "bbox": box}
                annotations.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Reads the arguments and makes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder to make")
    parser.add_argument("--num_train", type=int, default=2000, help="number of training scenes")
    parser.add_argument("--num_test", type=int, default=500, help="number of test scenes")
    parser.add_argument("--data_dir", default=None, help="folder of TensorFlow Datasets")
    parser.add_argument("--package", type=pathlib.Path, default=PACKAGE, help="archive of textures")
    arguments = parser.parse_args()
    folder = arguments.folder
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"error: The folder must be new or empty. Received: {folder}.")
    if not arguments.package.is_file():
        raise SystemExit(f"error: There is no {arguments.package}. Install the Debian package ufoai-textures.")
    surfaces = textures(arguments.package)
    train = len(surfaces) * 4 // 5
    surfaces = [surfaces[index] for index in np.random.default_rng(0).permutation(len(surfaces))]
    for part, count, seed in (("train", arguments.num_train, 1), ("test", arguments.num_test, 2)):
        images, labels = tfds.as_numpy(
            tfds.load("fashion_mnist", split=part, data_dir=arguments.data_dir, as_supervised=True, batch_size=-1)
        )
        chosen = surfaces[:train] if part == "train" else surfaces[train:]
        write_part(folder / part, count, chosen, images[..., 0], labels, seed)
    (folder / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
