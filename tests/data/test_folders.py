"""Folders of images: the layouts, the split by a seed, and the folders that are refused."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from robust_tf.data import decode
from robust_tf.data.open_dataset import open_dataset
from robust_tf.errors import UserError
from tests.data.images import encoded, jpeg, write, write_folder
from tests.tasks import make_task

SVG = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'
WHOLE = {"train/cat": 8, "train/dog": 6, "test/cat": 3, "test/dog": 2}


def names(part) -> list[str]:
    return ["/".join(part.name(index).split("/")[-3:]) for index in range(part.num_examples)]


def load(root, **options):
    return make_task(f"folder:{root}", **{"batch_size": 4, "image_size": 8} | options)


def test_records_are_the_files_in_order(tmp_path):
    images = open_dataset(f"folder:{write_folder(tmp_path, WHOLE)}")
    assert images.class_names == ("cat", "dog")
    for part, first, labels in ((images.train, 0, [0] * 8 + [1] * 6), (images.test, 14, [0] * 3 + [1] * 2)):
        records = list(part.records().as_numpy_iterator())
        assert [index for index, _, _ in records] == list(range(len(labels)))
        assert [encoded for _, encoded, _ in records] == [jpeg(first + index) for index in range(len(labels))]
        assert [label for _, _, label in records] == part.labels().tolist() == labels
    assert names(images.test)[3] == "test/dog/000.jpg"


def test_a_task_is_loaded_from_a_folder(tmp_path):
    task = load(write_folder(tmp_path, WHOLE))
    assert (task.num_train, task.num_validation, task.num_test) == (13, 1, 5)
    assert task.class_names == ("cat", "dog")
    images, labels = next(task.train(first_epoch=0, epochs=1).as_numpy_iterator())
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.float32 and labels.dtype == np.int32
    assert np.concatenate([labels for _, labels in task.test.as_numpy_iterator()]).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_the_validation_folder_is_the_validation_part(tmp_path, folder):
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


def left_out(images) -> dict[str, list[str]]:
    """The last two parts of the paths that were left out, by kind."""
    return {group.what: ["/".join(path.split("/")[-2:]) for path in group.paths] for group in images.left_out}


def test_hidden_and_other_files_are_left_out(tmp_path):
    root = write_folder(tmp_path / "photos", WHOLE)
    for name in ("cat/.DS_Store", "cat/Thumbs.db", "cat/._x.jpg", ".cache/x.jpg", "cat/notes.txt"):
        write(root / "train" / name, "x")
    write(root / "readme.md", "BMW and others")
    write(root / "train" / "cover.jpg", jpeg(51))
    write(root / "logo.svg", SVG)
    write(root / "other" / "deep" / "x.jpg", jpeg(52))
    os.mkfifo(root / "train" / "cat" / "pipe")
    (root / "train" / "dog" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "train" / "dog" / "loop").symlink_to("loop")
    (root / "train" / "dog" / "up").symlink_to("..")
    write(root / "train" / "cat" / "CAPITALS.JPEG", jpeg(50))
    images = open_dataset(f"folder:{root}")
    assert images.train.num_examples == 15
    assert load(root).notes == tuple(map(str, images.left_out))
    assert left_out(images) == {
        "files that are not images": ["photos/readme.md", "cat/notes.txt", "cat/pipe"],
        "images outside of the class folders": ["photos/logo.svg", "train/cover.jpg"],
        "folders that belong to no part": ["photos/other"],
        "hidden and system files": ["train/.cache", "cat/.DS_Store", "cat/._x.jpg", "cat/Thumbs.db"],
        "broken links": ["dog/gone.jpg", "dog/loop"],
        "links to a folder that contains them": ["dog/up"],
    }
    assert any(note.startswith("Left out: files that are not images (3): ") for note in map(str, images.left_out))


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8))


def test_images_are_recognized_by_their_content_and_found_in_subfolders(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    names = ["a.jfif", "b.jpe", "noext", "deep/er/x.jpg", "of another.kind", "a.b", "é 猫 #1.PNG"]
    for name in names:
        write(root / "train" / "cat" / name, jpeg(60 + len(name)))
    kinds = {"PNG": "p", "GIF": "g", "BMP": "b", "WEBP": "w"}
    for kind, name in kinds.items():
        write(root / "train" / "dog" / name, encoded(PICTURE, kind))
    (root / "train" / "elk").symlink_to(root / "train" / "dog")
    (root / "test" / "elk").symlink_to(root / "test" / "dog")
    images = open_dataset(f"folder:{root}")
    assert np.bincount(images.train.labels()).tolist() == [8 + len(names), 6 + len(kinds), 6 + len(kinds)]
    assert images.left_out == () and images.bad_images == ()
    for _, data, _ in images.train.records():
        assert decode(data).shape == (12, 16, 3)


def test_files_with_equal_stems_are_different_images(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    write(root / "train/cat/001.PNG", encoded(PICTURE, "PNG"))
    write(root / "train/cat/deep/001.jpg", jpeg(61))
    images = open_dataset(f"folder:{root}")
    assert [name for name in names(images.train) if "001." in name][:3] == [
        "train/cat/001.PNG",
        "train/cat/001.jpg",
        "cat/deep/001.jpg",
    ]


@pytest.mark.parametrize("parts", [("Train", "Test"), ("TRAINING", "Testing"), ("training", "VAL")])
def test_parts_may_be_written_with_capitals(tmp_path, parts):
    counts = {f"{part}/{name}": count for part, count in zip(parts, (4, 2), strict=True) for name in ("a", "b")}
    images = open_dataset(f"folder:{write_folder(tmp_path, counts)}")
    assert (images.class_names, images.train.num_examples, images.test.num_examples) == (("a", "b"), 8, 4)


@pytest.mark.parametrize("classes", [("bus", "train"), ("valid", "invalid"), ("test", "train", "exam")])
def test_classes_may_have_the_names_of_parts(tmp_path, classes):
    images = open_dataset(f"folder:{write_folder(tmp_path, {name: 5 for name in classes})}")
    assert images.class_names == tuple(sorted(classes))


def test_skip_bad_images_leaves_out_bad_images_and_names_them(tmp_path):
    root = write_folder(tmp_path, WHOLE)
    write(root / "train/cat/drawing.svg", SVG)
    write(root / "train/cat/scan", b"II*\0" + bytes(20))
    write(root / "test/dog/empty.png", b"")
    write(root / "train/dog/broken.jpg", b"no image")
    task = load(root, skip_bad_images=True, cache_dir=tmp_path / "cache")
    assert (task.num_train + task.num_validation, task.num_test) == (14, 5)
    assert [name.removeprefix(f"{root}/") for name in task.skipped] == [
        "train/cat/drawing.svg (unsupported image format)",
        "train/cat/scan (unsupported image format)",
        "test/dog/empty.png (empty, 0 bytes)",
        "train/dog/broken.jpg",
    ]


def test_a_class_with_only_bad_images_is_an_error(tmp_path):
    root = write_folder(tmp_path, {"a": 4, "b": 4})
    write(root / "c" / "drawing.svg", SVG)
    with pytest.raises(UserError, match="Every class needs images .*none in .*/c, and images .*cannot be read \\(1\\)"):
        load(root, skip_bad_images=True, cache_dir=tmp_path / "cache")


def test_file_names_that_are_not_text_are_read_and_shown_escaped(tmp_path):
    root = write_folder(tmp_path, {"a": 9, "b": 9})
    for name in (b"\xff\xfe.jpg", b"line\nbreak.jpg"):
        write(root / "a" / os.fsdecode(name), jpeg(70 + len(name)))
    images = open_dataset(f"folder:{root}")
    printed = [*names(images.train), *names(images.test)]
    assert any(name.endswith(r"a/\udcff\udcfe.jpg") for name in printed)
    assert any(name.endswith(r"a/line\nbreak.jpg") for name in printed)
    assert sum(len(labels) for _, labels in load(root).test.as_numpy_iterator()) == 4


def test_leaving_a_class_out_as_the_message_suggests_works(tmp_path):
    root = write_folder(tmp_path, WHOLE | {"train/emu": 3})
    with pytest.raises(UserError, match=r"test part.*Received: none for emu.*classes=\(0, 1\) or --classes=0,1\."):
        load(root)
    assert load(root, classes=(0, 1)).class_names == ("cat", "dog")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("counts", "spoil", "message"),
    [
        ({}, None, r"Received: .*photos, which holds no folder"),
        ({"cat": 3}, None, r"two or more classes. Received: only 'cat'"),
        ({"train/cat": 3, "test/cat": 3}, None, r"two or more classes. Received: only 'cat'"),
        ({"test/cat": 3, "test/dog": 3}, None, r"with test, but without train"),
        ({"train/cat": 3, "train/dog": 3, "test/cat": 1}, None, r"test part of .*Received: none for dog"),
        ({"train/cat": 3, "test/cat": 3, "test/dog": 1}, None, r"training part of .*Received: none for dog"),
        ({"cat": 1, "dog": 3}, None, r"training part of .*Received: none for cat"),
        (WHOLE, lambda root: empty(root / "train/cat/001.jpg"), r"train/cat/001.jpg \(empty, 0 bytes\)\. Convert"),
        (
            WHOLE,
            lambda root: write(root / "train/cat/a.tiff", "x"),
            r"cat/a.tiff \(unsupported image format\)\. Convert",
        ),
        (
            WHOLE,
            lambda root: write(root / "test/dog/a", SVG),
            r"dog/a \(unsupported .*skip_bad_images=True \(--skip_bad_images\)",
        ),
        (
            WHOLE,
            lambda root: write(root / "train/Cat/a.jpg", jpeg(0)),
            r"none for Cat\. Add some images, or .*--classes=1,2",
        ),
        (WHOLE, lambda root: (root / "TRAIN").mkdir(), r"one folder for each part. Received: TRAIN and train in"),
        ({"val/a": 1, "valid/a": 1}, None, r"one folder for each part. Received: val and valid in"),
        (
            {"train/steam": 1, "bus": 1},
            None,
            r"its parts or those of its classes. Received: train and bus .*folder:.*photos/train, or rename",
        ),
        ({"a": 2, "b\nc": 2}, None, r"without tabs .* Received: 'b\\nc' in"),
        ({"a": 2, "b\tc": 2}, None, r"Received: 'b\\tc' in"),
        ({"a": 2, "b\u2028c": 2}, None, r"Received: 'b\\u2028c' in"),
        ({"a": 2, "  ": 2}, None, r"not blank.* Received: '  ' in"),
        ({"a": 2, os.fsdecode(b"b\xff"): 2}, None, r"Received: 'b\\udcff' in"),
        (WHOLE, lambda root: shutil.rmtree(root / "train/cat") or (root / "train/cat").mkdir(), r"none in .*train/cat"),
        (
            WHOLE,
            lambda root: shutil.rmtree(root / "test") or (root / "test").mkdir(),
            r"Received: .*test, which holds no folder",
        ),
    ],
)
def test_bad_folders_are_refused_with_their_name(tmp_path, counts, spoil, message):
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
    with pytest.raises(UserError, match=r"train/cat/001.jpg \(permission denied\)"):
        load(root)


@pytest.mark.parametrize("name", ["digits", "split"])
def test_a_split_seed_that_would_have_no_effect_is_refused(tmp_path, data_dir, name):
    dataset = f"folder:{write_folder(tmp_path, WHOLE)}" if name == "split" else name
    with pytest.raises(UserError, match="split_seed is only for a folder.*Received: split_seed=7"):
        make_task(dataset, batch_size=4, split_seed=7, data_dir=data_dir)
