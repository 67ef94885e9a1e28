"""Reads a data set with boxes from TensorFlow Datasets (TFDS)."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.features import bounding_boxes_utils

from robust_tf.data.boxes.records import BOX_NUMBERS, LabeledBoxes
from robust_tf.data.records import check_class_names
from robust_tf.data.tfds_preparation import prepared_builder
from robust_tf.data.tfds_records import TfdsPart, split_sizes
from robust_tf.data.transforms import Picture
from robust_tf.errors import UserError

# Names that the splits for testing and validation have in TFDS. The first one that exists and is labeled is used.
_TEST_SPLITS = ("test", "validation", "val")
_VALIDATION_SPLITS = ("validation", "val")
# Number of images that are read to find out whether a split has boxes. Some images have none.
_IMAGES_LOOKED_AT = 100
# Features that mark a box that counts neither as a hit nor as a miss.
_CROWD_KEYS = ("is_crowd", "is_difficult")
# TFDS divides VOC's coordinates by the size of the image as they are, although VOC numbers pixels from 1.
_PIXELS_FROM_ONE = ("voc",)


@dataclasses.dataclass(frozen=True)
class TfdsBoxPart(TfdsPart):
    """The images of a TFDS split with their boxes, in the order of the files. See `Part` for the methods.

    Boxes without area are left out: COCO's training part has two. `label_key` names the feature that holds the boxes.
    """

    def records(self) -> tf.data.Dataset:
        """Returns a dataset of (index, encoded image, label), the label as a string."""
        image, objects = self.image_key, self.label_key
        keys = self.builder.info.features[objects].feature
        wanted = {key for key in ("bbox", "label", *_CROWD_KEYS) if key in keys}
        decoding = tfds.decode.PartialDecoding(
            {image: True, objects: wanted}, decoders={image: tfds.decode.SkipDecoding()}
        )
        dataset = self.builder.as_dataset(split=self.split, decoders=decoding, shuffle_files=False)
        return dataset.enumerate().map(
            lambda index, example: (index, example[image], self._label(example[image], example[objects])),
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def labels(self) -> np.ndarray:
        """Returns zeros, (num_examples,) int64, because an image has no class here."""
        return np.zeros(self.num_examples, np.int64)

    def boxes(self) -> Iterator[np.ndarray]:
        """Yields the boxes of each image, (boxes, 6) float32, in the order of the examples. Reads the whole part."""
        for label in self.records().map(lambda _, __, label: label).as_numpy_iterator():
            yield np.frombuffer(label, "<f4").reshape(-1, BOX_NUMBERS)

    def most_boxes(self) -> int:
        """Returns the largest number of boxes in an image. Reads the whole part."""
        return max(map(len, self.boxes()), default=0)

    def has_boxes(self) -> bool:
        """Returns whether one of the first images has a box."""
        partial = tfds.decode.PartialDecoding({self.label_key: {"bbox"}})
        dataset = self.builder.as_dataset(split=self.split, decoders=partial, shuffle_files=False)
        return any(
            len(example[self.label_key]["bbox"]) for example in dataset.take(_IMAGES_LOOKED_AT).as_numpy_iterator()
        )

    def _label(self, encoded: tf.Tensor, objects: dict[str, tf.Tensor]) -> tf.Tensor:
        picture = Picture(encoded)
        size = tf.cast(tf.stack([picture.height, picture.width] * 2), tf.float32)
        edges = objects["bbox"] * size
        if self.builder.name in _PIXELS_FROM_ONE:
            edges -= (1.0, 1.0, 0.0, 0.0)
        edges = tf.clip_by_value(edges, 0.0, size)
        crowd = tf.zeros(tf.shape(edges)[:1], tf.bool)
        for key in _CROWD_KEYS:
            if key in objects:
                crowd |= objects[key]
        columns = [tf.cast(column, tf.float32)[:, None] for column in (objects["label"], crowd)]
        rows = tf.concat([edges, *columns], axis=1)
        rows = tf.boolean_mask(rows, (edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1]))
        return _to_bytes(rows)


def _to_bytes(rows: tf.Tensor) -> tf.Tensor:
    """Returns the bytes of a float32 array as a scalar string."""
    # Each byte becomes a string of one byte. TensorFlow has no operation that does the opposite of `decode_raw`.
    table = tf.constant([bytes([value]) for value in range(256)])
    numbers = tf.cast(tf.reshape(tf.bitcast(rows, tf.uint8), [-1]), tf.int32)
    return tf.strings.reduce_join(tf.gather(table, numbers))


def open_tfds_boxes(name: str, data_dir: epath.Path | pathlib.Path | None) -> LabeledBoxes:
    """Opens a data set of TFDS that has boxes, downloading and preparing it first if necessary.

    Each example needs an image and a sequence of objects with a `bbox` and a class `label`. Objects that are marked as
    `is_crowd` or `is_difficult` become crowd boxes. The test part is the first of the splits test and validation that
    has boxes. If both have boxes, the validation split is the validation part, within the training part. Without
    either, the last fifth of the training split becomes the test part.

    Args:
        name: `tfds:NAME[/config][:version]`.
        data_dir: Folder of TFDS. None uses TFDS's default.

    Raises:
        UserError: If the data set cannot be prepared, or has no boxes.
    """
    builder = prepared_builder(name, data_dir)
    image_key, objects_key = _keys(builder, name)

    def part(split: str) -> TfdsBoxPart:
        return TfdsBoxPart(builder, split, image_key, objects_key)

    there = [split for split, info in builder.info.splits.items() if info.num_examples]
    labeled = [split for split in there if part(split).has_boxes()]
    if "train" not in labeled:
        raise UserError(
            f"A detection data set needs a split called train that has boxes. Received: {name} with "
            f"{', '.join(there) or 'no split'}, of which {', '.join(labeled) or 'none'} has boxes."
        )
    train, test, validation = split_names(labeled)
    own_validation = None
    if validation is not None:
        own_validation = np.repeat([False, True], [part(train).num_examples, part(validation).num_examples])
        train = f"{train}+{validation}"
    class_names = tuple(builder.info.features[objects_key].feature["label"].names)
    check_class_names(class_names, where=name)
    return LabeledBoxes(
        class_names=class_names,
        train=part(train),
        test=part(test),
        validation=own_validation,
        num_bytes=int(builder.info.dataset_size or 0),
        fingerprint=f"{builder.info.full_name} {train} {test} {split_sizes(builder)} boxes",
        trusted=False,
    )


def split_names(labeled: Sequence[str]) -> tuple[str, str, str | None]:
    """Returns the split expressions of the training, the test and the validation part. The last one may be None.

    Args:
        labeled: Names of the splits that have annotations, one of which is "train".
    """
    test = next((split for split in _TEST_SPLITS if split in labeled), None)
    if test is None:
        return "train[:80%]", "train[80%:]", None  # TFDS shuffles the images when it prepares the data set
    return "train", test, next((split for split in _VALIDATION_SPLITS if split in labeled and split != test), None)


def _keys(builder: tfds.core.DatasetBuilder, name: str) -> tuple[str, str]:
    """Returns the names of the features that hold the image and the objects."""
    features = dict(builder.info.features.items())
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    objects = [key for key, value in features.items() if _has_boxes(value)]
    image_key = "image" if "image" in images else next(iter(images), None)
    objects_key = "objects" if "objects" in objects else next(iter(objects), None)
    if image_key is None or objects_key is None:
        listed = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
        raise UserError(
            f"A data set for detection needs an image and a sequence of objects with bbox and label. Received: {name} "
            f"with {listed}. Use another data set, or a folder in COCO's format."
        )
    if np.dtype(features[image_key].np_dtype) != np.uint8:
        raise UserError(
            f"The images for detection must have 8 bits. Received: {features[image_key].np_dtype} in {name}. Use a "
            "folder in COCO's format."
        )
    return image_key, objects_key


def _has_boxes(feature: Any) -> bool:
    """Returns whether a feature is a sequence of objects with a box in TFDS's usual form and a class."""
    if not isinstance(feature, tfds.features.Sequence) or not isinstance(feature.feature, tfds.features.FeaturesDict):
        return False
    fields = dict(feature.feature.items())
    box = fields.get("bbox")
    return (
        isinstance(box, tfds.features.BBoxFeature)
        and box.bbox_format in (None, bounding_boxes_utils.BBoxFormat.REL_YXYX)
        and isinstance(fields.get("label"), tfds.features.ClassLabel)
    )
