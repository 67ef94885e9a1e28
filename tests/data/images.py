"""Small images in the layouts that data sets come in."""

import io
import pathlib

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of a file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(number: int, *, gray: bool = False) -> bytes:
    """A JPEG of 12x16 pixels, another one for each number below 1,000."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16) if gray else (12, 16, 3)).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def write(path: pathlib.Path, content: bytes | str) -> None:
    """Writes a file, and its folder before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_folder(root: pathlib.Path, counts: dict[str, int], *, first: int = 0) -> pathlib.Path:
    """`counts`: sub-folder, e.g. "train/cat", to the number of its images; `first`: number of the very first one."""
    number = first
    for folder, count in counts.items():
        for index in range(count):
            write(root / folder / f"{index:03d}.jpg", jpeg(number))
            number += 1
    return root
