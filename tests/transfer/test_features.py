"""Stored features: computed once, complete, continued after an interruption, limited in size, and never mixed up."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest
from huggingface_hub.utils import WeakFileLock

from robust_tf.errors import UserError
from robust_tf.models import build_classifier, features_of
from robust_tf.transfer import features as features_module
from robust_tf.transfer.features import stored_features
from tests.tasks import make_task


@pytest.fixture
def task(data_dir):
    return make_task("digits", classes=(3, 4, 5), subset="40", image_size=8, batch_size=16, data_dir=data_dir)


@pytest.fixture
def classifier():
    return build_classifier("resnet8", 3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)


@pytest.fixture
def stored(task, classifier, tmp_path):
    """Makes or reads the store of a task."""

    def read(changed_task=task, model=classifier, *, views=1, max_bytes=1e9, **options):
        return stored_features(
            model, changed_task, views=views, cache_dir=tmp_path, features_cache_size_gb=max_bytes / 1e9, **options
        )

    return read


def the_store(tmp_path):
    (path,) = (path for path in (tmp_path / "features").iterdir() if path.is_dir())
    return path


def test_the_rows_are_the_outputs_of_the_backbone_in_the_order_of_the_part(stored, task, classifier):
    features = stored(views=3)
    backbone = features_of(classifier)
    for view in range(3):
        batches = list(task.train_view(view).as_numpy_iterator())
        expected = np.concatenate([backbone(images, training=False) for images, _ in batches])
        np.testing.assert_allclose(features.train[view], expected, atol=1e-5)
        np.testing.assert_array_equal(features.train_labels, np.concatenate([labels for _, labels in batches]))
    assert np.abs(features.train[1] - features.train[2]).max() > 0.01
    validation = list(task.validation.as_numpy_iterator())
    np.testing.assert_array_equal(features.validation_labels, np.concatenate([labels for _, labels in validation]))
    expected = np.concatenate([backbone(images, training=False) for images, _ in validation])
    np.testing.assert_allclose(features.validation, expected, atol=1e-5)
    assert features.hits == 0 and features.computed == 3 * task.num_train + task.num_validation


def test_a_second_run_computes_nothing(stored, monkeypatch):
    first = stored()
    monkeypatch.setattr(features_module, "_complete_file", lambda *_: 0)
    second = stored()
    assert (second.hits, second.computed) == (first.computed, 0)
    np.testing.assert_array_equal(second.train[0], first.train[0])


def test_whatever_changes_the_features_makes_another_store(stored, task, classifier):
    stored()
    weights = classifier.get_weights()
    other = [weights[0] + 1e-6, *weights[1:]]
    classifier.set_weights(other)
    assert stored().hits == 0
    classifier.set_weights(weights)
    assert stored(views=2).hits == 0
    resized = dataclasses.replace(task.preprocessing, downscale=4)
    assert stored(dataclasses.replace(task, preprocessing=resized)).hits == 0
    assert stored(dataclasses.replace(task, fingerprint="other images")).hits == 0
    assert stored(dataclasses.replace(task, seed=5), views=2).hits == 0
    # The head has no influence on the features, and for one view neither do the seed and the augmentation.
    classifier.get_layer("logits").set_weights([w + 1 for w in classifier.get_layer("logits").get_weights()])
    augmented = dataclasses.replace(task.preprocessing, augmentation="shift_flip")
    assert stored(dataclasses.replace(task, seed=5, preprocessing=augmented)).computed == 0


def test_an_interrupted_store_continues_where_it_stopped(stored, tmp_path):
    """The interruption comes after the first batch of the second view, in the middle of a row."""
    whole = stored(views=2)
    expected = [np.array(view) for view in whole.train]
    store = the_store(tmp_path)
    (store / "complete.json").unlink()
    (store / "validation.f32").unlink()
    row_bytes = 4 * expected[0].shape[1]
    with (store / "train_view1.f32").open("rb+") as file:
        file.truncate(16 * row_bytes + 7)
    again = stored(views=2)
    assert again.hits == len(expected[0]) + 16
    assert again.computed == len(expected[1]) - 16 + len(again.validation)
    for ours, theirs in zip(again.train, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_features_in_another_format_are_computed_again(stored, monkeypatch):
    first = stored()
    monkeypatch.setattr(features_module, "_FORMAT", features_module._FORMAT + 1)
    assert stored().computed == first.computed
    monkeypatch.undo()
    assert stored().computed == 0


def test_a_store_whose_format_was_changed_is_refused_by_its_number(stored, tmp_path):
    stored()
    path = the_store(tmp_path) / "key.json"
    key = json.loads(path.read_text())
    assert key["format"] == features_module._FORMAT
    path.write_text(json.dumps({**key, "format": 7}))
    with pytest.raises(UserError, match="Received: format 7, needed: format 1. Delete this folder"):
        stored()


def test_a_store_with_another_key_is_refused(stored, tmp_path):
    stored()
    path = the_store(tmp_path) / "key.json"
    key = json.loads(path.read_text())
    path.write_text(json.dumps({**key, "weights": "of another network"}))
    with pytest.raises(UserError, match="weights differ.*Delete this folder"):
        stored()
    path.write_text("{")
    with pytest.raises(UserError, match="differ"):
        stored()


@pytest.mark.parametrize("change", ["flip", "cut"])
def test_damaged_features_are_refused(stored, tmp_path, change):
    stored()
    path = the_store(tmp_path) / "train_view0.f32"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content if change == "flip" else content[:-4])
    with pytest.raises(UserError, match="damaged: train_view0.f32 .*Delete this folder"):
        stored()


def test_the_least_recently_used_store_is_deleted_to_stay_within_the_limit(stored, task, tmp_path):
    one = stored().computed * 4 * 64
    names = {path.name for path in (tmp_path / "features").iterdir() if path.is_dir()}
    second = dataclasses.replace(task, fingerprint="second")
    stored(second)
    (newer,) = {path.name for path in (tmp_path / "features").iterdir() if path.is_dir()} - names
    os.utime(tmp_path / "features" / newer / "key.json", (1, 1))  # now it is the least recently used one
    # The small JSON files count, too.
    stored(dataclasses.replace(task, fingerprint="third"), max_bytes=2 * one + 8000)
    left = {path.name for path in (tmp_path / "features").iterdir() if path.is_dir()}
    assert newer not in left and names < left and len(left) == 2


def test_an_interrupted_store_that_continues_stays_within_the_limit(stored, task, tmp_path):
    """While it was small, another store took the room."""
    one = stored().computed * 4 * 64
    store = the_store(tmp_path)
    (store / "complete.json").unlink()
    os.truncate(store / "train_view0.f32", 0)
    stored(dataclasses.replace(task, fingerprint="second"), max_bytes=1.5 * one)
    assert len([path for path in (tmp_path / "features").iterdir() if path.is_dir()]) == 2
    assert stored(max_bytes=1.5 * one).computed == task.num_train
    assert the_store(tmp_path) == store


def test_a_store_that_another_job_is_writing_is_not_deleted(stored, task, tmp_path):
    one = stored().computed * 4 * 64
    store = the_store(tmp_path)
    with WeakFileLock(features_module._lock_of(store)), pytest.raises(UserError, match="other jobs are writing"):
        stored(dataclasses.replace(task, fingerprint="second"), max_bytes=1.5 * one)
    assert the_store(tmp_path) == store
    assert stored().computed == 0


def test_features_above_the_limit_are_refused_before_any_work(stored, tmp_path):
    with pytest.raises(UserError, match="features_cache_size_gb=1e-06. Raise the limit"):
        stored(max_bytes=1000)
    assert not [path for path in (tmp_path / "features").iterdir() if path.is_dir()]


def test_a_full_disk_keeps_what_was_computed(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="has 1e-07 GB left"):
        stored()
    monkeypatch.undo()

    def full_after_one(batches, name, *, num_images):
        for batch in batches:
            if name == "validation":
                raise OSError(28, "No space left on device")
            yield batch

    with pytest.raises(UserError, match="No space left on device.*are kept.*cache_dir"):
        stored(track=full_after_one)
    again = stored()
    assert again.hits == len(again.train[0]) and again.computed == len(again.validation)


def test_a_complete_store_on_a_read_only_disk_is_read(stored, tmp_path, monkeypatch, capsys):
    expected = stored().train[0].copy()

    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("WeakFileLock", "write_json", "_make_room", "os.utime"):
        monkeypatch.setattr(f"robust_tf.transfer.features.{name}", read_only)
    features = stored()
    assert features.computed == 0
    np.testing.assert_array_equal(features.train[0], expected)
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_created_causes_a_warning(stored, tmp_path, task, capsys):
    (tmp_path / "features").write_text("")
    features = stored()
    assert (
        features.computed == task.num_train + task.num_validation == len(features.train[0]) + len(features.validation)
    )
    assert f"warning: Cannot write the cache folder {tmp_path}/features: File exists." in capsys.readouterr().err
