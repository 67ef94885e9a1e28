"""The files of a job from which its report is made. The job keeps them, so the report can be made at any time."""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.evaluation.example_choice import Example
from robust_tf.evaluation.figures import magnified
from robust_tf.evaluation.outcomes import Outcomes, read_outcomes
from robust_tf.files import replaced_atomically
from robust_tf.results import FILE_NAME, JobResults

FIGURES = "figures"
_HISTORY = "history.csv"
_EXAMPLES = pathlib.Path(FIGURES) / "examples"
_EXAMPLE_COLUMNS = ("file", "kind", "label", "prediction", "prediction_under_attack", "magnified")
# Limits for the longer side of a picture, in pixels.
_SMALLEST, _LARGEST = 96, 160


@dataclasses.dataclass(frozen=True)
class ExamplePicture:
    """A picture on disk: a test image and, if it was attacked, the adversarial image and the perturbation beside it.

    Attributes:
        path: Path of the PNG file.
        kind: Kind of the example, "resists", "falls" or "wrong"; see `Example`.
        label: True class.
        prediction: Predicted class of the clean image.
        prediction_adv: Predicted class of the adversarial image.
        factor: Factor by which the perturbation is magnified; 0 if there is none.
    """

    path: pathlib.Path
    kind: str
    label: int
    prediction: int
    prediction_adv: int
    factor: float


@dataclasses.dataclass(frozen=True)
class FinishedJob:
    """A finished job, read from its workdir.

    Attributes:
        workdir: Folder of the job.
        config: Flags of the job.
        results: Content of results.json.
        outcomes: Predictions for each test image.
        history: Metrics of each epoch by name; empty if no epochs were run.
        examples: Pictures of some test images; empty if none were kept.
    """

    workdir: pathlib.Path
    config: JobConfig
    results: JobResults
    outcomes: Outcomes
    history: tuple[dict[str, float], ...]
    examples: tuple[ExamplePicture, ...]

    @property
    def attacked(self) -> bool:
        """Whether the final evaluation attacked the classifier."""
        return self.outcomes.predictions_adv is not None


def read_finished_job(workdir: pathlib.Path) -> FinishedJob | None:
    """Returns the job of a workdir, or None if it has no results or, from an older version, no predictions.

    Raises:
        UserError: A file is missing or damaged.
        OSError: A file cannot be read.
        ValueError: A table is damaged.
    """
    outcomes, results = read_outcomes(workdir), JobResults.read(workdir / FILE_NAME)
    if outcomes is None or results is None:
        return None
    results.check_finished(workdir / FILE_NAME)
    return FinishedJob(
        workdir=workdir,
        config=read_flag_file(workdir / "flags.cfg"),
        results=results,
        outcomes=outcomes,
        history=_read_history(workdir),
        examples=_read_examples(workdir),
    )


def write_history(workdir: pathlib.Path, history: Sequence[dict[str, float]]) -> None:
    """Writes history.csv, with a row for each epoch and a column for each metric. Without epochs it writes nothing."""
    if not history:
        return
    names = list(dict.fromkeys(name for logs in history for name in logs))
    with replaced_atomically(workdir / _HISTORY) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["epoch", *names])
        for epoch, logs in enumerate(history, start=1):
            writer.writerow([epoch, *(logs.get(name, "") for name in names)])


def _read_history(workdir: pathlib.Path) -> tuple[dict[str, float], ...]:
    if not (workdir / _HISTORY).is_file():
        return ()
    with (workdir / _HISTORY).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return tuple({name: float(value) for name, value in row.items() if value and name != "epoch"} for row in rows)


def write_examples(workdir: pathlib.Path, examples: Sequence[Example]) -> None:
    """Writes a PNG file for each example, and a table of all examples, into figures/examples/."""
    folder = workdir / _EXAMPLES
    rows = []
    for number, each in enumerate(examples, start=1):
        perturbation = each.image_adv - each.image
        largest = float(np.abs(perturbation).max())
        pictures = [each.image]
        if largest > 0:
            pictures += [each.image_adv, magnified(perturbation)]
        name = f"{number:02d}_{each.kind}.png"
        with replaced_atomically(folder / name) as temporary:
            _side_by_side(pictures).save(temporary)
        factor = round(0.5 / largest, 1) if largest else 0.0
        rows.append([name, each.kind, each.label, each.prediction, each.prediction_adv, factor])
    if not rows:
        return
    with replaced_atomically(folder / "examples.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([_EXAMPLE_COLUMNS, *rows])


def _read_examples(workdir: pathlib.Path) -> tuple[ExamplePicture, ...]:
    folder = workdir / _EXAMPLES
    if not (folder / "examples.csv").is_file():
        return ()
    with (folder / "examples.csv").open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    return tuple(
        ExamplePicture(folder / name, kind, int(label), int(prediction), int(prediction_adv), float(factor))
        for name, kind, label, prediction, prediction_adv, factor in rows
        if (folder / name).is_file()
    )


def _side_by_side(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Returns pictures (height, width, 3) in [0, 1] in one row. Small ones are enlarged by an integer factor."""
    tiles = []
    for pixels in pictures:
        tile = Image.fromarray(np.round(255 * np.clip(pixels, 0.0, 1.0)).astype(np.uint8))
        side = max(tile.size)
        if side < _SMALLEST:
            factor = -(-_SMALLEST // side)
            tile = tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
        elif side > _LARGEST:
            tile.thumbnail((_LARGEST, _LARGEST))
        tiles.append(tile)
    gap = 4
    row = Image.new("RGB", (sum(tile.width + gap for tile in tiles) - gap, tiles[0].height), "white")
    for position, tile in enumerate(tiles):
        row.paste(tile, (position * (tile.width + gap), 0))
    return row
