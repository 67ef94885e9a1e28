"""The predictions of a detector or segmenter: as text, as lines of JSON, and as pictures in a folder."""

import dataclasses
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically
from robust_tf.serving.client.dense import Box, DensePrediction, mask_pixels
from robust_tf.tasks.drawing import class_color, draw_boxes, draw_mask

# Detections of lower scores are mostly wrong, and would cover the picture. --min_confidence changes the limit.
DRAWN_SCORE = 0.3
_LINE = 22  # height of a line of the legend, in pixels


@dataclasses.dataclass(frozen=True)
class DenseFormat:
    """What is said about each picture.

    Attributes:
        top: Number of detections, or of classes in a mask, in a line for people.
        min_confidence: Lowest score of a detection that is mentioned.
        masks: Folder for the masks as PNG. None writes no masks.
    """

    top: int
    min_confidence: float
    masks: "PictureFolder | None" = None

    def text(self, prediction: DensePrediction) -> str:
        """Returns a small table for people."""
        if prediction.error:
            return f"{prediction.image}: refused: {prediction.error}"
        height, width = prediction.size
        head = f"{prediction.image}: {width}x{height} pixels"
        if prediction.boxes is None:
            ranked = sorted(prediction.shares.items(), key=lambda item: -item[1])
            rows = [(prediction.labels[number], f"{share:.1%} of the pixels") for number, share in ranked[: self.top]]
            left_out = len(ranked) - len(rows)
            head += f", {len(ranked)} {'class' if len(ranked) == 1 else 'classes'}"
        else:
            boxes = self._shown(prediction)
            rows = [(box.label, f"{box.score:.2f}  {_edges_in_words(box)}") for box in boxes[: self.top]]
            left_out = len(boxes) - len(rows)
            head += f", {len(boxes)} {'object' if len(boxes) == 1 else 'objects'}"
        indent = max((len(label) for label, _ in rows), default=0)
        lines = [head, *(f"  {label:<{indent}}  {text}" for label, text in rows)]
        return "\n".join([*lines, *([f"  and {left_out} more"] if left_out else [])])

    def json(self, prediction: DensePrediction) -> str:
        """Returns one JSON object in one line, after writing the mask."""
        if prediction.error:
            return json.dumps({"image": prediction.image, "error": prediction.error})
        facts: dict[str, Any] = {"image": prediction.image, "size": list(prediction.size)}
        if prediction.boxes is None:
            if self.masks is not None:
                facts["mask"] = str(self.masks.write(prediction.image, prediction.mask))
            shares = {prediction.labels[number]: round(share, 6) for number, share in prediction.shares.items()}
            return json.dumps(facts | {"share": shares})
        detections = [
            {
                "box": [round(edge, 3) for edge in box.box],
                "label": box.label,
                "class": box.class_number,
                "score": round(box.score, 6),
            }
            for box in self._shown(prediction)
        ]
        return json.dumps(facts | {"detections": detections})

    def _shown(self, prediction: DensePrediction) -> list[Box]:
        return [box for box in prediction.boxes or () if box.score >= self.min_confidence]


class PictureFolder:
    """A folder that gets one PNG for each picture. The name of a PNG follows from the path of its picture alone.

    Args:
        folder: Path of the folder, which is created when it is needed.
        flag: Flag that names the folder, for messages.
    """

    def __init__(self, folder: pathlib.Path, flag: str) -> None:
        self.folder = folder
        self._flag = flag

    def path(self, image: str) -> pathlib.Path:
        """Returns the path of a picture's PNG, which differs for pictures of the same name in different folders."""
        stem = re.sub(r"[^\w.-]", "_", pathlib.Path(image).stem)[:80]
        digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        return self.folder / f"{stem}-{digest}.png"

    def check(self, images: Iterable[str]) -> None:
        """Refuses a folder that has a PNG of one of the pictures from an earlier run.

        Raises:
            UserError: There is such a file, or the folder is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self._flag} must be a folder. Received: {self.folder}, a file. Choose another path.")
        there = [path for path in map(self.path, images) if path.exists()]
        if there:
            raise UserError(
                f"Pictures of an earlier run are not overwritten. Received: {self._flag}, where {there[0]} and "
                f"{len(there) - 1} others exist. Choose another folder, or remove the files."
            )

    def write(self, image: str, content: bytes) -> pathlib.Path:
        """Writes the PNG of a picture and returns its path.

        Raises:
            UserError: The file cannot be written.
        """
        path = self.path(image)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced_atomically(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise UserError(f"{self._flag} can't be written. Received: {path}: {error.strerror}.") from error
        return path


def drawn(prediction: DensePrediction, *, min_score: float) -> bytes:
    """Returns a PNG of a picture with its boxes, or with its mask and a legend.

    Args:
        prediction: Prediction with a preview.
        min_score: Lowest score of a box that is drawn.
    """
    with Image.open(io.BytesIO(prediction.preview)) as preview:
        image = np.asarray(preview.convert("RGB"), np.float32) / 255.0
    height, width = image.shape[:2]
    count = 1 + max(prediction.labels, default=0)
    names = [prediction.labels.get(number, "") for number in range(count)]
    if prediction.boxes is None:
        mask = Image.fromarray(mask_pixels(prediction.mask)).resize((width, height), Image.Resampling.NEAREST)
        classes = np.asarray(mask).astype(np.int64)
        picture = _with_legend(draw_mask(image, classes, names), names, np.unique(classes).tolist())
    else:
        boxes = [box for box in prediction.boxes if box.score >= min_score]
        scale = np.array([height / prediction.size[0], width / prediction.size[1]] * 2)
        picture = draw_boxes(
            image,
            np.array([box.box for box in boxes]).reshape(-1, 4) * scale,
            np.array([box.class_number for box in boxes], int),
            np.array([box.score for box in boxes]),
            names,
        )
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def _with_legend(picture: np.ndarray, names: Sequence[str], shown: Sequence[int]) -> np.ndarray:
    """Returns the picture with a strip below it that names the colors. The background has no color."""
    entries = [number for number in shown if names[number].lower() != "background"]
    font = ImageFont.load_default(14)
    width = picture.shape[1]
    places: list[tuple[int, int]] = []
    x, y = 8, 6
    for number in entries:
        needed = round(font.getlength(names[number])) + 40
        if x > 8 and x + needed > width:
            x, y = 8, y + _LINE
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, picture.shape[0] + (y + _LINE if entries else 0)), "white")
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    for number, (left, top) in zip(entries, places, strict=True):
        top += picture.shape[0]
        draw.rectangle((left, top, left + 16, top + 14), fill=class_color(number), outline=(20, 20, 20))
        draw.text((left + 22, top - 1), names[number], fill=(0, 0, 0), font=font)
    return np.asarray(canvas)


def _edges_in_words(box: Box) -> str:
    top, left, bottom, right = (round(edge) for edge in box.box)
    return f"top {top}, left {left}, bottom {bottom}, right {right}"
