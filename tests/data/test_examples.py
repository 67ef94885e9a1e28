"""Caches, orders, workers and broken images, on folders of real JPEG files."""

import io
import json
import os
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from robust_tf.data import broken_images
from robust_tf.data import examples as examples_module
from robust_tf.data.tfds_records import TfdsPart
from robust_tf.errors import UserError
from robust_tf.sharing import sharing
from tests.tasks import make_task

PER_CLASS = 20


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Two classes of small JPEG files, each image of a different color."""
    rng = np.random.default_rng(0)
    for part, count in (("train", PER_CLASS), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.broadcast_to(rng.integers(0, 256, 3), (20, 30, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{number:02}.jpg")
    return tmp_path / "images"


@pytest.fixture
def load(folder, tmp_path):
    def make(**options):
        settings = {"batch_size": 8, "image_size": 8, "augmentation": "none", "cache_dir": tmp_path / "cache"}
        return make_task(f"folder:{folder}", **{**settings, **options})

    return make


def epoch(task, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    batches = list(task.train(first_epoch=number, epochs=number + 1).as_numpy_iterator())
    return np.concatenate([images for images, _ in batches]), np.concatenate([labels for _, labels in batches])


def rows(images: np.ndarray) -> list[bytes]:
    """The images sorted by their bytes, without the last bits, in which two graphs may differ."""
    return sorted((255 * image).round().astype(np.uint8).tobytes() for image in images)


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_every_cache_gives_all_images_in_the_order_of_the_seed(load, cache):
    expected = np.concatenate([images for images, _ in load(cache="none").train_view(0).as_numpy_iterator()])
    task = load(cache=cache)
    first, labels = epoch(task)
    assert rows(first) == rows(expected)
    again, again_labels = epoch(load(cache=cache))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(labels, again_labels)
    second, second_labels = epoch(task, 1)
    assert rows(second) == rows(first) and not np.array_equal(second, first)
    assert {labels[0], labels[-1]} | set(labels[:8]) == {0, 1}  # the classes are mixed


def test_the_cache_on_disk_is_read_instead_of_the_files(load, folder):
    expected, _ = epoch(load(cache="disk"))
    for path in (folder / "train").rglob("*.jpg"):
        content = path.read_bytes()
        stat = path.stat()
        path.write_bytes(b"x" * len(content))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time of the file stay the same
    np.testing.assert_array_equal(epoch(load(cache="disk"))[0], expected)


def test_changed_files_make_a_new_cache(load, folder, tmp_path):
    epoch(load(cache="disk"))
    Image.new("RGB", (20, 30), (1, 2, 3)).save(folder / "train" / "cat" / "new.jpg")
    assert len(epoch(load(cache="disk", validation_fraction=0.1))[0]) == 41 - 4
    assert len(list((tmp_path / "cache" / "records").iterdir())) == 2


def test_a_full_disk_is_a_warning_and_leaves_no_file(load, tmp_path, monkeypatch, capsys):
    class FullWriter(tf.io.TFRecordWriter):
        def write(self, record):
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(examples_module.tf.io, "TFRecordWriter", FullWriter)
    task = load(cache="disk")
    assert re.search("warning: .*No space left on device; nothing was left behind", capsys.readouterr().err)
    assert len(epoch(task)[0]) == task.num_train
    assert not list((tmp_path / "cache" / "records").iterdir())


@pytest.mark.parametrize("options", [{"cache": "disk"}, {"skip_bad_images": True}], ids=str)
def test_a_cache_folder_that_cannot_be_created_is_a_warning(load, tmp_path, options, capsys):
    (tmp_path / "file").write_text("")
    task = load(cache_dir=tmp_path / "file" / "cache", **options)
    (warning,) = capsys.readouterr().err.splitlines()[:1]
    assert warning.startswith(f"warning: Cannot write {tmp_path}/file/cache/")
    assert len(epoch(task)[0]) == task.num_train == 2 * PER_CLASS - 4


def test_the_cache_on_disk_keeps_any_bytes():
    for index, encoded, label in [(0, b"", 0), (2**40, b"\n\n1\n\x00\xff" * 30, 999), (7, b"\n", 3)]:
        record = examples_module._to_bytes(tf.constant(index, tf.int64), tf.constant(encoded), tf.constant(label))
        values = [value.numpy() for value in examples_module._from_bytes(record)]
        assert values == [index, encoded, label]


def test_the_cache_in_memory_is_used_only_if_it_fits(load, monkeypatch):
    assert load().train_examples.in_memory
    monkeypatch.setattr(examples_module, "_free_memory", lambda: 1000)
    assert not load().train_examples.in_memory
    assert load(cache="memory").train_examples.in_memory
    assert not load(cache="none").train_examples.in_memory


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_workers_share_the_batches_of_a_single_worker(load, cache):
    single = load(cache=cache, augmentation="random_resized_crop")
    parts = [load(cache=cache, augmentation="random_resized_crop", worker=w, num_workers=2) for w in (0, 1)]
    assert [part.steps_per_epoch for part in parts] == [36 // 8] * 2 and single.steps_per_epoch == 5
    whole = list(single.train(first_epoch=0, epochs=1).as_numpy_iterator())
    shares = [list(part.train(first_epoch=0, epochs=1).as_numpy_iterator()) for part in parts]
    assert [len(share) for share in shares] == [4, 4]
    for (images, labels), first, second in zip(whole, *shares, strict=False):
        assert rows(np.concatenate([first[0], second[0]])) == rows(images)
        assert sorted(np.concatenate([first[1], second[1]])) == sorted(labels)
    for part in parts:  # each worker evaluates all images
        for ours, theirs in ((part.validation, single.validation), (part.test, single.test)):
            for (images, labels), expected in zip(ours.as_numpy_iterator(), theirs.as_numpy_iterator(), strict=True):
                np.testing.assert_array_equal(images, expected[0])
                np.testing.assert_array_equal(labels, expected[1])


@pytest.mark.parametrize("options", [{"worker": 2, "num_workers": 2}, {"num_workers": 3}])
def test_impossible_workers_are_refused(load, options):
    with pytest.raises(UserError, match=f"num_workers={options['num_workers']}, batch_size=8"):
        load(**options)


@pytest.mark.parametrize("options", [{"rand_augment": 0.5}, {"mixing": "mixup"}, {"mixing": "cutmix"}], ids=str)
def test_the_seed_decides_rand_augment_and_mixing(load, options):
    task = load(**options)
    images, labels = epoch(task, 3)
    again, again_labels = epoch(load(**options), 3)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, again_labels)
    assert images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1
    plain, plain_labels = epoch(load(), 3)
    assert not np.array_equal(images, plain)
    if "mixing" in options:
        assert labels.shape == (36, 2) and labels.dtype == np.float32
        next_images, next_labels = epoch(task, 4)
        assert not np.array_equal(np.sort(labels, axis=0), np.sort(next_labels, axis=0))
    else:
        np.testing.assert_array_equal(labels, plain_labels)
    evaluated, _ = next(task.validation.as_numpy_iterator())
    np.testing.assert_array_equal(evaluated, next(load().validation.as_numpy_iterator())[0])


def test_downscaling_removes_detail_in_training_and_evaluation(load):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    spreads = []
    for downscale in (None, 4):
        preprocessing = load(image_size=32, downscale=downscale, augmentation="random_resized_crop").preprocessing
        assert preprocessing.for_evaluation(tf.constant(buffer.getvalue())).shape == (32, 32, 3)
        for image in (
            preprocessing.for_evaluation(tf.constant(buffer.getvalue())),
            preprocessing.for_training(tf.constant(buffer.getvalue()), tf.constant([1, 2])),
        ):
            spreads.append(float(tf.math.reduce_std(image)))
    assert max(spreads[2:]) < 0.5 * min(spreads[:2])


# Broken images


@pytest.fixture
def broken(folder) -> list[pathlib.Path]:
    """A file that ends in the middle of the image, and a file that is not an image."""
    truncated, text = folder / "train" / "cat" / "03.jpg", folder / "test" / "dog" / "02.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    text.write_text("not an image")
    return [truncated, text]


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_broken_image_is_named(load, broken, part):
    task = load()
    path, other = broken if part == "train" else broken[::-1]
    other.write_bytes((path.parent / "00.jpg").read_bytes())
    message = rf"Cannot decode the image {path}: \w.*skip_bad_images=True \(--skip_bad_images\)"
    with pytest.raises(UserError, match=message), task.broken_images_named():
        for dataset in (task.train(first_epoch=0, epochs=1), task.validation, task.test):
            for _ in dataset:
                pass


def test_other_errors_are_raised_unchanged(load):
    with pytest.raises(tf.errors.InvalidArgumentError), load().broken_images_named():
        tf.reshape(tf.zeros(3), (2, 2))


def test_broken_images_are_skipped_counted_and_remembered(load, broken, tmp_path, monkeypatch):
    task = load(skip_bad_images=True)
    assert task.skipped == tuple(map(str, broken))
    counts = task.num_train + task.num_validation, task.num_test
    assert counts == (2 * PER_CLASS - 1, 7)
    assert len(epoch(task)[0]) == task.num_train
    assert sum(len(labels) for _, labels in task.test.as_numpy_iterator()) == 7
    (first, *_) = (tmp_path / "cache" / "broken_images").iterdir()
    assert json.loads(first.read_text())["broken"]
    monkeypatch.setattr(broken_images, "broken_images", None)  # would fail when called
    assert load(skip_bad_images=True).skipped == task.skipped


def test_jobs_that_share_objects_read_a_small_data_set_once(monkeypatch):
    def examples(classes: tuple[int, ...]) -> list[tuple[int, bytes, int]]:
        task = make_task("digits", classes=classes, image_size=8, batch_size=8)
        return list(task.test_examples.in_order().as_numpy_iterator())

    expected = {classes: examples(classes) for classes in ((), (7, 2), (3, 4))}
    read = []
    records = TfdsPart.records
    monkeypatch.setattr(TfdsPart, "records", lambda part: read.append(part.split) or records(part))
    with sharing():
        assert {classes: examples(classes) for classes in expected} == expected
        assert len(read) == 1
    assert examples((3, 4)) == expected[3, 4]
    assert len(read) == 2
