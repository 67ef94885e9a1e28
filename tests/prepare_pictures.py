"""Makes the folder of pictures of configs/study_fashion.cfg from the Debian package openclipart-png.

    apt-get install openclipart-png
    python tests/prepare_pictures.py pictures

The package holds drawings, all in the public domain. Five of its categories become the classes, with 240 drawings each,
32x32 pixels on a white background. Each drawing is there once: the package files some in several categories.
"""

import argparse
import collections
import hashlib
import pathlib

from PIL import Image, ImageOps

from robust_tf.console import meter

PACKAGE = pathlib.Path("/usr/share/openclipart/png")
CLASSES = ("animals", "food", "people", "recreation", "transportation")
COUNT = 240
SIZE = 32
MOST_PIXELS = 4_000_000  # some files are blank pictures of half a billion pixels


def small(path: pathlib.Path) -> Image.Image | None:
    """Returns a drawing as RGB on a white square of 32x32 pixels, or None if it is too large to open."""
    Image.MAX_IMAGE_PIXELS = None  # the size is checked here, before any pixel is read
    with Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            return None
        drawing = image.convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    return ImageOps.pad(Image.alpha_composite(white, drawing).convert("RGB"), (SIZE, SIZE), color="white")


def main() -> None:
    """Reads the arguments and makes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder to make, with one subfolder for each class")
    parser.add_argument("--package", type=pathlib.Path, default=PACKAGE, help="folder with the package's categories")
    arguments = parser.parse_args()
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise SystemExit(f"error: The folder must be new or empty. Received: {arguments.folder}.")
    paths = [(name, path) for name in CLASSES for path in sorted((arguments.package / name).rglob("*.png"))]
    drawings: dict[str, dict[str, Image.Image]] = {name: {} for name in CLASSES}
    with meter("pictures", total=len(paths)) as bar:
        for done, (name, path) in enumerate(paths):
            bar.update(done)
            if drawing := small(path):
                drawings[name][hashlib.sha256(drawing.tobytes()).hexdigest()] = drawing
    categories = collections.Counter(digest for name in CLASSES for digest in drawings[name])
    for name in CLASSES:
        chosen = sorted(digest for digest in drawings[name] if categories[digest] == 1)[:COUNT]
        if len(chosen) < COUNT:
            raise SystemExit(
                f"error: {arguments.package / name} needs at least {COUNT} different PNG files. Received: "
                f"{len(chosen)}. Install the Debian package openclipart-png."
            )
        (arguments.folder / name).mkdir(parents=True)
        for number, digest in enumerate(chosen):
            drawings[name][digest].save(arguments.folder / name / f"{number:03d}.png")
    print(f"{COUNT} pictures for each of {len(CLASSES)} classes are in {arguments.folder}.")


if __name__ == "__main__":
    main()
