"""What an evaluation looks like: the robustness curve, the reliability plot, the sheet of examples."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from robust_tf.evaluation.attacking import Robustness, unattacked
from robust_tf.evaluation.calibration import Calibration
from robust_tf.evaluation.figures import Curve, magnified, save_curve, save_reliability, save_sheet
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
        f"{label}, {attack}", list(points), [hit / total for hit in hits], [wilson_interval(hit, total) for hit in hits]
    )


def draw_examples(path: pathlib.Path, measured: Measured, result: Robustness, *, count: int) -> None:
    """The first images, the adversarial image that each ended with, and the magnified perturbation."""
    names, images = measured.subject.task.class_names, measured.images
    clean = measured.logits.argmax(axis=1)
    rows: list[list[np.ndarray]] = [[], [], []]
    captions: list[list[str]] = [[], [], []]
    for position, number in enumerate(images.ids[:count].tolist()):
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
        title=f"{result.attack}, {result.norm} epsilon {result.epsilon:.4g}",
    )
