"""Boxes and masks are drawn in the colors of their classes, where they are, and labels never cover each other."""

import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image

from robust_tf.errors import UserError
from robust_tf.tasks import drawing
from robust_tf.tasks.drawing import class_color, draw_boxes, draw_mask, save_task_sheet

NAMES = ("background", "square", "disc", "triangle")
GRAY = np.full((64, 64, 3), 0.5, np.float32)


def has_color(picture: np.ndarray, number: int) -> bool:
    return bool((picture == class_color(number)).all(axis=-1).any())


def test_21_classes_have_colors_that_differ_clearly():
    colors = np.array([class_color(number) for number in range(21)])
    distances = [np.abs(one - other).max() for one, other in itertools.combinations(colors, 2)]
    assert min(distances) >= 25
    assert class_color(21) == class_color(0)
    assert colors.min() >= 0 and colors.max() <= 255


@pytest.mark.parametrize(("size", "factor"), [(64, 6), (200, 2), (384, 1), (500, 1)])
def test_a_box_is_drawn_where_it_is_on_an_enlarged_picture(size, factor):
    image = np.full((size, size, 3), 0.5, np.float32)
    box = np.array([[0.25, 0.125, 0.75, 0.875]]) * size
    picture = draw_boxes(image, box, np.array([2]), None, NAMES)
    assert picture.shape == (size * factor, size * factor, 3) and picture.dtype == np.uint8
    colored = (picture == class_color(2)).all(axis=-1)
    row = colored[picture.shape[0] // 2]  # below the label
    edges = np.flatnonzero(row)
    assert abs(edges.min() - box[0, 1] * factor) <= 3 and abs(edges.max() - box[0, 3] * factor) <= 3
    inside = picture[picture.shape[0] // 2, edges.min() + 10 : edges.max() - 10]
    assert (inside == 128).all()  # the box is not filled


def test_padding_is_not_drawn_and_boxes_beyond_the_image_are_cut():
    boxes = np.array([[10, 10, 30, 30], [-50, -50, 500, 500]])
    picture = draw_boxes(GRAY, boxes, np.array([-1, 3]), np.array([0.9, 0.5]), NAMES)
    assert has_color(picture, 3)
    np.testing.assert_array_equal(picture, draw_boxes(GRAY, boxes[1:], np.array([3]), np.array([0.5]), NAMES))
    nothing = draw_boxes(GRAY, np.zeros((0, 4)), np.zeros(0, int), None, NAMES)
    assert (nothing == 128).all()


@pytest.mark.parametrize("count", [1, 12, 80])
def test_labels_never_cover_each_other_and_stay_in_the_picture(count, monkeypatch):
    rng = np.random.default_rng(0)
    corners = rng.random((count, 2)) * 40
    boxes = np.concatenate([corners, corners + 3 + rng.random((count, 2)) * 30], axis=1)
    written: list[tuple[str, tuple[int, ...]]] = []
    real = drawing._write_label

    def spy(draw, text, box, color, font, taken):
        before = len(taken)
        real(draw, text, box, color, font, taken)
        written.extend((text, area) for area in taken[before:])

    monkeypatch.setattr(drawing, "_write_label", spy)
    scores = rng.random(count)
    picture = draw_boxes(GRAY, boxes, rng.integers(0, 4, count), scores, NAMES)
    for top, left, bottom, right in (area for _, area in written):
        assert 0 <= top < bottom <= picture.shape[0] and 0 <= left < right <= picture.shape[1]
    for (_, one), (_, other) in itertools.combinations(written, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert len(written) == count if count <= 12 else len(written) > 10
    assert written[0][0].endswith(f"{scores.max():.2f}")  # the best box gets its label first


def test_a_mask_gets_the_colors_of_its_classes():
    mask = np.zeros((64, 64), int)
    mask[8:24, 8:24] = 1
    mask[40:56, 40:56] = 3
    mask[:4] = -1
    image = np.zeros((64, 64, 3), np.float32)
    image[:] = (1.0, 0.0, 0.0)
    picture = draw_mask(image, mask, NAMES)
    assert picture.shape == (384, 384, 3) and picture.dtype == np.uint8

    def at(row: int, column: int) -> np.ndarray:
        return picture[6 * row + 3, 6 * column + 3].astype(int)

    brightness = 0.299 * 255
    np.testing.assert_allclose(at(30, 30), 3 * [brightness], atol=1)  # the background has no color
    for number, center in ((1, 16), (3, 48)):
        expected = 0.4 * brightness + 0.6 * np.array(class_color(number))
        np.testing.assert_allclose(at(center, center), expected, atol=1)
    ignored = picture[: 6 * 4 - 1]
    assert np.ptp(ignored.reshape(-1, 3), axis=1).max() == 0  # gray
    assert len(np.unique(ignored)) > 1  # striped


def test_sheets_are_written_with_all_pictures_and_their_legend(tmp_path):
    mask = np.zeros((64, 64), int)
    mask[:, 30:] = 2
    rows = [[draw_mask(GRAY, mask, NAMES), GRAY], [None, np.random.default_rng(0).random((64, 64, 3))]]
    path = tmp_path / "sheet.png"
    sheets = {}
    for shown in (None, (2,), (-1, 0, 2)):
        save_task_sheet(path, rows, ["truth", "prediction"], ["a", "b"], "Title", class_names=NAMES, shown=shown)
        first = path.read_bytes()
        save_task_sheet(path, rows, ["truth", "prediction"], ["a", "b"], "Title", class_names=NAMES, shown=shown)
        assert path.read_bytes() == first
        sheets[shown] = np.array(Image.open(path).convert("RGB"))
    sheet = sheets[None]
    assert sheet.shape[1] > 2 * 384 and sheet.shape[0] > 2 * 384
    assert all(has_color(sheet, number) for number in (1, 2, 3))  # the pictures hold only mixed colors
    assert has_color(sheets[(2,)], 2) and not has_color(sheets[(2,)], 1)
    assert [file.name for file in pathlib.Path(tmp_path).iterdir()] == ["sheet.png"]


def test_wrong_arguments_are_refused(tmp_path):
    box, one = np.array([[1, 1, 9, 9]]), np.array([1])
    with pytest.raises(UserError, match="Received: 1 boxes, 2 classes, no scores"):
        draw_boxes(GRAY, box, np.array([1, 2]), None, NAMES)
    with pytest.raises(UserError, match="Received: 1 boxes, 1 classes, 3 scores"):
        draw_boxes(GRAY, box, one, np.ones(3), NAMES)
    with pytest.raises(UserError, match=r"finite. Received: \[ 1. nan  9.  9.\]"):
        draw_boxes(GRAY, np.array([[1, np.nan, 9, 9]]), one, None, NAMES)
    with pytest.raises(UserError, match="Received: class 9, but 4 names"):
        draw_boxes(GRAY, box, np.array([9]), None, NAMES)
    with pytest.raises(UserError, match="Classes must be integers. Received: type float64"):
        draw_mask(GRAY, np.zeros((64, 64)), NAMES)
    with pytest.raises(UserError, match=r"a mask of shape \(32, 32\), an image of shape \(64, 64, 3\)"):
        draw_mask(GRAY, np.zeros((32, 32), int), NAMES)
    with pytest.raises(UserError, match=r"Received: an array of shape \(64, 64, 3\) and type uint8"):
        draw_mask(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), int), NAMES)
    with pytest.raises(UserError, match=r"1 names for 1 rows, 2 captions for rows of \[1\] pictures"):
        save_task_sheet(tmp_path / "a.png", [[GRAY]], ["a"], ["b", "c"], "")
