"""`tfds:NAME`: which splits are taken, and what is refused; on small data sets that are registered here."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from robust_tf.data import load_task
from robust_tf.data.opening import open_dataset
from robust_tf.errors import UserError


class _Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Grey 4x4 images; `SPLITS` has the labels of each split."""

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
    """The labels of the test part are kept secret."""

    SPLITS = {"train": [0, 1, 2] * 4, "validation": [0, 1, 2], "test": [-1] * 5}


class SmallUnlabelled(_Small):
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


def counts(name, data_dir):
    images = open_dataset(f"tfds:{name}", data_dir)
    own = None if images.validation is None else int(images.validation.sum())
    return images.train.num_examples, own, images.test.num_examples


def test_a_single_split_is_divided(tmp_path):
    assert counts("small_single", tmp_path) == (48, None, 12)
    images = open_dataset("tfds:small_single", tmp_path)
    parts = [[encoded for _, encoded, _ in part.records().as_numpy_iterator()] for part in (images.train, images.test)]
    assert len(set(parts[0]) | set(parts[1])) == 60


def test_its_own_validation_part_chooses_the_epoch(tmp_path):
    assert counts("small_complete", tmp_path) == (15, 3, 4)
    task = load_task("tfds:small_complete:1.0.0", batch_size=4, image_size=8, data_dir=tmp_path)
    assert (task.num_train, task.num_validation, task.num_test) == (12, 3, 4)
    labels = np.concatenate([labels for _, labels in task.validation.as_numpy_iterator()])
    assert sorted(labels) == [0, 1, 2]


def test_a_test_part_without_labels_is_none(tmp_path):
    assert counts("small_challenge", tmp_path) == (12, None, 3)


def test_records_are_named_by_their_id(tmp_path):
    images = open_dataset("tfds:small_complete", tmp_path)
    assert images.test.name(2) == "small_complete-test.tfrecord-00000-of-00001__2"
    assert "validation" in images.train.name(13)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small_unlabelled", r"must be 0 to 2.*Received: label -1 of small_unlabelled-train.*and 2 more"),
        ("small_incomplete", r"test part of tfds:small_incomplete. Received: none of 1\..*--classes=0,2"),
        ("small_test_only", r"no training split. Received: test"),
        ("small_text", r"no image classification data set.*text \(Text\)"),
    ],
)
def test_data_sets_that_are_none_for_this_are_refused(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_task(f"tfds:{name}", batch_size=4, image_size=8, data_dir=tmp_path)


def test_classes_in_use_are_enough(tmp_path):
    task = load_task("tfds:small_incomplete", batch_size=4, image_size=8, classes=(0, 2), data_dir=tmp_path)
    assert (task.num_train + task.num_validation, task.num_test) == (8, 2)
