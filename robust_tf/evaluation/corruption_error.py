"""The error under the common corruptions, on images that we corrupt or on TFDS's corrupted test sets."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from robust_tf.config.evaluation import CorruptionSource
from robust_tf.errors import UserError
from robust_tf.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from robust_tf.evaluation.predicting import Predict
from robust_tf.evaluation.subject import Images, Subject, chosen_images, chosen_positions


class CorruptedSet(NamedTuple):
    """A corrupted test set of TFDS, one builder config for each corruption and severity.

    Attributes:
        name, version: in TFDS.
        split: whose images they are made from.
        spellings: of the corruptions that TFDS calls otherwise.
        cropped: whether the images have the size of the classifier's input already.
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
# name, severity -> images with labels
Corrupted = Callable[[str, int], Images]


def corrupted_images(
    subject: Subject, images: Images, *, source: CorruptionSource, data_dir: str, seed: int
) -> tuple[str, Corrupted]:
    """Where corrupted images come from, and the function that gives them by corruption and severity.

    Args:
        images: the clean ones that are corrupted, where we do it ourselves.
        source: "tfds" takes TFDS's corrupted test set, "computed" does not, "auto" does where it is prepared, the
            data set has one, and no classes were left out.
        data_dir: TFDS folder; "" takes TFDS's default.
        seed: of the draws. TFDS's sets have an order of their own: as many of their images are drawn as `images` has.

    Raises:
        UserError: "tfds" for a data set without a prepared corrupted set.
    """
    builders = None
    if source != "computed" and subject.dataset in CORRUPTED_SETS and not subject.classes:
        builders = _prepared_builders(subject.dataset, data_dir)
    if builders is None:
        if source == "tfds":
            raise UserError(
                "--corruption_source=tfds needs a corrupted test set that TFDS has prepared, for one of "
                f"{', '.join(CORRUPTED_SETS)} with all classes. Received: {subject.dataset}, classes "
                f"{list(subject.classes) or 'all'}. Run `tfds build cifar10_corrupted`, or use "
                "--corruption_source=computed."
            )
        return "computed", lambda name, severity: dataclasses.replace(
            images, pixels=corrupt(images.pixels, name, severity, ids=images.ids.tolist(), seed=seed)
        )
    corrupted_set, prepared = CORRUPTED_SETS[subject.dataset], builders

    def read(name: str, severity: int) -> Images:
        return _drawn(prepared[name, severity], corrupted_set, subject, count=len(images.ids), seed=seed)

    return f"{corrupted_set.name}:{corrupted_set.version} (TFDS)", read


def error_of(predict: Predict, images: Images) -> float:
    """Share of wrong predictions."""
    return float((predict(images.pixels).argmax(axis=1) != images.labels).mean())


def mean_corruption_error(errors: dict[str, list[float]]) -> float:
    """Mean over the corruptions of their mean error over the severities, in [0, 1]; relative to no baseline."""
    return float(np.mean([np.mean(by_severity) for by_severity in errors.values()]))


def relative_corruption_error(errors: dict[str, list[float]], baseline: dict[str, list[float]]) -> float | None:
    """mCE: the mean over the corruptions of error / error of the baseline, 1.0 where they are alike.

    None where the baseline makes no error under one of the corruptions.

    Source: Hendrycks and Dietterich 2019, arXiv 1903.12261, section 4.1, whose baseline is AlexNet.
    """
    if not all(sum(baseline[name]) for name in errors):
        return None
    return float(np.mean([sum(errors[name]) / sum(baseline[name]) for name in errors]))


def _prepared_builders(dataset: str, data_dir: str) -> dict[tuple[str, int], tfds.core.DatasetBuilder] | None:
    """All 75, or None when one is not prepared."""
    corrupted_set = CORRUPTED_SETS[dataset]
    builders = {}
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            config = f"{corrupted_set.spellings.get(name, name)}_{severity}"
            builder = tfds.builder(f"{corrupted_set.name}/{config}:{corrupted_set.version}", data_dir=data_dir or None)
            if not builder.is_prepared():
                return None
            builders[name, severity] = builder
    return builders


def _drawn(
    builder: tfds.core.DatasetBuilder, corrupted_set: CorruptedSet, subject: Subject, *, count: int, seed: int
) -> Images:
    """`count` images of one corrupted set, prepared as the clean ones are."""
    decoders = tfds.decode.PartialDecoding({"image", "label"}, decoders={"image": tfds.decode.SkipDecoding()})
    dataset = builder.as_dataset(split=corrupted_set.split, decoders=decoders, shuffle_files=False)
    records = dataset.enumerate().map(lambda index, example: (index, example["image"], example["label"]))
    task = subject.task
    return chosen_images(
        records,
        chosen_positions(int(dataset.cardinality()), count, seed),
        dataclasses.replace(
            task.preprocessing, resize_size=task.image_size if corrupted_set.cropped else task.resize_size
        ).for_evaluation,
    )
