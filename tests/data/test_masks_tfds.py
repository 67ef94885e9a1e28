"""`tfds:NAME` for segmentation: values, class names, splits and refused data sets, on small data sets."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from robust_tf.data.masks import decode_mask, open_masks, tfds_masks
from robust_tf.data.tfds_preparation import builder_of
from robust_tf.errors import UserError


class _SmallMasks(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Images of 4x6 pixels. `SPLITS` has the value of the whole mask of each image except for the first pixel, 255."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS: dict[str, list[int]]
    MASKS = {"segmentation_mask": tfds.features.Image(shape=(None, None, 1))}

    def _info(self):
        features = {"image": tfds.features.Image(), "file_name": tfds.features.Text(), **self.MASKS}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(values) for split, values in self.SPLITS.items()}

    def _generate_examples(self, values):
        for key, value in enumerate(values):
            mask = np.full((4, 6, 1), value, np.uint8)
            mask[0, 0] = 255
            masks = dict.fromkeys(self.MASKS, mask)
            yield key, {"image": np.full((4, 6, 3), value, np.uint8), "file_name": f"{key}.jpg", **masks}


class MasksPlain(_SmallMasks):
    SPLITS = {"train": [0, 1, 3], "validation": [2], "test": [1, 1]}


class MasksNamed(_SmallMasks):
    SPLITS = {"train": [0, 1], "test": [1]}
    MASKS = {"mask": tfds.features.LabeledImage(labels=["sky", "road", "car"], shape=(None, None, 1))}


class MasksFromOne(_SmallMasks):
    SPLITS = {"train": [1, 2, 3, 0, 1], "test": [3]}


class MasksTwo(_SmallMasks):
    SPLITS = {"train": [0]}
    MASKS = {key: tfds.features.Image(shape=(None, None, 1)) for key in ("instance_mask", "class_mask")}


class MasksBlank(_SmallMasks):
    SPLITS = {"train": [0, 0]}


def values_of(part):
    masks = list(part.masks())
    assert all(mask[0, 0] == 255 for mask in masks)
    return sorted(int(mask[1, 1]) for mask in masks)


def test_classes_by_the_highest_value(tmp_path):
    images = open_masks("tfds:masks_plain", tmp_path)
    assert images.class_names == ("class 0", "class 1", "class 2", "class 3")
    assert images.validation.tolist() == [False] * 3 + [True]
    assert values_of(images.train) == [0, 1, 2, 3] and values_of(images.test) == [1, 1]
    assert "does not state its classes. The first 3 masks have the values 0 to 3." in images.notes[0]
    for _, image, label in images.train.records().as_numpy_iterator():
        assert image[:4] == label[:4] == b"\x89PNG" and decode_mask(label).shape == (4, 6)
    assert images.test.labels().tolist() == [0, 0]
    assert "masks_plain-test" in images.test.name(1)


def test_classes_that_tfds_states(tmp_path):
    images = open_masks("tfds:masks_named", tmp_path)
    assert images.class_names == ("sky", "road", "car") and images.notes == ()


def test_documented_values_are_shifted_to_begin_at_zero(tmp_path, monkeypatch):
    monkeypatch.setitem(tfds_masks.DOCUMENTED, "masks_from_one", tfds_masks.DOCUMENTED["oxford_iiit_pet"])
    images = open_masks("tfds:masks_from_one", tmp_path)
    assert images.class_names == ("pet", "background", "border")
    assert values_of(images.train) == [0, 0, 1, 2, 255] and values_of(images.test) == [2]


def test_the_features_of_pets_are_found(tmp_path):
    assert tfds_masks._keys(builder_of("tfds:oxford_iiit_pet", tmp_path), "x") == ("image", "segmentation_mask")


def test_unsuitable_data_sets_are_refused(tmp_path):
    with pytest.raises(UserError, match="one mask.*instance_mask.*class_mask"):
        open_masks("tfds:masks_two", tmp_path)
    with pytest.raises(UserError, match="needs 2 to 255 classes. Received: 1 in tfds:masks_blank"):
        open_masks("tfds:masks_blank", tmp_path)
