"""Pictures for detection and segmentation: boxes and masks on images, and sheets of such pictures."""

import math
import pathlib
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically

if TYPE_CHECKING:
    from matplotlib.patches import Patch

Color = tuple[int, int, int]
_Area = tuple[int, int, int, int]  # top, left, bottom, right

# The palette of Okabe and Ito, which people with any kind of color blindness can tell apart, without its black.
_PALETTE: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
# Further classes get the same colors darker, and then lighter.
_SHADES = (0.0, -0.45, 0.55)
_IGNORED_COLOR: Color = (128, 128, 128)
_BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue

_PICTURE_SIZE = 384  # side that small images are enlarged to, in pixels
_FONT_SIZE = 17  # on a picture of that size; still legible at half the size
_OPACITY = 0.6  # of a mask on its image
_HATCH = 8  # distance between the lines on ignored pixels, in pixels of the picture
_DPI = 120


def class_color(number: int) -> Color:
    """Returns the color of a class, (red, green, blue) in 0..255. After 21 classes the colors repeat.

    Args:
        number: Number of the class, at least 0.

    Example:
        >>> class_color(0), class_color(7)
        ((230, 159, 0), (126, 87, 0))
    """
    color = _PALETTE[number % len(_PALETTE)]
    shade = _SHADES[number // len(_PALETTE) % len(_SHADES)]
    target = 255 if shade > 0 else 0
    red, green, blue = (round(value + abs(shade) * (target - value)) for value in color)
    return red, green, blue


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str],
) -> np.ndarray:
    """Draws boxes on an image, each with its class and score. Small images are enlarged first.

    Labels never cover each other. A label for which there is no room is left out; boxes of high scores, or without
    scores the large ones, get theirs first.

    Args:
        image: Image (height, width, 3) float in [0, 1].
        boxes: Boxes (n, 4) in pixels of the image, each [top, left, bottom, right]. They may reach beyond the image.
        classes: Classes (n,) int. Boxes of negative classes are padding and are not drawn.
        scores: Scores (n,) in [0, 1], or None for true boxes.
        class_names: Names of the classes.

    Returns:
        The picture (height, width, 3) uint8, enlarged by a whole number to at least 384 pixels a side.

    Raises:
        UserError: The shapes do not fit together, a coordinate is not finite, or a class has no name.

    Example:
        >>> import numpy
        >>> image = numpy.full((64, 64, 3), 0.5)
        >>> picture = draw_boxes(image, numpy.array([[10, 10, 40, 50]]), numpy.array([0]), None, ["digit"])
        >>> picture.shape, picture.dtype
        ((384, 384, 3), dtype('uint8'))
    """
    boxes, classes = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(classes).reshape(-1)
    if len(boxes) != len(classes) or (scores is not None and len(scores) != len(boxes)):
        raise UserError(
            "There must be a class, and a score or none at all, for each box. Received: "
            f"{len(boxes)} boxes, {len(classes)} classes, {'no' if scores is None else len(scores)} scores."
        )
    if not np.isfinite(boxes).all():
        raise UserError(f"Edges of boxes must be finite. Received: {boxes[~np.isfinite(boxes).all(axis=1)][0]}.")
    _check_classes(classes, class_names)
    picture, factor = _enlarged(image)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    scale = max(1.0, max(canvas.size) / _PICTURE_SIZE / 1.5)  # on large images the lines and letters grow
    line, font = round(2 * scale), ImageFont.load_default(round(_FONT_SIZE * scale))
    limits = np.array([canvas.height, canvas.width, canvas.height, canvas.width]) - 1
    edges = np.clip(np.round(boxes * factor), 0, limits).astype(int)
    areas = (edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1])
    ranks = areas if scores is None else np.asarray(scores)
    order = [int(index) for index in np.argsort(-ranks, kind="stable") if classes[index] >= 0]
    for index in reversed(order):  # the first ones on top
        top, left, bottom, right = map(int, edges[index])
        color = class_color(int(classes[index]))
        # A black or white line around the colored one makes it visible on every background.
        draw.rectangle((left, top, right, bottom), outline=_ink_on(color), width=line + 2)
        inner = (min(left + 1, right), min(top + 1, bottom), max(right - 1, left), max(bottom - 1, top))
        if inner[2] >= inner[0] and inner[3] >= inner[1]:
            draw.rectangle(inner, outline=color, width=line)
    taken: list[_Area] = []
    for index in order:
        name = class_names[int(classes[index])]
        text = name if scores is None else f"{name} {scores[index]:.2f}"
        _write_label(draw, text, tuple(map(int, edges[index])), class_color(int(classes[index])), font, taken)
    return np.array(canvas)


