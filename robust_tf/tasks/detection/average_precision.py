"""COCO's average precision (AP) of detections, with confidence intervals.

pycocotools, COCO's reference program, decides which detections are correct, and computes the figures. For the
confidence intervals the images are resampled hundreds of times. The matches do not depend on the sample, so only the
last step is repeated: the area under the curve of precision against recall.

Source: Lin et al. 2014 (COCO), arXiv 1405.0312, and https://cocodataset.org/#detection-eval.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from robust_tf.errors import UserError
from robust_tf.statistics import Interval

# Arrays of one image by name.
Boxes = Mapping[str, np.ndarray]

# The order of pycocotools' summary.
_FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST_DETECTIONS = 100


@dataclasses.dataclass(frozen=True)
class _ClassMatches:
    """The detections of one class in all images by descending score.

    Attributes:
        image: Position of the image of each detection, (D,) int.
        correct: Whether each detection is correct at each IoU threshold, (10, D) bool.
        wrong: Whether each detection is wrong, (10, D) bool. Detections of ignored objects are neither.
        objects: Number of objects in each image, (images,) int, without crowds.
    """

    image: np.ndarray
    correct: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray


@dataclasses.dataclass(frozen=True)
class Matches:
    """Which detections are correct: all that the average precision of any sample of the images depends on.

    Attributes:
        figures: Figures of all images, see `average_precision`.
        count: Number of images.
        by_class: Detections of each class.
    """

    figures: dict[str, Any]
    count: int
    by_class: tuple[_ClassMatches, ...]

    def ap(self, repeats: np.ndarray | None = None) -> float | None:
        """Returns the mean AP over the classes and the IoU thresholds 0.5, 0.55, ..., 0.95, or None without objects.

        Args:
            repeats: How often each image occurs in the sample, (count,) int. None means once.
        """
        repeats = np.ones(self.count, int) if repeats is None else repeats
        found = [_class_ap(matches, repeats) for matches in self.by_class]
        known = [value for value in found if value is not None]
        return float(np.mean(known)) if known else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference between the AP of two detectors on the same images.

    Attributes:
        difference: First AP minus the second, in [-1, 1].
        interval: The 95 % confidence interval of the difference.
    """

    difference: float
    interval: Interval


def average_precision(
    truths: Sequence[Boxes], detections: Sequence[Boxes], class_names: Sequence[str]
) -> dict[str, Any]:
    """Returns COCO's average precision.

    Args:
        truths: Objects of each image: "boxes" (n, 4) float [top, left, bottom, right] in pixels of the original image,
            "classes" (n,) int, and "crowd" (n,) bool. Rows of class -1 are padding.
        detections: Detections in each image, in the same order: "boxes" (m, 4) in the same unit, "scores" (m,) float,
            and "classes" (m,) int. Rows of class -1 are padding. The 100 highest scores of each class count.
        class_names: Names of the classes.

    Returns:
        "ap", the mean over the IoU thresholds 0.5, 0.55, ..., 0.95; "ap50" and "ap75" at one threshold; "ap_small",
        "ap_medium" and "ap_large" for objects of an area below 32 x 32 pixels, from there to 96 x 96 pixels, and above;
        "per_class", the AP of each class by name. All are in [0, 1], or None if there are no such objects. The area is
        the area of the box. COCO's own figures use the area of the segment, which is smaller.

    Raises:
        UserError: The numbers of images differ, or a class is unknown.

    Example:
        >>> truths = [{"boxes": np.array([[0, 0, 50, 50]]), "classes": np.array([0]), "crowd": np.array([False])}]
        >>> found = [{"boxes": np.array([[0, 0, 50, 45]]), "classes": np.array([0]), "scores": np.array([0.8])}]
        >>> figures = average_precision(truths, found, ["cat"])
        >>> round(figures["ap"], 3), round(figures["ap75"], 3), figures["ap_small"]  # the IoU is 0.9
        (0.9, 1.0, None)
    """
    return match_detections(truths, detections, class_names).figures


