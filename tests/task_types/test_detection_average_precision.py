"""The average precision, its confidence intervals, and their agreement with pycocotools."""

import contextlib
import io
import time

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from robust_tf.errors import UserError
from robust_tf.tasks.detection import average_precision, bootstrap_difference, bootstrap_interval, match_detections

NAMES = ["cat", "dog", "car"]


def made_up(
    count: int, *, seed: int = 0, noise: float = 4.0, crowds: bool = True, most: int = 5, extra: int = 6
) -> tuple[list, list]:
    """Returns objects, and detections of most of them with wrong places, classes and scores."""
    rng = np.random.default_rng(seed)
    truths, detections = [], []
    for _ in range(count):
        number = int(rng.integers(0, most + 1))
        low = rng.uniform(0, 200, (number, 2))
        boxes = np.concatenate([low, low + rng.uniform(8, 150, (number, 2))], axis=1)
        classes = rng.integers(3, size=number)
        truths.append(
            {
                "boxes": np.concatenate([boxes, np.zeros((1, 4))]).astype(np.float32),  # with padding
                "classes": np.append(classes, -1),
                "crowd": np.append(rng.random(number) < 0.2 * crowds, False),
            }
        )
        found = np.concatenate([boxes, boxes[: number // 2]]) + rng.normal(0, noise, (number + number // 2, 4))
        low = rng.uniform(0, 200, (extra, 2))
        found = np.concatenate([found, np.concatenate([low, low + 40], axis=1)])
        guessed = np.concatenate([classes, classes[: number // 2], rng.integers(3, size=extra)])
        guessed = np.where(rng.random(len(guessed)) < 0.1, -1, guessed)
        scores = np.round(rng.random(len(guessed)), 2)  # with equal scores
        detections.append({"boxes": found, "classes": guessed, "scores": scores})
    return truths, detections


def pycocotools_figures(truths, detections, images: list[int] | None = None) -> COCOeval:
    """Runs pycocotools on a list of images, which may contain an image several times."""
    images = list(range(len(truths))) if images is None else images
    data = {"images": [{"id": i + 1} for i in range(len(images))], "categories": [{"id": i} for i in range(3)]}
    truth, results = COCO(), []
    data["annotations"] = []
    for i, image in enumerate(images, start=1):
        for kind in (truths[image], detections[image]):
            for row, label in enumerate(kind["classes"]):
                top, left, bottom, right = (float(edge) for edge in kind["boxes"][row])
                entry = {"image_id": i, "category_id": int(label), "bbox": [left, top, right - left, bottom - top]}
                if label >= 0 and "scores" in kind:
                    results.append(entry | {"score": float(kind["scores"][row])})
                elif label >= 0:
                    number = len(data["annotations"]) + 1
                    more = {"id": number, "area": (right - left) * (bottom - top), "iscrowd": int(kind["crowd"][row])}
                    data["annotations"].append(entry | more)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = data
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_a_detection_that_is_known():
    truths = [{"boxes": np.array([[0, 0, 50, 50.0]]), "classes": np.array([1]), "crowd": np.array([False])}]
    found = {"boxes": np.array([[0, 0, 50, 39.0]]), "classes": np.array([1]), "scores": np.array([0.3])}
    figures = average_precision(truths, [found], NAMES)  # the IoU is 0.78, so that 6 of 10 thresholds are reached
    assert figures == {
        "ap": pytest.approx(0.6),
        "ap50": pytest.approx(1),
        "ap75": pytest.approx(1),
        "ap_small": None,
        "ap_medium": pytest.approx(0.6),
        "ap_large": None,
        "per_class": {"cat": None, "dog": pytest.approx(0.6), "car": None},
    }
    none = {"boxes": np.zeros((0, 4)), "classes": np.zeros(0), "scores": np.zeros(0)}
    assert average_precision(truths, [none], NAMES)["ap"] == 0
    empty = [{"boxes": np.zeros((0, 4)), "classes": np.zeros(0), "crowd": np.zeros(0)}]
    assert average_precision(empty, [found], NAMES)["ap"] is None


def test_edges_are_in_the_right_order():
    """A tall box and a wide one of the same area overlap little."""
    truths = [{"boxes": np.array([[0, 0, 80, 20.0]]), "classes": np.array([0]), "crowd": np.array([False])}]
    wide = {"boxes": np.array([[0, 0, 20, 80.0]]), "classes": np.array([0]), "scores": np.array([0.5])}
    assert average_precision(truths, [wide], NAMES)["ap50"] == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_equal_pycocotools(seed, capsys):
    truths, detections = made_up(30, seed=seed)
    figures = average_precision(truths, detections, NAMES)
    assert capsys.readouterr().out == ""
    expected = pycocotools_figures(truths, detections)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    np.testing.assert_allclose([figures[name] for name in names], expected.stats[:6], rtol=1e-12)
    per_class = expected.eval["precision"][..., 0, -1].mean(axis=(0, 1))
    np.testing.assert_allclose([figures["per_class"][name] for name in NAMES], per_class, rtol=1e-12)
    assert 0.1 < figures["ap"] < 0.9 and any(truth["crowd"].any() for truth in truths)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accumulation_equals_pycocotools(seed):
    truths, detections = made_up(30, seed=seed)
    matches = match_detections(truths, detections, NAMES)
    assert matches.ap() == pytest.approx(matches.figures["ap"], rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_with_repeated_images_equals_pycocotools(seed):
    truths, detections = made_up(20, seed=seed)
    rng = np.random.default_rng(seed)
    for detection in detections:  # the order of equal scores would differ, since pycocotools repeats whole images
        detection["scores"] = (
            rng.permutation(len(detection["scores"])) / 100 + rng.random(len(detection["scores"])) / 200
        )
    images = sorted(rng.integers(20, size=20).tolist())
    assert len(set(images)) < 20
    found = match_detections(truths, detections, NAMES).ap(np.bincount(images, minlength=20))
    assert found == pytest.approx(pycocotools_figures(truths, detections, images).stats[0], abs=1e-9)


def test_interval_contains_the_ap_and_shrinks_with_more_images():
    widths = []
    for count in (20, 180):
        matches = match_detections(*made_up(count, seed=3), NAMES)
        low, high = bootstrap_interval(matches, resamples=100)
        assert low < matches.figures["ap"] < high
        assert bootstrap_interval(matches, resamples=100) == (low, high)  # the same seed
        widths.append(high - low)
    assert 1.7 < widths[0] / widths[1] < 6  # about 3, the square root of the ratio of the numbers of images


def test_interval_contains_95_percent_of_the_samples():
    matches = match_detections(*made_up(40, seed=5), NAMES)
    low, high = bootstrap_interval(matches, resamples=200, seed=1)
    rng = np.random.default_rng(2)  # other samples
    aps = [matches.ap(np.bincount(rng.integers(40, size=40), minlength=40)) for _ in range(200)]
    assert 0.88 < np.mean([low <= ap <= high for ap in aps]) < 0.99


def test_paired_difference_is_narrower_than_two_intervals():
    truths, detections = made_up(60, seed=4)
    rng = np.random.default_rng(0)
    worse = [{**found, "boxes": found["boxes"] + rng.normal(0, 3, found["boxes"].shape)} for found in detections]
    first, second = match_detections(truths, detections, NAMES), match_detections(truths, worse, NAMES)
    compared = bootstrap_difference(first, second, resamples=100)
    assert compared.difference == pytest.approx(first.figures["ap"] - second.figures["ap"])
    low, high = compared.interval
    assert 0 < low < compared.difference < high
    alone = [bootstrap_interval(matches, resamples=100) for matches in (first, second)]
    assert high - low < 0.8 * sum((interval.high - interval.low) ** 2 for interval in alone) ** 0.5
    assert bootstrap_difference(first, first, resamples=20).interval == (0, 0)


@pytest.mark.slow
def test_200_samples_of_500_images_take_seconds():
    truths, detections = made_up(500, extra=60)
    matches = match_detections(truths, detections, NAMES)
    start = time.perf_counter()
    bootstrap_interval(matches, resamples=200)
    assert time.perf_counter() - start < 30


def test_bad_input_is_refused():
    truths, detections = made_up(3)
    with pytest.raises(UserError, match="Received: 3 truths and 2 detections"):
        match_detections(truths, detections[:2], NAMES)
    with pytest.raises(UserError, match="Received: 0 truths"):
        match_detections([], [], NAMES)
    with pytest.raises(UserError, match=r"in 0\.\.1, .* Received: class 2 in image"):
        match_detections(*made_up(20), NAMES[:2])
    matches = match_detections(*made_up(10), NAMES)
    with pytest.raises(UserError, match="Received: resamples=0"):
        bootstrap_interval(matches, resamples=0)
    with pytest.raises(UserError, match="Received: 10 and 4 images"):
        bootstrap_difference(matches, match_detections(*made_up(4), NAMES))
    without = [{"boxes": np.zeros((0, 4)), "classes": np.zeros(0), "crowd": np.zeros(0)}]
    with pytest.raises(UserError, match="without any object"):
        bootstrap_interval(match_detections(without, detections[:1], NAMES), resamples=5)