def draw_mask(image: np.ndarray, mask: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Draws the mask of a segmentation over its image. Small images are enlarged first.

    The image itself is shown in gray. A class called "background" gets no color. Ignored pixels are gray with dark
    stripes.

    Args:
        image: Image (height, width, 3) float in [0, 1].
        mask: Classes (height, width) int, negative for ignored pixels.
        class_names: Names of the classes.

    Returns:
        The picture (height, width, 3) uint8, enlarged by a whole number to at least 384 pixels a side.

    Raises:
        UserError: Image and mask differ in their size, or a class has no name.

    Example:
        >>> import numpy
        >>> image, mask = numpy.full((64, 64, 3), 0.5), numpy.zeros((64, 64), int)
        >>> draw_mask(image, mask, ["road", "sky"]).shape
        (384, 384, 3)
    """
    mask = np.asarray(mask)
    if mask.shape != np.shape(image)[:2]:
        raise UserError(
            "A mask must have the height and width of its image. Received: a mask of shape "
            f"{mask.shape}, an image of shape {np.shape(image)}."
        )
    _check_classes(mask, class_names)
    picture, factor = _enlarged(image)
    large = _repeated(mask, factor)
    # The image is gray under the colors, so that nobody takes its own colors for classes.
    gray = picture @ np.array(_BRIGHTNESS)
    drawn = picture.astype(np.float64)
    for number in np.unique(mask):
        inside = large == number
        color = _IGNORED_COLOR if number < 0 else class_color(int(number))
        plain = number >= 0 and _is_background(class_names[number])
        opacity = 0.0 if plain else _OPACITY
        drawn[inside] = (1 - opacity) * gray[inside, None] + opacity * np.array(color)
    rows, columns = np.indices(large.shape)
    drawn[(large < 0) & ((rows + columns) % _HATCH < 2)] = 40
    edge = np.zeros(large.shape, bool)
    edge[1:] |= large[1:] != large[:-1]
    edge[:, 1:] |= large[:, 1:] != large[:, :-1]
    drawn[edge] = 20
    return np.round(drawn).astype(np.uint8)


def save_task_sheet(
    path: pathlib.Path,
    rows: Sequence[Sequence[np.ndarray | None]],
    row_names: Sequence[str],
    captions: Sequence[str],
    title: str,
    *,
    class_names: Sequence[str] = (),
    shown: Collection[int] | None = None,
) -> None:
    """Writes a sheet of pictures: usually a column for each image, and rows for the truth and the predictions.

    Args:
        path: PNG file to write.
        rows: Rows of the same length with pictures (height, width, 3), uint8 or float in [0, 1]. None leaves the place
            empty.
        row_names: Name of each row, written along its left side.
        captions: Caption of each column.
        title: Title of the sheet.
        class_names: Names of all classes, for the legend of their colors. Without names there is no legend.
        shown: Classes in the legend; negative numbers stand for ignored pixels. None means all classes.

    Raises:
        UserError: The numbers of pictures, names and captions do not fit together, or the file cannot be written.

    Example:
        >>> import numpy, pathlib
        >>> picture = numpy.full((384, 384, 3), 0.5)
        >>> save_task_sheet(pathlib.Path("sheet.png"), [[picture, None]], ["clean"], ["first", "second"], "Predictions")
        >>> pathlib.Path("sheet.png").exists()
        True
    """
    # Only here, because robust_tf.predict draws boxes and masks, and must start without matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(captions)
    if not rows or not columns or len(row_names) != len(rows) or any(len(row) != columns for row in rows):
        raise UserError(
            "A sheet needs a name for each row and a caption for each column. Received: "
            f"{len(row_names)} names for {len(rows)} rows, {columns} captions for rows of "
            f"{[len(row) for row in rows]} pictures."
        )
    side = _PICTURE_SIZE / _DPI  # in inches, so that a picture of the usual size is not resampled much
    entries = _legend(class_names, shown)
    most = max((len(str(entry.get_label())) for entry in entries), default=1)
    per_line = max(1, min(len(entries), int(columns * side / (0.6 + 0.09 * most))))
    legend_height = 0.28 * math.ceil(len(entries) / per_line) + 0.2 if entries else 0.0
    width = columns * side + 0.5
    title_lines = textwrap.wrap(title, max(20, int(width * 9)))
    height = len(rows) * (side + 0.1) + 0.35 * max(1, len(title_lines)) + 0.3 + legend_height
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for number, (line, pictures) in enumerate(zip(grid, rows, strict=True)):
        for axis, picture in zip(line, pictures, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if picture is not None:
                axis.imshow(picture if picture.dtype == np.uint8 else np.clip(picture, 0.0, 1.0), aspect="equal")
        line[0].set_ylabel(textwrap.fill(row_names[number], 26), fontsize=13)
    for axis, caption in zip(grid[0], captions, strict=True):
        axis.set_title(textwrap.fill(caption, 32), fontsize=13)
    figure.suptitle("\n".join(title_lines), fontsize=15)
    if entries:
        spacing = {"columnspacing": 1.2, "handlelength": 1.4, "handletextpad": 0.5}
        figure.legend(
            handles=entries, loc="outside lower center", ncols=per_line, fontsize=12, frameon=False, **spacing
        )
    with replaced_atomically(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})


def _legend(class_names: Sequence[str], shown: Collection[int] | None) -> "list[Patch]":
    from matplotlib.patches import Patch

    numbers = range(len(class_names)) if shown is None else sorted({max(-1, number) for number in shown})
    _check_classes(np.array(list(numbers), int), class_names)
    entries = []
    for number in numbers:
        if number < 0:
            entries.append(Patch(facecolor=_hex(_IGNORED_COLOR), edgecolor="black", hatch="////", label="ignored"))
        elif not _is_background(class_names[number]):
            entries.append(Patch(facecolor=_hex(class_color(number)), edgecolor="black", label=class_names[number]))
    return entries


def _is_background(name: str) -> bool:
    return name.lower() == "background"


def _ink_on(color: Color) -> Color:
    """Returns black or white, whichever is easier to see on a color."""
    return (0, 0, 0) if np.dot(color, _BRIGHTNESS) > 110 else (255, 255, 255)


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _write_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: tuple[int, ...],
    color: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    taken: list[_Area],
) -> None:
    """Writes a label near its box where it covers no other label, or not at all, and adds its area to `taken`."""
    canvas_width, canvas_height = draw.im.size
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = math.ceil(right - left) + 6, math.ceil(bottom - top) + 6
    if width > canvas_width or height > canvas_height:
        return
    place = _free_place(box, (height, width), (canvas_height, canvas_width), taken)
    if place is None:
        return
    y, x = place
    taken.append((y, x, y + height, x + width))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    draw.text((x + 3 - left, y + 3 - top), text, font=font, fill=_ink_on(color))


def _free_place(
    box: tuple[int, ...], size: tuple[int, int], canvas: tuple[int, int], taken: list[_Area]
) -> tuple[int, int] | None:
    """Returns the top left corner of a free area for a label, preferably above its box, or None."""
    top, left, bottom, right = box
    height, width = size
    above, below, inside_right = top - height, bottom + 1, right - width + 1
    places = [(above, left), (top, left), (below, left), (above, inside_right), (top, inside_right)]
    places += [(below, inside_right), (bottom - height + 1, left), (bottom - height + 1, inside_right)]
    # Failing that, along its left or right edge, first inside and then outside.
    along = range(top, bottom - height + 2, max(1, height // 2))
    places += [(y, x) for y in along for x in (left, inside_right)]
    places += [(y, x) for y in along for x in (right + 1, left - width)]
    for y, x in places:
        x = min(max(x, 0), canvas[1] - width)  # labels may be wider than their boxes
        if y < 0 or y + height > canvas[0]:
            continue
        if not any(y < b and t < y + height and x < r and le < x + width for t, le, b, r in taken):
            return y, x
    return None


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the image as uint8, enlarged by a whole number, and this number."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size or image.dtype.kind != "f":
        raise UserError(
            "An image must be (height, width, 3) float in [0, 1]. Received: an array of shape "
            f"{image.shape} and type {image.dtype}."
        )
    factor = max(1, math.ceil(_PICTURE_SIZE / max(image.shape[:2])))
    pixels = np.round(255 * np.clip(np.nan_to_num(image), 0.0, 1.0)).astype(np.uint8)
    return _repeated(pixels, factor), factor


def _repeated(values: np.ndarray, factor: int) -> np.ndarray:
    return values.repeat(factor, axis=0).repeat(factor, axis=1)


def _check_classes(classes: np.ndarray, class_names: Sequence[str]) -> None:
    if classes.dtype.kind not in "iu":
        raise UserError(f"Classes must be integers. Received: type {classes.dtype}.")
    if classes.size and classes.max() >= len(class_names):
        raise UserError(
            f"Every class needs a name. Received: class {classes.max()}, but {len(class_names)} names, for the classes "
            f"0 to {len(class_names) - 1}."
        )