def match_detections(truths: Sequence[Boxes], detections: Sequence[Boxes], class_names: Sequence[str]) -> Matches:
    """Matches detections with objects, for `bootstrap_interval` and `bootstrap_difference`.

    Args:
        truths: Objects of each image, see `average_precision`.
        detections: Detections in each image, see `average_precision`.
        class_names: Names of the classes.

    Raises:
        UserError: The numbers of images differ, or a class is unknown.

    Example:
        >>> truths = [{"boxes": np.array([[0, 0, 50, 50]]), "classes": np.array([0]), "crowd": np.array([False])}] * 2
        >>> right = {"boxes": np.array([[0, 0, 50, 50]]), "classes": np.array([0]), "scores": np.array([0.9])}
        >>> wrong = {"boxes": np.array([[0, 60, 50, 110]]), "classes": np.array([0]), "scores": np.array([0.8])}
        >>> matches = match_detections(truths, [right, wrong], ["cat"])
        >>> round(matches.ap(), 3), round(matches.ap(np.array([2, 0])), 3)  # both images; the first one twice
        (0.505, 1.0)
    """
    # Here, because pycocotools imports matplotlib, which takes a while.
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if len(truths) != len(detections) or not truths:
        raise UserError(
            "There must be an entry for each image, and at least one image. Received: "
            f"{len(truths)} truths and {len(detections)} detections."
        )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        truth, found = COCO(), COCO()
        shared = {
            "images": [{"id": image} for image in range(1, len(truths) + 1)],
            "categories": [{"id": index, "name": name} for index, name in enumerate(class_names, start=1)],
        }
        truth.dataset = shared | {"annotations": list(_annotations(truths, class_names))}
        found.dataset = shared | {"annotations": list(_annotations(detections, class_names))}
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.catIds = list(range(1, len(class_names) + 1))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]  # (thresholds, recalls, classes) of all areas
    per_class = {name: _known_mean(precision[:, :, index]) for index, name in enumerate(class_names)}
    figures = {name: _known(value) for name, value in zip(_FIGURES, evaluation.stats[:6], strict=True)}
    return Matches(
        figures={**figures, "per_class": per_class},
        count=len(truths),
        by_class=tuple(_matches_of_class(evaluation, index, len(truths)) for index in range(len(class_names))),
    )


def bootstrap_interval(matches: Matches, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Returns the 95 % confidence interval of the AP, for other images of the same kind.

    It is the percentile interval of the bootstrap: the AP is computed for many samples of as many images, drawn with
    replacement. Samples without any objects are left out.

    Args:
        matches: Result of `match_detections`.
        resamples: Number of samples.
        seed: Seed for the samples.

    Raises:
        UserError: The images have no objects, or there are no samples.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    Example:
        >>> truths = [{"boxes": np.array([[0, 0, 50, 50]]), "classes": np.array([0]), "crowd": np.array([False])}] * 2
        >>> right = {"boxes": np.array([[0, 0, 50, 50]]), "classes": np.array([0]), "scores": np.array([0.9])}
        >>> wrong = {"boxes": np.array([[0, 60, 50, 110]]), "classes": np.array([0]), "scores": np.array([0.8])}
        >>> bootstrap_interval(match_detections(truths, [right, wrong], ["cat"])).in_words
        '0.0% to 100.0%'
    """
    return _percentiles([matches.ap(repeats) for repeats in _samples(matches.count, resamples, seed)])


def bootstrap_difference(first: Matches, second: Matches, *, resamples: int = 1000, seed: int = 0) -> Difference:
    """Returns the difference between the AP of two detectors, with its 95 % confidence interval.

    Both are measured on the same samples of the images, so images that are hard for both do not widen the interval.

    Args:
        first: Result of `match_detections` for one detector.
        second: Result of `match_detections` for the other detector, on the same images.
        resamples: Number of samples.
        seed: Seed for the samples.

    Raises:
        UserError: The numbers of images differ, the images have no objects, or there are no samples.

    Example:
        >>> truths = [{"boxes": np.array([[0, 0, 50, 50]]), "classes": np.array([0]), "crowd": np.array([False])}] * 2
        >>> right = {"boxes": np.array([[0, 0, 50, 50]]), "classes": np.array([0]), "scores": np.array([0.9])}
        >>> wrong = {"boxes": np.array([[0, 60, 50, 110]]), "classes": np.array([0]), "scores": np.array([0.8])}
        >>> first = match_detections(truths, [right, right], ["cat"])
        >>> second = match_detections(truths, [wrong, wrong], ["cat"])
        >>> bootstrap_difference(first, second).difference
        1.0
    """
    if first.count != second.count:
        raise UserError(
            f"Both detectors must be measured on the same images. Received: {first.count} and {second.count} images."
        )
    differences = []
    for repeats in [np.ones(first.count, int), *_samples(first.count, resamples, seed)]:
        ap, other = first.ap(repeats), second.ap(repeats)
        differences.append(None if ap is None or other is None else ap - other)
    interval = _percentiles(differences[1:])
    return Difference(float(differences[0] or 0.0), interval)


def _samples(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each image occurs in each sample."""
    if resamples < 1:
        raise UserError(f"The bootstrap needs at least 1 sample. Received: resamples={resamples}.")
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(count, size=count), minlength=count)


