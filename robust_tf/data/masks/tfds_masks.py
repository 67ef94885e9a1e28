"""Reads a data set with masks from TensorFlow Datasets (TFDS)."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from robust_tf.data.boxes.tfds_boxes import split_names
from robust_tf.data.masks.mask_files import IGNORED_IN_FILE, MOST_CLASSES, decode_mask
from robust_tf.data.masks.records import LabeledMasks
from robust_tf.data.records import check_class_names
from robust_tf.data.tfds_preparation import prepared_builder
from robust_tf.data.tfds_records import TfdsPart, split_sizes
from robust_tf.errors import UserError

# Number of masks that are read to find the number of classes if the data set does not state it.
_MASKS_LOOKED_AT = 200


@dataclasses.dataclass(frozen=True)
class MaskValues:
    """What the values of the pixels of a data set stand for.

    Attributes:
        first: Value of the first class.
        class_names: Names of the classes.
    """

    first: int
    class_names: tuple[str, ...]


# Data sets that document the values of their masks, but do not state them in TFDS.
DOCUMENTED = {"oxford_iiit_pet": MaskValues(1, ("pet", "background", "border"))}


@dataclasses.dataclass(frozen=True)
class TfdsMaskPart(TfdsPart):
    """The images of a TFDS split with their masks, in the order of the files. See `Part` for the methods.

    Attributes:
        first: Value of the first class in the stored masks. Labels begin at 0, and smaller values become 255.
    """

    first: int = 0

    def records(self) -> tf.data.Dataset:
        """Returns a dataset of (index, encoded image, label), the label as an encoded PNG."""
        skip = tfds.decode.SkipDecoding()
        decoders = {self.image_key: skip, self.label_key: skip}
        dataset = self._read({self.image_key, self.label_key}, decoders=decoders)
        return dataset.enumerate().map(
            lambda index, example: (index, example[self.image_key], self._label(example[self.label_key])),
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def labels(self) -> np.ndarray:
        """Returns zeros, (num_examples,) int64, because an image has no class here."""
        return np.zeros(self.num_examples, np.int64)

    def masks(self) -> Iterator[np.ndarray]:
        """Yields each mask, (height, width) int32 with 255 for ignored pixels. Reads the whole part."""
        masks = self.records().map(lambda _, __, label: decode_mask(label), num_parallel_calls=tf.data.AUTOTUNE)
        for mask in masks.as_numpy_iterator():
            yield np.where(mask < 0, IGNORED_IN_FILE, mask)

    def _label(self, encoded: tf.Tensor) -> tf.Tensor:
        if not self.first:
            return encoded
        mask = decode_mask(encoded)
        shifted = tf.where(mask < self.first, IGNORED_IN_FILE, mask - self.first)
        return tf.io.encode_png(tf.cast(shifted, tf.uint8)[..., None])


def open_tfds_masks(name: str, data_dir: epath.Path | pathlib.Path | None) -> LabeledMasks:
    """Opens a data set of TFDS that has masks, downloading and preparing it first if necessary.

    Each example needs an image and one mask: an image with one channel of 8 bits. The classes are those that TFDS
    states or, for oxford_iiit_pet, that its authors document. Otherwise they are "class 0" to the highest value in the
    first 200 masks. The splits are chosen as for classification.

    Args:
        name: `tfds:NAME[/config][:version]`.
        data_dir: Folder of TFDS. None uses TFDS's default.

    Raises:
        UserError: If the data set cannot be prepared, has no mask or several ones, or has fewer than two classes.
    """
    builder = prepared_builder(name, data_dir)
    image_key, mask_key = _keys(builder, name)
    values = DOCUMENTED.get(builder.name)
    first = values.first if values else 0

    def part(split: str) -> TfdsMaskPart:
        return TfdsMaskPart(builder, split, image_key, mask_key, first)

    there = [split for split, info in builder.info.splits.items() if info.num_examples]
    if "train" not in there:
        raise UserError(f"A data set needs a split called train. Received: {name} with {', '.join(there)}.")
    train, test, validation = split_names(there)
    notes: tuple[str, ...] = ()
    stated = values.class_names if values else getattr(builder.info.features[mask_key], "names", None)
    class_names = tuple(stated or ())
    if not class_names:
        some = min(_MASKS_LOOKED_AT, builder.info.splits["train"].num_examples)
        highest = max(int(mask[mask != IGNORED_IN_FILE].max(initial=0)) for mask in part(f"train[:{some}]").masks())
        class_names = tuple(f"class {number}" for number in range(highest + 1))
        notes = (f"{name} does not state its classes. The first {some} masks have the values 0 to {highest}.",)
    if not 2 <= len(class_names) <= MOST_CLASSES:
        raise UserError(
            f"A data set for segmentation needs 2 to {MOST_CLASSES} classes. Received: {len(class_names)} in {name}. "
            "Use another data set, or a folder of images and masks."
        )
    check_class_names(class_names, where=name)
    own_validation = None
    if validation is not None:
        own_validation = np.repeat([False, True], [part(train).num_examples, part(validation).num_examples])
        train = f"{train}+{validation}"
    return LabeledMasks(
        class_names=class_names,
        train=part(train),
        test=part(test),
        validation=own_validation,
        num_bytes=int(builder.info.dataset_size or 0),
        fingerprint=f"{builder.info.full_name} {train} {test} {split_sizes(builder)} masks",
        trusted=False,
        notes=notes,
    )


def _keys(builder: tfds.core.DatasetBuilder, name: str) -> tuple[str, str]:
    """Returns the names of the features that hold the image and the mask."""
    features = {key: value for key, value in builder.info.features.items() if isinstance(value, tfds.features.Image)}
    pictures = [key for key, value in features.items() if value.shape[-1] == 3]
    masks = [
        key
        for key, value in features.items()
        if value.shape[-1] == 1 and np.dtype(value.np_dtype) == np.uint8 and _is_named_mask(key, value)
    ]
    if not pictures or len(masks) != 1:
        listed = ", ".join(f"{key} ({type(value).__name__})" for key, value in builder.info.features.items())
        raise UserError(
            "A data set for segmentation needs an image and one mask, a gray image of 8 bits whose name has the word "
            f"mask or segmentation. Received: {name} with {listed}. Use another data set, or a folder of images and "
            "masks."
        )
    image_key = "image" if "image" in pictures else pictures[0]
    if np.dtype(features[image_key].np_dtype) != np.uint8:
        raise UserError(
            f"The images for segmentation must have 8 bits. Received: {features[image_key].np_dtype} in {name}. Use a "
            "folder of images and masks."
        )
    return image_key, masks[0]


def _is_named_mask(key: str, feature: tfds.features.Image) -> bool:
    return isinstance(feature, tfds.features.LabeledImage) or any(word in key for word in ("mask", "segmentation"))
