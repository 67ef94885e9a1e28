"""Measures the error under the common corruptions, on computed images or on the corrupted test sets of TFDS."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from robust_tf.config.evaluation import CorruptionSource
from robust_tf.data.tfds_preparation import no_folders_left_behind
from robust_tf.errors import UserError
from robust_tf.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from robust_tf.evaluation.prediction import Predict
from robust_tf.evaluation.subject import Images, Subject, chosen_images, chosen_positions


class CorruptedSet(NamedTuple):
    """A corrupted test set of TFDS, which has one builder config for each corruption and severity.

    Attributes:
        name: Name in TFDS.
        version: Version in TFDS.
        split: Split that holds the images.
        cropped: Whether the images already have the size of the classifier's input.
        spellings: Names in TFDS of the corruptions that have another name there.
    """

    name: str
    version: str
    split: str
    cropped: bool
    spellings: dict[str, str]


CORRUPTED_SETS = {
    "cifar10": CorruptedSet(
        "cifar10_corrupted",
        "1.0.0",
        "test",
        False,
        {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"},
    ),
    "imagenet2012": CorruptedSet("imagenet2012_corrupted", "3.1.0", "validation", True, {}),
}
# A function from the name of a corruption and its severity to images with labels.
Corrupted = Callable[[str, int], Images]


def corrupted_images(
    subject: Subject, images: Images, *, source: CorruptionSource, data_dir: str, seed: int
) -> tuple[str, Corrupted]:
    """Returns the source of corrupted images, and a function that gives the images of a corruption and a severity.

    Args:
        subject: Classifier and its task.
        images: Clean images to corrupt, if the corrupted images are computed.
        source: "computed" to corrupt `images`, "tfds" to use the corrupted test set of TFDS, or "auto" to use that set
            if it exists and is prepared, and if the classifier has all its classes.
        data_dir: Folder of TFDS. "" uses TFDS's default.
        seed: Seed for the corruptions. With TFDS's set, it is the seed for drawing as many images as `images` has. They
            are different images, because the order of that set is different.

    Raises:
        UserError: If `source` is "tfds" and there is no prepared corrupted test set.
    """
    builders = None
    if source != "computed" and subject.dataset in CORRUPTED_SETS and not subject.classes:
        builders = _prepared_builders(subject.dataset, data_dir)
    if builders is None:
        if source == "tfds":
            raise UserError(
                "--corruption_source=tfds needs a corrupted test set that is prepared in TFDS, and all classes of "
                f"{' or '.join(CORRUPTED_SETS)}. Received: {subject.dataset}, classes "
                f"{list(subject.classes) or 'all'}. Prepare the set, for example with `tfds build cifar10_corrupted`, "
                "or use --corruption_source=computed."
            )
        return "computed", lambda name, severity: dataclasses.replace(
            images, pixels=corrupt(images.pixels, name, severity, ids=images.ids.tolist(), seed=seed)
        )
    corrupted_set, prepared = CORRUPTED_SETS[subject.dataset], builders

    def read(name: str, severity: int) -> Images:
        return _drawn(prepared[name, severity], corrupted_set, subject, count=len(images.ids), seed=seed)

    return f"{corrupted_set.name}:{corrupted_set.version} (TFDS)", read


def error_of(predict: Predict, images: Images) -> float:
    """Returns the share of images that are misclassified, in [0, 1].

    Args:
        predict: Function from images to logits.
        images: Images with their labels.
    """
    return float((predict(images.pixels).argmax(axis=1) != images.labels).mean())


def mean_corruption_error(errors: dict[str, list[float]]) -> float:
    """Returns the mean error over all corruptions and severities, in [0, 1]. It is not relative to a baseline.

    Args:
        errors: Errors of each corruption, one for each severity.
    """
    return float(np.mean([np.mean(by_severity) for by_severity in errors.values()]))


def relative_corruption_error(errors: dict[str, list[float]], baseline: dict[str, list[float]]) -> float | None:
    """Returns the mCE: the mean over the corruptions of the error divided by the error of a baseline.

    Args:
        errors: Errors of each corruption, one for each severity.
        baseline: Errors of the baseline, in the same form.

    Returns:
        The mCE, which is 1.0 if the errors are equal. None if the baseline's error is zero for one of the corruptions.

    Source: Hendrycks and Dietterich 2019, arXiv 1903.12261, section 4.1, where the baseline is AlexNet.
    """
    if not all(sum(baseline[name]) for name in errors):
        return None
    return float(np.mean([sum(errors[name]) / sum(baseline[name]) for name in errors]))


def _prepared_builders(dataset: str, data_dir: str) -> dict[tuple[str, int], tfds.core.DatasetBuilder] | None:
    """Returns the builders of all 75 pairs of a corruption and a severity, or None if one of them is not prepared."""
    corrupted_set = CORRUPTED_SETS[dataset]
    builders = {}
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            config = f"{corrupted_set.spellings.get(name, name)}_{severity}"
            reference = f"{corrupted_set.name}/{config}:{corrupted_set.version}"
            with no_folders_left_behind():
                builder = tfds.builder(reference, data_dir=data_dir or None)
            if not builder.is_prepared():
                return None
            builders[name, severity] = builder
    return builders


def _drawn(
    builder: tfds.core.DatasetBuilder, corrupted_set: CorruptedSet, subject: Subject, *, count: int, seed: int
) -> Images:
    """Draws `count` images of one corrupted set, preprocessed like the clean images."""
    decoders = tfds.decode.PartialDecoding({"image", "label"}, decoders={"image": tfds.decode.SkipDecoding()})
    dataset = builder.as_dataset(split=corrupted_set.split, decoders=decoders, shuffle_files=False)
    records = dataset.enumerate().map(lambda index, example: (index, example["image"], example["label"]))
    task = subject.task
    return chosen_images(
        records,
        chosen_positions(int(dataset.cardinality()), count, seed),
        dataclasses.replace(
            task.class_preprocessing, resize_size=task.image_size if corrupted_set.cropped else task.resize_size
        ).for_evaluation,
    )
