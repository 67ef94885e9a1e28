"""The data of a task: the parts are complete and disjoint, and the seed decides their order."""

import numpy as np
import pytest
import tensorflow as tf

from robust_tf.data import pipeline
from robust_tf.data.preprocessing import Preprocessing
from robust_tf.errors import UserError
from tests.tasks import make_task


def batches(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    pairs = list(dataset.as_numpy_iterator())
    return np.concatenate([images for images, _ in pairs]), np.concatenate([labels for _, labels in pairs])


def rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


@pytest.fixture
def digits(data_dir):
    def load(**options):
        return make_task("digits", **{"batch_size": 64, "augmentation": "none", "data_dir": data_dir} | options)

    return load


def test_batches_have_the_documented_types_and_ranges(digits):
    task = digits()
    for dataset in (task.train(first_epoch=0, epochs=1), task.validation, task.test):
        images, labels = next(dataset.as_numpy_iterator())
        assert images.shape == (64, 16, 16, 3) and images.dtype == np.float32
        assert labels.dtype == np.int32
        assert images.min() == 0.0 and images.max() == 1.0


def test_parts_are_complete_and_disjoint(digits):
    task = digits()
    assert (task.num_train, task.num_validation, task.num_test) == (900, 100, 797)
    train, validation, test = (
        batches(dataset)[0] for dataset in (task.train(first_epoch=0, epochs=1), task.validation, task.test)
    )
    assert (len(train), len(validation), len(test)) == (900, 100, 797)
    assert len(rows(train) | rows(validation)) == len(rows(train)) + len(rows(validation))
    assert task.steps_per_epoch == 15


def test_validation_part_is_the_same_for_every_seed(digits):
    np.testing.assert_array_equal(batches(digits(seed=1).validation)[0], batches(digits(seed=2).validation)[0])


def test_validation_images_in_memory_are_those_of_the_data_set(digits, monkeypatch):
    read = []
    evaluated = Preprocessing.for_evaluation

    def noted(self, encoded):
        tf.py_function(lambda: read.append(1), [], [])
        return evaluated(self, encoded)

    monkeypatch.setattr(Preprocessing, "for_evaluation", noted)
    passes = []
    for limit, expected in ((pipeline._MOST_CACHED_BYTES, 100), (4 * 3 * 16**2 * 100 - 1, 200)):
        monkeypatch.setattr(pipeline, "_MOST_CACHED_BYTES", limit)
        task = digits()
        read.clear()
        passes += [batches(task.validation) for _ in range(2)]
        assert len(read) == expected
    for images, labels in passes[1:]:
        np.testing.assert_array_equal(images, passes[0][0])
        np.testing.assert_array_equal(labels, passes[0][1])
    np.testing.assert_array_equal(task.preview(5)[0], passes[0][0][:5])


def test_evaluation_has_a_fixed_order(digits):
    task = digits()
    np.testing.assert_array_equal(batches(task.test)[1], batches(task.test)[1])


@pytest.mark.parametrize("augmentation", ["none", "shift"])
def test_seed_and_number_decide_an_epoch(digits, augmentation):
    task = digits(augmentation=augmentation)
    images, labels = batches(task.train(first_epoch=0, epochs=3))
    resumed, resumed_labels = batches(digits(augmentation=augmentation).train(first_epoch=1, epochs=3))
    np.testing.assert_array_equal(images[900:], resumed)
    np.testing.assert_array_equal(labels[900:], resumed_labels)
    first, second = images[:900], images[900:1800]
    assert not np.array_equal(labels[:900], labels[900:1800])  # a different order
    assert (rows(first) == rows(second)) == (augmentation == "none")  # different shifts of the same images
    other, _ = batches(digits(augmentation=augmentation, seed=5).train(first_epoch=0, epochs=1))
    assert not np.array_equal(first, other)


def test_order_does_not_depend_on_the_global_seed(digits):
    labels = []
    for seed in (0, 1):
        tf.random.set_seed(seed)
        labels.append(batches(digits().train(first_epoch=0, epochs=1))[1])
    np.testing.assert_array_equal(*labels)


def test_classes_are_renumbered_in_the_order_given(digits):
    task, everything = digits(classes=(9, 5)), digits()
    assert task.class_names == ("9", "5")
    images, labels = batches(task.test)
    all_images, all_labels = batches(everything.test)
    np.testing.assert_array_equal(images[labels == 0], all_images[all_labels == 9])
    np.testing.assert_array_equal(images[labels == 1], all_images[all_labels == 5])
    assert len(images) == task.num_test == np.isin(all_labels, (5, 9)).sum()


def test_examples_per_class_limits_only_the_training_part(digits):
    task = digits(classes=(5, 6, 7), examples_per_class=4)
    images, labels = batches(task.train(first_epoch=0, epochs=1))
    np.testing.assert_array_equal(np.bincount(labels), [4, 4, 4])
    assert rows(images) < rows(batches(digits().train(first_epoch=0, epochs=1))[0])
    assert task.num_validation == digits(classes=(5, 6, 7)).num_validation  # still all of them
    other = digits(classes=(5, 6, 7), examples_per_class=4, seed=1)
    assert rows(images) != rows(batches(other.train(first_epoch=0, epochs=1))[0])


def test_resize_size_keeps_the_proportion_of_the_paper(mocked_tfds):
    with mocked_tfds(num_examples=20):
        assert make_task("pets", batch_size=4).resize_size == 256
        assert make_task("pets", batch_size=4, image_size=112).resize_size == 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "digit"}, "Received: 'digit'. Did you mean 'digits'"),
        ({"classes": (3, 10)}, r"0 to 9. Received: \[10\] in classes=\[3, 10\]"),
        ({"classes": (3, 3)}, r"Received: classes=\[3, 3\]"),
        ({"classes": (3,)}, r"two or more.*classes=\[3\]"),
        ({"augmentation": "flipp"}, "Received: 'flipp'"),
        ({"validation_fraction": 1.5}, "validation_fraction must be between 0 and 1. Received: 1.5"),
        ({"examples_per_class": 1000}, r"Received: examples_per_class=1000, and \d+ images of class 0"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(data_dir, options, message):
    with pytest.raises(UserError, match=message):
        make_task(**{"dataset": "digits", "batch_size": 64, "data_dir": data_dir} | options)


def test_the_error_for_a_missing_data_set_says_how_to_get_it(tmp_path):
    """Users have to fetch these files by hand, so the test needs no network."""
    with pytest.raises(UserError, match=r"(?s)imagenet2012.*144 GiB.*--prepare=imagenet2012 --data_dir="):
        make_task("imagenet2012", batch_size=4, data_dir=tmp_path)
