"""Small images in the folder layouts of real data sets."""

import io
import pathlib

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """Encodes an image with Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(number: int, *, gray: bool = False) -> bytes:
    """Makes a JPEG of 12x16 pixels, a different one for each number below 1,000."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16) if gray else (12, 16, 3)).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def write(path: pathlib.Path, content: bytes | str) -> None:
    """Writes a file, after making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_folder(root: pathlib.Path, counts: dict[str, int], *, first: int = 0) -> pathlib.Path:
    """Writes images into subfolders.

    Args:
        root: Folder to write to.
        counts: Number of images in each subfolder, such as "train/cat".
        first: Number of the first image, see `jpeg`.
    """
    number = first
    for folder, count in counts.items():
        for index in range(count):
            write(root / folder / f"{index:03d}.jpg", jpeg(number))
            number += 1
    return root
