"""`tfds:NAME`: the splits that are used and the data sets that are refused, on small data sets registered here."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from robust_tf.data.open_dataset import open_dataset
from robust_tf.errors import UserError
from tests.tasks import make_task


class _Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Gray 4x4 images. `SPLITS` has the labels of each split."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS: dict[str, list[int]]

    def _info(self):
        features = {"photo": tfds.features.Image(shape=(4, 4, 1)), "kind": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("photo", "kind")
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(labels) for split, labels in self.SPLITS.items()}

    def _generate_examples(self, labels):
        for key, label in enumerate(labels):
            yield key, {"photo": np.full((4, 4, 1), key, np.uint8), "kind": label}


class SmallSingle(_Small):
    SPLITS = {"train": [0, 1, 2] * 20}


class SmallComplete(_Small):
    SPLITS = {"train": [0, 1, 2] * 4, "validation": [0, 1, 2], "test": [2, 1, 0, 0]}


class SmallChallenge(_Small):
    """A challenge whose test labels are secret."""

    SPLITS = {"train": [0, 1, 2] * 4, "validation": [0, 1, 2], "test": [-1] * 5}


class SmallUnlabeled(_Small):
    SPLITS = {"train": [0, 1, -1, 2] * 3, "test": [0, 1, 2]}


class SmallIncomplete(_Small):
    SPLITS = {"train": [0, 1, 2] * 4, "test": [0, 2]}


class SmallTestOnly(_Small):
    SPLITS = {"test": [0, 1, 2]}


class SmallText(_Small):
    SPLITS = {"train": [0]}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "kind": np.int64})
        )

    def _generate_examples(self, labels):
        yield 0, {"text": "x", "kind": 0}


class _SmallFloats(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Gray 4x4 float32 images, each with one shade."""

    VERSION = tfds.core.Version("1.0.0")
    SHADES: list[float]

    def _info(self):
        kind = tfds.features.Image(shape=(4, 4, 1), dtype=np.float32, encoding_format="png")
        features = {"image": kind, "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for key, shade in enumerate(self.SHADES):
            yield key, {"image": np.full((4, 4, 1), shade, np.float32), "label": key % 2}


class SmallFloatsOne(_SmallFloats):
    SHADES = [0.0, 0.123456, 0.5, 1.0]


class SmallFloatsByte(_SmallFloats):
    SHADES = [0.0, 31.48128, 127.5, 255.0]


class SmallFloatsCentered(_SmallFloats):
    SHADES = [-1.0, 0.0, 0.5, 1.0]


class SmallFloatsNan(_SmallFloats):
    SHADES = [0.0, np.nan, 0.5, 1.0]


class SmallFloatsLate(_SmallFloats):
    """The first hundred images do not show the whole range."""

    SHADES = [0.5] * 300 + [0.5, 17.0]


class SmallLines(SmallSingle):
    def _info(self):
        info = super()._info()
        info.features["kind"].names = ["a", "b", "c\nd"]
        return info


@pytest.mark.parametrize("augmentation", ["none", "random_resized_crop"])
@pytest.mark.parametrize("name", ["small_floats_one", "small_floats_byte"])
def test_float_images_are_scaled_to_the_unit_range(tmp_path, name, augmentation):
    task = make_task(f"tfds:{name}", batch_size=4, image_size=4, augmentation=augmentation, data_dir=tmp_path)
    trained = np.concatenate([images for images, _ in task.train(first_epoch=0, epochs=1).as_numpy_iterator()])
    tested = np.concatenate([images for images, _ in task.test.as_numpy_iterator()])
    assert trained.shape[1:] == tested.shape[1:] == (4, 4, 3) and tested.dtype == np.float32
    expected = np.float32(SmallFloatsOne.SHADES)
    np.testing.assert_allclose(sorted(tested.mean(axis=(1, 2, 3))), expected, atol=1e-6)
    assert np.ptp(tested, axis=(1, 2, 3)).max() < 1e-6
    for shade in trained.mean(axis=(1, 2, 3)):
        assert np.abs(expected - shade).min() < 1e-6
    scaled = f"The float32 images of tfds:{name} have pixels from 0 to 255, which are scaled to [0, 1]."
    assert task.notes == ((scaled,) if name == "small_floats_byte" else ())


def test_float_images_in_another_range_are_refused(tmp_path):
    for name, lowest, highest in (("small_floats_centered", "-1", "1"), ("small_floats_nan", "nan", "nan")):
        with pytest.raises(UserError, match=f"Received: pixels from {lowest} to {highest} in the first .*{name}"):
            open_dataset(f"tfds:{name}", tmp_path)


def test_a_float_image_that_leaves_the_range_later_is_an_error(tmp_path):
    task = make_task("tfds:small_floats_late", batch_size=64, image_size=4, data_dir=tmp_path)
    assert task.class_preprocessing.highest_float != 255.0  # TFDS did not shuffle the image to the front
    with (
        pytest.raises(UserError, match=r"must lie in \[0, 1\] like those of the first images\. Received: pixels out"),
        task.broken_images_named(),
    ):
        list(task.test.as_numpy_iterator())


def test_a_class_name_of_two_lines_is_refused_on_opening(tmp_path):
    with pytest.raises(UserError, match=r"one line of text.*Received: 'c\\nd' in tfds:small_lines"):
        open_dataset("tfds:small_lines", tmp_path)


def counts(name, data_dir):
    images = open_dataset(f"tfds:{name}", data_dir)
    own = None if images.validation is None else int(images.validation.sum())
    return images.train.num_examples, own, images.test.num_examples


def test_a_single_split_is_divided_into_training_and_test_part(tmp_path):
    assert counts("small_single", tmp_path) == (48, None, 12)
    images = open_dataset("tfds:small_single", tmp_path)
    parts = [[encoded for _, encoded, _ in part.records().as_numpy_iterator()] for part in (images.train, images.test)]
    assert len(set(parts[0]) | set(parts[1])) == 60


def test_the_validation_part_of_the_data_set_is_used(tmp_path):
    assert counts("small_complete", tmp_path) == (15, 3, 4)
    task = make_task("tfds:small_complete:1.0.0", batch_size=4, image_size=8, data_dir=tmp_path)
    assert (task.num_train, task.num_validation, task.num_test) == (12, 3, 4)
    labels = np.concatenate([labels for _, labels in task.validation.as_numpy_iterator()])
    assert sorted(labels) == [0, 1, 2]


def test_a_test_part_without_labels_is_not_used(tmp_path):
    assert counts("small_challenge", tmp_path) == (12, None, 3)


def test_the_name_of_a_record_is_its_tfds_id(tmp_path):
    images = open_dataset("tfds:small_complete", tmp_path)
    assert images.test.name(2) == "small_complete-test.tfrecord-00000-of-00001__2"
    assert "validation" in images.train.name(13)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small_unlabeled", r"must be 0 to 2.*Received: label -1 of small_unlabeled-train.*and 2 more"),
        (
            "small_incomplete",
            r"test part of tfds:small_incomplete. Received: none for 1\..*classes=\(0, 2\) or --classes=0,2",
        ),
        ("small_test_only", r"needs a split called train. Received: tfds:small_test_only with test"),
        ("small_text", r"not an image classification data set.*text \(Text\)"),
    ],
)
def test_unsuitable_data_sets_are_refused(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_task(f"tfds:{name}", batch_size=4, image_size=8, data_dir=tmp_path)


def test_only_the_classes_in_use_need_images(tmp_path):
    task = make_task("tfds:small_incomplete", batch_size=4, image_size=8, classes=(0, 2), data_dir=tmp_path)
    assert (task.num_train + task.num_validation, task.num_test) == (8, 2)
