"""Chooses and draws the pictures of an evaluation: robustness curve, reliability plot and sheet of examples."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from robust_tf.attacks.cascade import CLEAN
from robust_tf.attacks.table import title_of
from robust_tf.evaluation.calibration import Calibration
from robust_tf.evaluation.figures import Curve, magnified, save_curve, save_reliability, save_sheet
from robust_tf.evaluation.robustness import Robustness, unattacked
from robust_tf.evaluation.subject import Images, Subject, short_names
from robust_tf.statistics import wilson_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The results for one classifier.

    Attributes:
        subject: Classifier and its task.
        images: Test images.
        logits: Logits of the images, (count, num_classes).
        calibration: Calibration on the images.
        robustness: Result of each attack at each epsilon.
        corruption_source: Source of the corrupted images. Empty if the corruptions were not measured.
        corruption_errors: Errors by corruption, one for each severity.
    """

    subject: Subject
    images: Images
    logits: np.ndarray
    calibration: Calibration
    robustness: list[Robustness]
    corruption_source: str
    corruption_errors: dict[str, list[float]]


def draw_figures(folder: pathlib.Path, measured: Sequence[Measured], *, num_examples: int) -> None:
    """Draws all pictures of an evaluation.

    Writes reliability.png. If there was an attack, also writes curve.png, and if its epsilon was above 0,
    examples.png and, for a second classifier, examples_compare.png.

    Args:
        folder: Folder to write to.
        measured: Results of one or two classifiers.
        num_examples: Number of images on each sheet of examples. 0 draws no sheet.
    """
    labels = short_names([each.subject.name for each in measured])
    bins = {label: each.calibration for label, each in zip(labels, measured, strict=True)}
    save_reliability(folder / "reliability.png", bins)
    attacks = list(dict.fromkeys(result.attack for result in measured[0].robustness))
    if not attacks:
        return
    curves = [curve_of(name, label, each) for label, each in zip(labels, measured, strict=True) for name in attacks]
    title = ", ".join(sorted({f"{len(each.images.ids)} test images of {each.subject.dataset}" for each in measured}))
    norm = measured[0].robustness[0].norm
    save_curve(folder / "curve.png", curves, norm=norm, title=title)
    for filename, each in zip(("examples.png", "examples_compare.png"), measured, strict=False):
        strongest = [result for result in each.robustness if result.attack == attacks[0]][-1]
        if num_examples and strongest.epsilon > 0:
            draw_examples(folder / filename, each, strongest, count=num_examples)


def curve_of(attack: str, label: str, measured: Measured) -> Curve:
    """Returns the curve of the robust accuracy over epsilon. It begins with the clean accuracy at epsilon 0.

    Args:
        attack: Name of the attack.
        label: Name of the classifier in the legend.
        measured: Results of the classifier.
    """
    clean = unattacked(measured.images, measured.logits, name=attack, norm="")
    points = {0.0: clean} | {result.epsilon: result for result in measured.robustness if result.attack == attack}
    hits = [int(result.robust.sum()) for result in points.values()]
    total = len(measured.images.ids)
    return Curve(
        f"{label}, {title_of(attack)}",
        list(points),
        [hit / total for hit in hits],
        [wilson_interval(hit, total) for hit in hits],
    )


def kept_examples(labels: np.ndarray, correct: np.ndarray, *, count: int) -> np.ndarray:
    """Returns the positions of the images whose adversarial images are kept for the sheet of examples.

    The positions cover many classes. Twice as many images are kept as will be drawn, because it is not known in
    advance on which images the attack will succeed.

    Args:
        labels: Labels of the images, (num_images,) int.
        correct: Whether each image is classified correctly without an attack, (num_images,) bool.
        count: Number of images on the sheet.
    """
    return np.array(_spread([np.flatnonzero(correct).tolist()], labels, count=2 * count), int)


def drawn_examples(images: Images, result: Robustness, *, count: int) -> list[int]:
    """Returns the positions of the images on the sheet of examples, which cover many classes and all outcomes.

    Args:
        images: Test images.
        result: Result of the attack.
        count: Number of images on the sheet.

    Returns:
        Positions of images on which the attack succeeded, then of images that resist, then of images that are
        misclassified without an attack.
    """
    kept = [position for position, number in enumerate(images.ids.tolist()) if number in result.kept]
    fallen = [position for position in kept if result.felled_by[position] not in ("", CLEAN)]
    resisting = [position for position in kept if not result.felled_by[position]]
    wrong = [position for position, name in enumerate(result.felled_by) if name == CLEAN]
    chosen = _spread([fallen, resisting, wrong], images.labels, count=count)
    return [position for group in (fallen, resisting, wrong) for position in group if position in chosen]


def _spread(groups: Sequence[list[int]], labels: np.ndarray, *, count: int) -> list[int]:
    """Chooses up to `count` positions from the groups in turn, each time from the class chosen least often so far."""
    left = [list(group) for group in groups]
    chosen: list[int] = []
    seen: collections.Counter[int] = collections.Counter()
    while any(left) and len(chosen) < count:
        for group in left:
            if group and len(chosen) < count:
                position = min(group, key=lambda position: (seen[int(labels[position])], position))
                group.remove(position)
                chosen.append(position)
                seen[int(labels[position])] += 1
    return chosen


def draw_examples(path: pathlib.Path, measured: Measured, result: Robustness, *, count: int) -> None:
    """Draws the sheet of examples: images, their last adversarial images, and the magnified perturbations.

    If there are enough of each kind, the attack succeeded on a third of the images, another third resists, and the last
    third is misclassified without an attack.

    Args:
        path: PNG file to write.
        measured: Results of the classifier.
        result: Result of the attack to show.
        count: Number of images on the sheet.
    """
    drawn = drawn_examples(measured.images, result, count=count)
    if not drawn:
        return
    names, images = measured.subject.task.class_names, measured.images
    clean = measured.logits.argmax(axis=1)
    rows: list[list[np.ndarray]] = [[], [], []]
    captions: list[list[str]] = [[], [], []]
    for position in drawn:
        number = int(images.ids[position])
        pixels = images.pixels[position]
        images_adv = result.kept.get(number, pixels)
        perturbation = images_adv - pixels
        by, at = result.felled_by[position], result.felled_at[position]
        outcome = "resists" if not by else "wrong without attack" if at == 0 else f"{by}, {at:.3g}"
        largest = np.abs(perturbation).max()
        factor = f"x {0.5 / largest:.3g}" if largest else "none"
        rows[0].append(pixels)
        captions[0].append(f"{names[images.labels[position]]}\npredicted {names[clean[position]]}")
        rows[1].append(images_adv)
        captions[1].append(f"predicted {names[result.predictions[position]]}\n{outcome}")
        rows[2].append(magnified(perturbation))
        captions[2].append(factor)
    save_sheet(
        path,
        rows,
        captions,
        row_names=("clean", "adversarial", "perturbation"),
        title=f"{title_of(result.attack)}, {result.norm} epsilon {result.epsilon:.4g}",
    )
