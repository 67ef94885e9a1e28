"""Folders of images: layouts, the split by seed, and what is refused."""

import os
import shutil

import numpy as np
import pytest

from robust_tf.data import load_task
from robust_tf.data.opening import open_dataset
from robust_tf.errors import UserError
from tests.data.images import jpeg, write, write_folder

WHOLE = {"train/cat": 8, "train/dog": 6, "test/cat": 3, "test/dog": 2}


def names(part) -> list[str]:
    return ["/".join(part.name(index).split("/")[-3:]) for index in range(part.num_examples)]


def load(root, **options):
    return load_task(f"folder:{root}", **{"batch_size": 4, "image_size": 8} | options)


def test_records_are_the_files(tmp_path):
    images = open_dataset(f"folder:{write_folder(tmp_path, WHOLE)}")
    assert images.class_names == ("cat", "dog")
    for part, first, labels in ((images.train, 0, [0] * 8 + [1] * 6), (images.test, 14, [0] * 3 + [1] * 2)):
        records = list(part.records().as_numpy_iterator())
        assert [index for index, _, _ in records] == list(range(len(labels)))
        assert [encoded for _, encoded, _ in records] == [jpeg(first + index) for index in range(len(labels))]
        assert [label for _, _, label in records] == part.labels().tolist() == labels
    assert names(images.test)[3] == "test/dog/000.jpg"


def test_a_task_from_a_folder(tmp_path):
    task = load(write_folder(tmp_path, WHOLE))
    assert (task.num_train, task.num_validation, task.num_test) == (13, 1, 5)
    assert task.class_names == ("cat", "dog")
    images, labels = next(task.train(first_epoch=0, epochs=1).as_numpy_iterator())
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.float32 and labels.dtype == np.int32
    assert np.concatenate([labels for _, labels in task.test.as_numpy_iterator()]).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_its_own_validation_part_chooses_the_epoch(tmp_path, folder):
    root = write_folder(tmp_path, WHOLE | {f"{folder}/cat": 2, f"{folder}/dog": 1})
    task = load(root, validation_fraction=0.5)
    assert (task.num_train, task.num_validation, task.num_test) == (14, 3, 5)
    labels = np.concatenate([labels for _, labels in task.validation.as_numpy_iterator()])
    assert labels.tolist() == [0, 0, 1]


def test_without_a_test_folder_val_is_the_test_part(tmp_path):
    images = open_dataset(f"folder:{write_folder(tmp_path, {'train/a': 3, 'train/b': 3, 'val/a': 2, 'val/b': 1})}")
    assert images.validation is None
    assert names(images.test) == ["val/a/000.jpg", "val/a/001.jpg", "val/b/000.jpg"]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_split_by_seed_is_stratified_and_repeatable(tmp_path, prefix):
    root = write_folder(tmp_path, {f"{prefix}cat": 20, f"{prefix}dog": 10})
    first, again, other = (open_dataset(f"folder:{root}", split_seed=seed) for seed in (0, 0, 1))
    assert np.bincount(first.test.labels()).tolist() == [4, 2]
    assert np.bincount(first.train.labels()).tolist() == [16, 8]
    assert not set(names(first.train)) & set(names(first.test))
    assert names(first.test) == names(again.test) != names(other.test)


def test_a_split_by_seed_does_not_depend_on_where_the_folder_is(tmp_path):
    write_folder(tmp_path / "here", {"cat": 20, "dog": 10})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (open_dataset(f"folder:{tmp_path / name}") for name in ("here", "there"))
    assert [name.split("/")[1:] for name in names(here.test)] == [name.split("/")[1:] for name in names(there.test)]


def test_the_fingerprint_changes_with_the_content(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    before = open_dataset(f"folder:{root}").fingerprint
    assert open_dataset(f"folder:{root}").fingerprint == before
    write(root / "train" / "cat" / "new.jpg", jpeg(99))
    assert open_dataset(f"folder:{root}").fingerprint != before


def test_hidden_and_other_files_do_not_count(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    for name in ("train/cat/.DS_Store", "train/cat/Thumbs.db", "train/.cache/x.jpg", "train/notes.txt", "readme.md"):
        write(root / name, "")
    write(root / "train" / "cat" / "CAPITALS.JPEG", jpeg(50))
    assert open_dataset(f"folder:{root}").train.num_examples == 15


def test_leaving_out_the_class_that_the_message_names_works(tmp_path):
    root = write_folder(tmp_path, WHOLE | {"train/emu": 3})
    with pytest.raises(UserError, match=r"test part.*Received: none of emu.*--classes=0,1\."):
        load(root)
    assert load(root, classes=(0, 1)).class_names == ("cat", "dog")


def empty(path):
    path.write_bytes(b"")


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize(
    ("counts", "spoil", "message"),
    [
        ({}, None, r"Received: .*photos, which holds none"),
        ({"cat": 3}, None, r"two or more classes. Received: only 'cat'"),
        ({"train/cat": 3, "test/cat": 3}, None, r"two or more classes. Received: only 'cat'"),
        ({"test/cat": 3, "test/dog": 3}, None, r"with test, but without train"),
        ({"train/cat": 3, "train/dog": 3, "test/cat": 1}, None, r"test part of .*Received: none of dog"),
        ({"train/cat": 3, "test/cat": 3, "test/dog": 1}, None, r"training part of .*Received: none of dog"),
        ({"cat": 1, "dog": 3}, None, r"training part of .*Received: none of cat"),
        (WHOLE, lambda root: empty(root / "train/cat/001.jpg"), r"train/cat/001.jpg is empty"),
        (WHOLE, lambda root: dangling(root / "test/dog/001.jpg"), r"Cannot read the image .*test/dog/001.jpg: No such"),
        (WHOLE, lambda root: write(root / "train/cat/001.PNG", "x"), r"Received: .*cat/001.PNG and .*cat/001.jpg"),
        (WHOLE, lambda root: write(root / "train/cat/a.tiff", "x"), r"Received: .*train/cat/a.tiff and 0 more"),
        (WHOLE, lambda root: shutil.rmtree(root / "train/cat") or (root / "train/cat").mkdir(), r"none in .*train/cat"),
        (
            WHOLE,
            lambda root: shutil.rmtree(root / "test") or (root / "test").mkdir(),
            r"Received: .*test, which holds none",
        ),
    ],
)
def test_bad_folders_are_refused_by_name(tmp_path, counts, spoil, message):
    root = write_folder(tmp_path / "photos", counts)
    root.mkdir(exist_ok=True)
    if spoil:
        spoil(root)
    with pytest.raises(UserError, match=message):
        load(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    (root / "train/cat/001.jpg").chmod(0)
    with pytest.raises(UserError, match=r"train/cat/001.jpg: permission denied"):
        load(root)


@pytest.mark.parametrize("name", ["digits", "split"])
def test_a_split_seed_that_would_be_ignored_is_refused(tmp_path, data_dir, name):
    dataset = f"folder:{write_folder(tmp_path, WHOLE)}" if name == "split" else name
    with pytest.raises(UserError, match="--split_seed is for a folder.*Received: 7"):
        load_task(dataset, batch_size=4, split_seed=7, data_dir=data_dir)
