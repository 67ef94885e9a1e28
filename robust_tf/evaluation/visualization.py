"""Draws the picture of `robust_tf.visualize`, from the flags to the file."""

import pathlib
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from robust_tf.config.attack import AttackConfig
from robust_tf.config.visualization import VisualizeConfig
from robust_tf.console import console
from robust_tf.errors import UserError
from robust_tf.evaluation.figures import magnified, save_sheet
from robust_tf.evaluation.interpretability import (
    edge_alignment,
    gradient_pictures,
    input_gradients,
    invert_features,
    is_gray,
    large_perturbations,
)
from robust_tf.evaluation.prediction import batched_logits
from robust_tf.evaluation.subject import Images, Subject, draw_images, load_subject, short_names
from robust_tf.files import check_output_file, check_output_folder


class Row(NamedTuple):
    """One row of the picture.

    Attributes:
        name: Text to the left of the row.
        pictures: Pictures, (count, height, width, 3) float32 in [0, 1].
        captions: Text above each picture.
    """

    name: str
    pictures: np.ndarray
    captions: list[str]


def run_visualization(config: VisualizeConfig) -> None:
    """Draws the picture and writes it.

    Raises:
        UserError: The file or the folder cannot be written, or a classifier or its data cannot be loaded.
    """
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
    """Loads the classifier and the one to compare it with, which must have the same classes and image size."""
    subject = load_subject(config.classifier, dataset=config.dataset, classes=config.classes, data_dir=config.data_dir)
    if not config.compare:
        return [subject]
    other = load_subject(config.compare, dataset=subject.dataset, classes=subject.classes, data_dir=config.data_dir)
    if other.task.image_size != subject.task.image_size:
        raise UserError(
            "The two classifiers must take images of the same size. Received: "
            f"{subject.task.image_size} and {other.task.image_size} pixels."
        )
    return [subject, other]


def gradient_rows(_config: VisualizeConfig, name: str, subject: Subject, images: Images) -> list[Row]:
    """Draws the input gradients, and prints how well they follow the edges in the images."""
    gradients = input_gradients(subject.classifier, images.pixels, images.labels)
    correlation = edge_alignment(gradients, images.pixels)
    console.print(f"{name}: the gradients' correlation with the edges in the images is {correlation:.2f}.")
    pictures = gradient_pictures(gradients, images.pixels)
    return [Row(name, pictures, [""] * len(pictures))]


def inversion_rows(config: VisualizeConfig, name: str, subject: Subject, images: Images) -> list[Row]:
    """Draws noise that has been optimized to have the features of the images."""
    rng = np.random.default_rng(config.seed)
    noise = rng.standard_normal(images.pixels.shape)
    if is_gray(images.pixels):
        noise[:] = noise[..., :1]
    noise = np.clip(0.5 + 0.1 * noise, 0.0, 1.0).astype(np.float32)
    steps = {} if config.steps is None else {"steps": config.steps}
    pictures, left = invert_features(subject.classifier, images.pixels, noise, **steps)
    return [Row(name, pictures, [f"distance {value:.2f}" for value in left])]


def perturbation_rows(config: VisualizeConfig, name: str, subject: Subject, images: Images) -> list[Row]:
    """Draws adversarial examples with a large epsilon, and below them what was added to the images."""
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
