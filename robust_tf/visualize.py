"""Draws what a classifier looks at, beside another one.

    python -m robust_tf.visualize --classifier=robust.keras --compare=standard.keras --kind=gradients --output=x.png

--kind=gradients: the gradient of the loss in each pixel; --kind=inversion: noise that was moved until it has the
features of the image; --kind=perturbations: adversarial examples of a large epsilon. Those of a robust classifier show
the objects.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

from absl import logging

from robust_tf.config.attack import AttackConfig, Norm
from robust_tf.config.checks import check_choices
from robust_tf.environment import set_tensorflow_defaults
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import flag, parse_flags

set_tensorflow_defaults()

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from robust_tf.console import console  # noqa: E402
from robust_tf.evaluation.figures import magnified, save_sheet  # noqa: E402
from robust_tf.evaluation.inside import (  # noqa: E402
    edge_alignment,
    gradient_pictures,
    input_gradients,
    inverted,
    is_grey,
    large_perturbations,
)
from robust_tf.evaluation.predicting import batched_logits  # noqa: E402
from robust_tf.evaluation.subject import Images, Subject, draw_images, load_subject, short_names  # noqa: E402
from robust_tf.files import check_output_file, check_output_folder  # noqa: E402


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """The flags of this program."""

    classifier: str = flag("", "Path of a .keras file, or name of a published model.")
    compare: str = flag("", "Another classifier of the same classes, drawn below.")
    kind: Literal["gradients", "inversion", "perturbations"] = flag("gradients", "What to draw.")
    output: str = flag("", "PNG file to write. Default: <kind>.png beside the classifier file.")
    tensorboard: str = flag("", "Also write the picture into this TensorBoard folder.")
    dataset: str = flag("", "Data set. Default: that of the results.json beside the classifier.")
    classes: tuple[int, ...] = flag((), "Labels to keep. Default: those of the same results.json, else all.")
    data_dir: str = flag("", "TFDS folder. Default: TFDS's own.")
    num_images: int = flag(8, "Test images to draw.")
    seed: int = flag(0, "Of the choice of images and of the noise.")
    steps: int | None = flag(None, "Steps of inversion (default 1000) or perturbations (default 60).")
    norm: Norm = flag("l2", "perturbations: norm.")
    epsilon: float | None = flag(
        None, "perturbations: radius in [0, 1] pixel units. Default: 5 times what the classifier was trained for."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.classifier:
            raise UserError("--classifier is needed: a .keras file or the name of a published model. Received: none.")
        if self.num_images < 1 or self.seed < 0 or (self.steps is not None and self.steps < 1):
            raise UserError(
                "--num_images and --steps must be 1 or more, --seed 0 or more. Received: "
                f"{self.num_images}, {self.steps}, {self.seed}."
            )

    @property
    def picture(self) -> pathlib.Path:
        """Where the picture goes."""
        beside = pathlib.Path(self.classifier)
        folder = beside.parent if beside.suffix == ".keras" else pathlib.Path()
        return pathlib.Path(self.output) if self.output else folder / f"{self.kind}.png"


class Row(NamedTuple):
    """One row of the picture: its name, (count, height, width, 3) pictures in [0, 1], and a caption for each."""

    name: str
    pictures: np.ndarray
    captions: list[str]


def main(argv: Sequence[str]) -> None:
    """The program: flags in, one picture out."""
    logging.set_verbosity(logging.ERROR)
    config, rest = parse_flags(VisualizeConfig, argv, __doc__ or "")
    if rest:
        raise UserError(f"Everything is a flag, --name=value. Received: {rest[0]!r}.")
    run(config)


def run(config: VisualizeConfig) -> None:
    """Draws and writes the picture."""
    check_output_file(config.picture, "--output")
    if config.tensorboard:
        check_output_folder(pathlib.Path(config.tensorboard), "--tensorboard")
    subjects = load_subjects(config)
    images = draw_images(subjects[0].task, count=config.num_images, seed=config.seed)
    class_names = subjects[0].task.class_names
    rows = [Row("image", images.pixels, [class_names[label] for label in images.labels])]
    draw = {"gradients": gradient_rows, "inversion": inversion_rows, "perturbations": perturbation_rows}[config.kind]
    for name, subject in zip(short_names([subject.name for subject in subjects]), subjects, strict=True):
        rows += draw(config, name, subject, images)
    save_sheet(
        config.picture,
        [list(row.pictures) for row in rows],
        [row.captions for row in rows],
        row_names=[row.name for row in rows],
        title=config.kind,
    )
    if config.tensorboard:
        picture = tf.io.decode_png(config.picture.read_bytes(), channels=3)
        with tf.summary.create_file_writer(config.tensorboard).as_default():
            tf.summary.image(config.kind, picture[None], step=0)
    console.print(f"Wrote {config.picture}.")


def load_subjects(config: VisualizeConfig) -> list[Subject]:
    """The classifier and the one to compare with, which must be of the same task."""
    subject = load_subject(config.classifier, dataset=config.dataset, classes=config.classes, data_dir=config.data_dir)
    if not config.compare:
        return [subject]
    other = load_subject(config.compare, dataset=subject.dataset, classes=subject.classes, data_dir=config.data_dir)
    if other.task.image_size != subject.task.image_size:
        raise UserError(
            "The two classifiers must take images of one size. Received: "
            f"{subject.task.image_size} and {other.task.image_size} pixels."
        )
    return [subject, other]


def gradient_rows(config: VisualizeConfig, name: str, subject: Subject, images: Images) -> list[Row]:
    """The input gradients; says how well they lie on the edges."""
    gradients = input_gradients(subject.classifier, images.pixels, images.labels)
    correlation = edge_alignment(gradients, images.pixels)
    console.print(f"{name}: the gradients' correlation with the edges in the images is {correlation:.2f}.")
    pictures = gradient_pictures(gradients, images.pixels)
    return [Row(name, pictures, [""] * len(pictures))]


def inversion_rows(config: VisualizeConfig, name: str, subject: Subject, images: Images) -> list[Row]:
    """Noise with the features of the images."""
    rng = np.random.default_rng(config.seed)
    noise = rng.standard_normal(images.pixels.shape)
    if is_grey(images.pixels):
        noise[:] = noise[..., :1]
    noise = np.clip(0.5 + 0.1 * noise, 0.0, 1.0).astype(np.float32)
    steps = {} if config.steps is None else {"steps": config.steps}
    pictures, left = inverted(subject.classifier, images.pixels, noise, **steps)
    return [Row(name, pictures, [f"distance {value:.2f}" for value in left])]


def perturbation_rows(config: VisualizeConfig, name: str, subject: Subject, images: Images) -> list[Row]:
    """Adversarial examples, and what was added to the images."""
    epsilon = config.epsilon if config.epsilon is not None else 5 * (subject.epsilon or 0.0)
    if not epsilon > 0:
        raise UserError(f"--kind=perturbations needs --epsilon for {subject.name}. Received: --epsilon={epsilon:g}.")
    steps = config.steps or 60
    attack = AttackConfig(norm=config.norm, epsilon=epsilon, step_size=2.5 * epsilon / steps, steps=steps)
    images_adv = large_perturbations(subject.classifier, images.pixels, images.labels, attack=attack)
    predicted = batched_logits(subject.classifier, batch_size=64)(images_adv).argmax(axis=1)
    names = subject.task.class_names
    perturbations = np.stack([magnified(difference) for difference in images_adv - images.pixels])
    return [
        Row(f"{name}\n{config.norm} {epsilon:g}", images_adv, [names[label] for label in predicted]),
        Row("perturbation", perturbations, [""] * len(perturbations)),
    ]


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv)
