"""Asks a detector or a segmenter about encoded images, over any `Client`."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from robust_tf.serving.client.base import Client
from robust_tf.serving.wire.names import IMAGE_BYTES_SIGNATURE, MASK_OUTPUT, PREVIEW_SIGNATURE


class Box(NamedTuple):
    """One detection.

    Attributes:
        box: Edges in pixels of the encoded image, (top, left, bottom, right).
        label: Name of the class.
        class_number: Number of the class.
        score: Score in [0, 1].
    """

    box: tuple[float, float, float, float]
    label: str
    class_number: int
    score: float


class DensePrediction(NamedTuple):
    """The answer of a detector or segmenter for one picture.

    Attributes:
        image: Path of the picture.
        size: Height and width of the encoded image, in pixels.
        boxes: Detections by descending score; None from a segmenter.
        mask: PNG of the size of the encoded image whose pixels are class numbers; b"" from a detector.
        labels: Names of all classes of a segmenter, or of the classes that a detector has found, by number.
        shares: Share of the pixels by the number of each class in the mask.
        preview: PNG of the decoded image, at most 1024 pixels a side; b"" if it was not asked for.
        error: Why the picture was refused, or "".
    """

    image: str
    size: tuple[int, int] = (0, 0)
    boxes: tuple[Box, ...] | None = None
    mask: bytes = b""
    labels: Mapping[int, str] = {}
    shares: Mapping[int, float] = {}
    preview: bytes = b""
    error: str = ""


def dense_task(client: Client) -> str:
    """Returns "detection" or "segmentation" if the client's model is such a network of this package, else "".

    Raises:
        ServerError: The server cannot be reached, or does not have the model.
    """
    if not client.has_signature(IMAGE_BYTES_SIGNATURE):
        return ""
    outputs = set(client.signatures[IMAGE_BYTES_SIGNATURE].outputs)
    if {"boxes", "scores", "classes", "labels", "count", "image_sizes"} <= outputs:
        return "detection"
    return "segmentation" if {MASK_OUTPUT, "labels", "image_sizes"} <= outputs else ""


def ask_dense(client: Client, images: Sequence[bytes], *, with_preview: bool = False) -> list[DensePrediction]:
    """Sends one batch of images to a detector or segmenter.

    Args:
        client: Client for which `dense_task` is not empty.
        images: Encoded images.
        with_preview: Whether to also ask for a preview of each decoded image.

    Returns:
        The answer for each image. `image` is empty.

    Raises:
        ServerError: The server refused the batch, for example because one of the images is bad.
    """
    answer = client.predict({"image_bytes": list(images)}, signature_name=IMAGE_BYTES_SIGNATURE)
    previews = [b""] * len(images)
    if with_preview:
        shown = client.predict({"image_bytes": list(images)}, signature_name=PREVIEW_SIGNATURE)
        previews = list(shown["preview_image_bytes"])
    found = []
    for row, preview in enumerate(previews):
        height, width = (int(side) for side in answer["image_sizes"][row])
        values = _boxes(answer, row) if "boxes" in answer else _mask(answer, row)
        found.append(DensePrediction("", size=(height, width), preview=preview, **values))
    return found


def mask_pixels(picture: bytes) -> np.ndarray:
    """Returns the class numbers, (height, width) uint8, in the PNG of a mask."""
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("L"))


def _boxes(answer: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    count = int(answer["count"][row])
    boxes = tuple(
        Box(
            (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            label.decode("utf-8"),
            int(number),
            float(score),
        )
        for box, label, number, score in zip(
            *(answer[name][row][:count] for name in ("boxes", "labels", "classes", "scores")), strict=True
        )
    )
    return {"boxes": boxes, "labels": {box.class_number: box.label for box in boxes}}


def _mask(answer: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    picture = answer[MASK_OUTPUT][row]
    numbers, counts = np.unique(mask_pixels(picture), return_counts=True)
    shares = {int(number): float(count / counts.sum()) for number, count in zip(numbers, counts, strict=True)}
    labels = {number: label.decode("utf-8") for number, label in enumerate(answer["labels"][row])}
    return {"mask": picture, "labels": labels, "shares": shares}