def _percentiles(values: list[float | None]) -> Interval:
    known = [value for value in values if value is not None]
    if not known:
        raise UserError("The AP needs images with objects. Received: images without any object that is not a crowd.")
    low, high = np.percentile(known, [2.5, 97.5])
    return Interval(float(low), float(high))


def _annotations(images: Sequence[Boxes], class_names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects or detections in COCO's form."""
    number = 0
    for image, arrays in enumerate(images, start=1):
        boxes, classes = np.asarray(arrays["boxes"], np.float64).reshape(-1, 4), np.asarray(arrays["classes"])
        scores, crowd = arrays.get("scores"), arrays.get("crowd")
        for row in np.flatnonzero(classes >= 0):
            if classes[row] >= len(class_names):
                raise UserError(
                    f"Classes must be in 0..{len(class_names) - 1}, as there are {len(class_names)} class names. "
                    f"Received: class {int(classes[row])} in image {image - 1}."
                )
            top, left, bottom, right = boxes[row].tolist()
            number += 1  # pycocotools takes the number 0 for "not matched"
            yield {
                "id": number,
                "image_id": image,
                "category_id": int(classes[row]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": int(crowd is not None and bool(crowd[row])),
                **({} if scores is None else {"score": float(scores[row])}),
            }


def _matches_of_class(evaluation: Any, index: int, count: int) -> _ClassMatches:
    """Collects what pycocotools has found out about one class, for objects of any area."""
    areas = len(evaluation.params.areaRng)
    thresholds = len(evaluation.params.iouThrs)
    start = index * areas * count
    images = [(image, found) for image, found in enumerate(evaluation.evalImgs[start : start + count]) if found]
    objects = np.zeros(count, int)
    numbers, scores = [np.zeros(0, int)], [np.zeros(0)]
    matched, ignored = [np.zeros((thresholds, 0), bool)], [np.zeros((thresholds, 0), bool)]
    for image, found in images:
        objects[image] = np.count_nonzero(np.asarray(found["gtIgnore"]) == 0)
        best = np.asarray(found["dtScores"], float)[:_MOST_DETECTIONS]
        numbers.append(np.full(len(best), image))
        scores.append(best)
        matched.append(np.asarray(found["dtMatches"])[:, :_MOST_DETECTIONS] > 0)
        ignored.append(np.asarray(found["dtIgnore"])[:, :_MOST_DETECTIONS] > 0)
    # The same stable sorting as in pycocotools, so that equal scores come in the same order.
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    is_match, is_ignored = np.concatenate(matched, axis=1)[:, order], np.concatenate(ignored, axis=1)[:, order]
    return _ClassMatches(
        image=np.concatenate(numbers)[order],
        correct=is_match & ~is_ignored,
        wrong=~is_match & ~is_ignored,
        objects=objects,
    )


def _class_ap(matches: _ClassMatches, repeats: np.ndarray) -> float | None:
    """Returns the AP of one class, as pycocotools would for a list with repeated images, or None without objects.

    A detection in an image that occurs k times counts k times. This gives the same curve as k equal detections: at the
    recalls where the precision is read, it is the maximum over all higher recalls, which lies at the end of the k.
    """
    objects = int(repeats @ matches.objects)
    if not objects:
        return None
    weights = repeats[matches.image]
    right, wrong = np.cumsum(matches.correct * weights, axis=1), np.cumsum(matches.wrong * weights, axis=1)
    precision = right / np.maximum(right + wrong, 1)
    # The highest precision at this or a higher recall.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.concatenate([precision, np.zeros((len(precision), 1))], axis=1)  # for recalls that are not reached
    total = 0.0
    for row, recall in zip(precision, right / objects, strict=True):
        total += row[np.searchsorted(recall, _RECALLS, side="left")].mean()
    return float(total / len(precision))


def _known(value: float) -> float | None:
    """Returns the value, or None for the -1 that stands for "no objects" in pycocotools."""
    return None if value < 0 else float(value)


def _known_mean(values: np.ndarray) -> float | None:
    return None if values.min() < 0 else float(values.mean())
