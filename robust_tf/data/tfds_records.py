"""Reads a data set of TensorFlow Datasets (TFDS)."""

import dataclasses
import functools
import pathlib
import re
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from robust_tf.data.datasets import dataset_info, is_row
from robust_tf.data.records import LabeledImages, check_class_names
from robust_tf.data.tfds_preparation import builder_of, prepared_builder
from robust_tf.errors import UserError
from robust_tf.sharing import is_sharing, shared

# Names that the splits for testing and validation have in TFDS. The first one that exists is used.
_TEST_SPLITS = ("test", "validation", "val")
_VALIDATION_SPLITS = ("validation", "val")
# Number of images that are read to find the range of float32 pixels.
_IMAGES_LOOKED_AT = 100
# Largest data set whose encoded images the jobs of a process share, and the number of such parts in memory.
_MOST_SHARED_BYTES = 256 * 1024**2
_MOST_SHARED_PARTS = 4


@dataclasses.dataclass(frozen=True)
class TfdsPart:
    """The examples of a TFDS split, in the order of the files. See `Part` for the methods.

    Attributes:
        builder: Builder whose data is prepared.
        split: TFDS split expression, for example "train+validation".
        image_key: Name of the feature that holds the image.
        label_key: Name of the feature that holds the label.
    """

    builder: tfds.core.DatasetBuilder
    split: str
    image_key: str = "image"
    label_key: str = "label"

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return self._num_examples

    @functools.cached_property
    def _num_examples(self) -> int:
        return int(self._read({self.label_key}).cardinality())

    def records(self) -> tf.data.Dataset:
        """Returns a dataset of (index, encoded image, label)."""
        image, label = self.image_key, self.label_key
        # Reads no other features, such as masks and boxes, and leaves the images encoded until an epoch uses them.
        dataset = self._read({image, label}, decoders={image: tfds.decode.SkipDecoding()})
        return dataset.enumerate().map(lambda index, example: (index, example[image], example[label]))

    def shared_records(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns all encoded images, (num_examples,) bytes as objects, and all labels, (num_examples,) int64.

        Returns None unless the jobs of this process share objects, and the data set is small. Reading all files for the
        few examples of a job would otherwise take most of its time.
        """
        if not is_sharing() or not 0 < int(self.builder.info.dataset_size or 0) <= _MOST_SHARED_BYTES:
            return None
        key = ("records", str(self.builder.data_path), self.split, self.image_key, self.label_key)
        return shared(key, self._read_records, most=_MOST_SHARED_PARTS)

    def _read_records(self) -> tuple[np.ndarray, np.ndarray]:
        batches = self.records().map(lambda _, encoded, label: (encoded, label)).batch(4096).as_numpy_iterator()
        encoded, labels = zip(*batches, strict=True)
        return np.concatenate(encoded), np.concatenate(labels)

    def labels(self) -> np.ndarray:
        """Returns all labels, (num_examples,) int64."""
        return self._labels

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        batches = self._read({self.label_key}).map(lambda example: example[self.label_key]).batch(4096)
        return np.concatenate([np.zeros(0, np.int64), *batches.as_numpy_iterator()])

    def name(self, index: int) -> str:
        """Returns the TFDS id of an example, preceded by the name of the original file if the data set stores it."""
        file_keys = [key for key in self.builder.info.features if re.fullmatch(r"(image/)?file_?name", key)]
        dataset = self._read(set(file_keys) or {self.label_key}, read_config=tfds.ReadConfig(add_tfds_id=True))
        example = next(dataset.skip(index).take(1).as_numpy_iterator())
        return " ".join(example[key].decode() for key in [*file_keys, "tfds_id"])

    def _read(self, features: set[str], decoders: dict[str, Any] | None = None, **options: object) -> tf.data.Dataset:
        partial = tfds.decode.PartialDecoding(features, decoders=decoders or {})
        return self.builder.as_dataset(split=self.split, decoders=partial, shuffle_files=False, **options)


def class_names_of(name: str) -> tuple[str, ...]:
    """Returns the names of the classes of a data set of TFDS, which need not be prepared.

    Args:
        name: Key of `DATASETS`, or `tfds:NAME[/config][:version]`.

    Raises:
        UserError: If TFDS has no such data set, or it is not an image classification data set.
    """
    builder = builder_of(name)
    return tuple(builder.info.features[_keys(builder, name)[1]].names)


def open_tfds(name: str, data_dir: epath.Path | pathlib.Path | None) -> LabeledImages:
    """Opens a data set of TFDS, downloading and preparing it first if necessary.

    Args:
        name: Key of `DATASETS`, or `tfds:NAME[/config][:version]`.
        data_dir: Folder of TFDS. None uses TFDS's default.

    Raises:
        UserError: If the data set cannot be prepared, or is not an image classification data set.
    """
    info = dataset_info(name)
    builder = prepared_builder(name, data_dir)
    image_key, label_key = _keys(builder, name)
    train, test, validation = (info.train, info.test, None) if is_row(name) else _splits(builder, label_key, name)

    def part(split: str) -> TfdsPart:
        return TfdsPart(builder, split, image_key, label_key)

    class_names = tuple(builder.info.features[label_key].names)
    check_class_names(class_names, where=name)
    highest_float = _highest_float(part(train), name)
    notes: tuple[str, ...] = ()
    if highest_float == 255.0:
        notes = (f"The float32 images of {name} have pixels from 0 to 255, which are scaled to [0, 1].",)
    own_validation = None
    if validation is not None:
        counts = part(train).num_examples, part(validation).num_examples
        own_validation = np.repeat([False, True], counts)
        train = f"{train}+{validation}"
    return LabeledImages(
        class_names=class_names,
        train=part(train),
        test=part(test),
        validation=own_validation,
        num_bytes=int(builder.info.dataset_size or 0),
        fingerprint=f"{builder.info.full_name} {train} {test} {split_sizes(builder)}",
        trusted=is_row(name),
        highest_float=highest_float,
        notes=notes,
    )


def _highest_float(part: TfdsPart, name: str) -> float | None:
    """Returns the upper end of the range of float32 pixels, 1 or 255, judging by the first images. None for integers.

    Raises:
        UserError: If the pixels of the first images lie in neither range.
    """
    if np.dtype(part.builder.info.features[part.image_key].np_dtype) != np.float32:
        return None
    examples = part._read({part.image_key}).take(_IMAGES_LOOKED_AT).as_numpy_iterator()
    ends = np.array([(image.min(), image.max()) for image in (example[part.image_key] for example in examples)])
    lowest, highest = ends[:, 0].min(), ends[:, 1].max()
    for limit in (1.0, 255.0):
        if lowest >= 0.0 and highest <= limit:  # false for NaN
            return limit
    raise UserError(
        f"float32 images must have pixels in [0, 1] or in [0, 255]. Received: pixels from {lowest:g} to {highest:g} "
        f"in the first {len(ends)} images of {name}. Prepare the data set with pixels in one of these ranges."
    )


def split_sizes(builder: tfds.core.DatasetBuilder) -> list[tuple[str, int, int]]:
    """Returns the name, the number of images and the size of each split.

    If each user has to collect the images, as for Birdsnap, two copies of the same version of a data set may differ.
    The sizes then distinguish them.

    Args:
        builder: Builder whose data is prepared.
    """
    return [(name, info.num_examples, info.num_bytes) for name, info in sorted(builder.info.splits.items())]


def _keys(builder: tfds.core.DatasetBuilder, name: str) -> tuple[str, str]:
    """Returns the names of the features that hold the image and its label."""
    features = dict(builder.info.features.items())
    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    if not isinstance(features.get(image_key), tfds.features.Image) or not isinstance(
        features.get(label_key), tfds.features.ClassLabel
    ):
        raise UserError(
            f"{name} is not an image classification data set: each example needs an image and a class label. "
            f"Received: {', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())}."
        )
    return image_key, label_key


def _splits(builder: tfds.core.DatasetBuilder, label_key: str, name: str) -> tuple[str, str, str | None]:
    """Returns the split expressions of the training, the test and the validation part. The last one may be None."""
    there = [split for split, info in builder.info.splits.items() if info.num_examples]
    if "train" not in there:
        raise UserError(f"A data set needs a split called train. Received: {name} with {', '.join(there)}.")
    # Some challenges publish their test part without labels, which TFDS stores as -1.
    labeled = [split for split in there if split != "train" and _has_labels(builder, split, label_key)]
    test = next((split for split in _TEST_SPLITS if split in labeled), None)
    if test is None:
        return "train[:80%]", "train[80%:]", None  # TFDS shuffles the images when it prepares the data set
    return "train", test, next((split for split in _VALIDATION_SPLITS if split in labeled and split != test), None)


def _has_labels(builder: tfds.core.DatasetBuilder, split: str, label_key: str) -> bool:
    some = min(100, builder.info.splits[split].num_examples)
    return bool((TfdsPart(builder, f"{split}[:{some}]", label_key=label_key).labels() >= 0).any())
