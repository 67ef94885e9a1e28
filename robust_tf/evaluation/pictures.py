"""What an evaluation looks like: the robustness curve, the reliability plot, the sheet of examples."""

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
    """One classifier and what was measured."""

    subject: Subject
    images: Images
    logits: np.ndarray
    calibration: Calibration
    robustness: list[Robustness]
    corruption_source: str
    corruption_errors: dict[str, list[float]]


def draw_figures(folder: pathlib.Path, measured: Sequence[Measured], *, num_examples: int) -> None:
    """reliability.png; with an attack curve.png; where it moved images examples.png, and examples_compare.png."""
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
    """Robust accuracy over epsilon, the clean accuracy at 0."""
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
    """Positions of images for the sheet of examples whose adversarial images are worth keeping, in many classes.

    Which of them will fall isn't known before the attack, so they are twice as many as will be drawn.

    Args:
        labels: (num_images,) int.
        correct: (num_images,) bool, right without an attack.
    """
    return np.array(_spread([np.flatnonzero(correct).tolist()], labels, count=2 * count), int)


def drawn_examples(images: Images, result: Robustness, *, count: int) -> list[int]:
    """Positions of the images to draw: fallen, resisting and wrong unattacked ones, in many classes."""
    kept = [position for position, number in enumerate(images.ids.tolist()) if number in result.kept]
    fallen = [position for position in kept if result.felled_by[position] not in ("", CLEAN)]
    resisting = [position for position in kept if not result.felled_by[position]]
    wrong = [position for position, name in enumerate(result.felled_by) if name == CLEAN]
    chosen = _spread([fallen, resisting, wrong], images.labels, count=count)
    return [position for group in (fallen, resisting, wrong) for position in group if position in chosen]


def _spread(groups: Sequence[list[int]], labels: np.ndarray, *, count: int) -> list[int]:
    """Up to `count` positions, from each group in turn, of the class that has had the fewest so far."""
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
    """Some images, the adversarial image that each ended with, and the magnified perturbation.

    A third each has fallen to the attack, resists it, and was wrong before, as far as there are any, in many classes.
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
        outcome = "resists" if not by else "wrong unattacked" if at == 0 else f"{by}, {at:.3g}"
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
