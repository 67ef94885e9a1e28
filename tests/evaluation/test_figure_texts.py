"""Tests of the figures: every text stays inside the picture, however long the names are."""

import numpy as np
import pytest

from robust_tf.evaluation import figures
from robust_tf.evaluation.calibration import calibration

NAME = "resnet20_width8_l2_eps0.5_fashion_mnist_classes-0,1,2,3,4,5_seed0_fashion_mnist_fixed_feature_seed0, autoattack"


def draw_curve(path, name):
    curve = figures.Curve(name, (0.0, 0.5), (0.9, 0.5), ((0.8, 0.95), (0.4, 0.6)))
    figures.save_curve(path, [curve, curve._replace(name="other")], norm="l2", title=f"500 test images of {name}")


def draw_reliability(path, name):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), size=50)
    bins = calibration(np.log(probabilities), np.arange(50) % 4)
    figures.save_reliability(path, {name: bins, "other": bins})


def draw_sheet(path, name):
    picture = np.zeros((4, 4, 3))
    figures.save_sheet(path, [[picture] * 6] * 2, [["a caption"] * 6] * 2, row_names=[name, "other"], title=name)


def texts_of(figure):
    yield from figure.texts
    for legend in figure.legends + [axes.get_legend() for axes in figure.axes if axes.get_legend()]:
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from (axes.title, axes.xaxis.label, axes.yaxis.label)


@pytest.mark.parametrize("draw", [draw_curve, draw_reliability, draw_sheet])
@pytest.mark.parametrize("name", ["digits", NAME], ids=["short", "long"])
def test_texts_stay_inside_the_picture(draw, name, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda path, figure: drawn.append(figure))
    draw(tmp_path / "picture.png", name)
    (figure,) = drawn
    figure.canvas.draw()  # warns if the names leave no room for the axes
    texts = [text for text in texts_of(figure) if text.get_text()]
    assert len(texts) >= 5
    for text in texts:
        box = text.get_window_extent()
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, text.get_text()
        assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, text.get_text()
    figures.pyplot.close(figure)
