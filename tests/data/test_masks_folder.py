"""Folders of images with masks: layouts, classes, and the faults that are named."""

import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from robust_tf.data.masks import decode_mask, open_masks
from robust_tf.data.masks import folder as mask_folder
from robust_tf.data.masks.folder import VOC_CLASSES
from robust_tf.data.masks.mask_files import read_mask
from robust_tf.errors import UserError
from tests.data.annotated import gray, mask_pixels, palette, turned_photo, write_masks, write_pairs
from tests.data.images import encoded, jpeg, write


def write_voc(root, lists, *, with_masks=("train", "val", "trainval", "test")):
    for part, names in lists.items():
        write(root / "ImageSets/Segmentation" / f"{part}.txt", "".join(f"{name}\n" for name in names))
        for name in names:
            write(root / "JPEGImages" / f"{name}.jpg", jpeg(int(name)))
            if part in with_masks:
                write(root / "SegmentationClass" / f"{name}.png", palette(mask_pixels(int(name), (0, 15, 20, 255))))
    return root


def opened(root, **options):
    return open_masks(f"folder:{root}", **options)


def names_of(part):
    return [os.path.basename(part.name(index)) for index in range(part.num_examples)]


def test_records_have_the_image_and_its_mask_in_any_order(tmp_path):
    write_pairs(tmp_path / "train", 4, encode=palette)
    write_pairs(tmp_path / "val", 1, first=5, encode=palette)
    write_pairs(tmp_path / "testing", 2, first=10, encode=palette)
    images = opened(tmp_path)
    assert images.class_names == ("class 0", "class 1", "class 2")
    assert images.validation.tolist() == [False] * 4 + [True]
    assert names_of(images.test) == ["10.jpg", "11.jpg"]
    records = list(images.train.records().as_numpy_iterator())
    for position, number in ((3, 3), (0, 0), (4, 5)):
        index, image, label = images.train.record(position)
        assert (int(index), image.numpy(), label.numpy()) == records[position]
        assert image.numpy() == jpeg(number)
        expected = mask_pixels(number).astype(np.int32)
        np.testing.assert_array_equal(decode_mask(label), np.where(expected == 255, -1, expected))
    for mask, number in zip(images.train.masks(), [0, 1, 2, 3, 5], strict=True):
        np.testing.assert_array_equal(mask, mask_pixels(number))
    assert images.train.labels().tolist() == [0] * 5


def test_a_fifth_of_a_single_part_becomes_the_test_part(tmp_path):
    images = opened(write_pairs(tmp_path, 20))
    assert (images.train.num_examples, images.test.num_examples) == (16, 4)
    assert len({*names_of(images.train), *names_of(images.test)}) == 20
    for path, mask in zip(images.test.paths, images.test.mask_paths, strict=True):
        assert os.path.basename(path)[:2] == os.path.basename(mask)[:2]
    assert names_of(opened(tmp_path, split_seed=1).test) != names_of(images.test)


@pytest.mark.parametrize("test_has_masks", [True, False])
def test_the_layout_of_voc(tmp_path, test_has_masks):
    lists = {"train": ["01", "02"], "val": ["03"], "trainval": ["01", "02", "03"], "test": ["04"]}
    root = write_voc(tmp_path, lists, with_masks=("train", "val", *(["test"] if test_has_masks else [])))
    images = opened(root)
    assert images.class_names == VOC_CLASSES and len(VOC_CLASSES) == 21 and VOC_CLASSES[15] == "person"
    assert names_of(images.test) == (["04.jpg"] if test_has_masks else ["03.jpg"])
    assert images.train.num_examples == (3 if test_has_masks else 2)
    assert (images.validation is None) == (not test_has_masks)
    np.testing.assert_array_equal(next(images.train.masks()), mask_pixels(1, (0, 15, 20, 255)))


def test_only_trainval_of_voc_is_split(tmp_path):
    images = opened(write_voc(tmp_path, {"trainval": [f"{number:02d}" for number in range(10)]}))
    assert (images.train.num_examples, images.test.num_examples) == (8, 2)


def test_names_of_classes_from_a_file(tmp_path):
    root = write_masks(tmp_path)
    write(root / "classes.txt", "sky\r\nroad\ncar\nnever seen\n\n")
    assert opened(root).class_names == ("sky", "road", "car", "never seen")
    write(root / "classes.txt", "sky\nroad\n")
    with pytest.raises(UserError, match=r"must be 0 to 1,.*Received: 2 in .*00\.png.*classes\.txt"):
        opened(root)
    write(root / "classes.txt", "sky\nsky\n")
    with pytest.raises(UserError, match=r"must differ. Received: sky twice"):
        opened(root)
    write(root / "classes.txt", "\n")
    with pytest.raises(UserError, match=r"classes\.txt, which is empty"):
        opened(root)
    write(root / "classes.txt", "sky\n\nroad\n")
    with pytest.raises(UserError, match="one line of text that is not blank"):
        opened(root)
    write(root / "classes.txt", b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"Cannot read .*classes\.txt.*Save it as UTF-8"):
        opened(root)


def test_the_fingerprint_follows_images_and_masks(tmp_path):
    root = write_masks(tmp_path / "a")
    before = opened(root).fingerprint
    shutil.copytree(root, tmp_path / "b")
    assert opened(tmp_path / "b").fingerprint == before
    os.utime(root / "train/masks/00.png", ns=(1, 1))
    masks = opened(root).fingerprint
    os.utime(root / "train/images/00.jpg", ns=(1, 1))
    assert len({before, masks, opened(root).fingerprint}) == 3


def image_with(mode, value):
    image = Image.new(mode, (16, 12))
    image.putpixel((2, 1), value)
    return encoded(image, "PNG")


@pytest.mark.parametrize(("mode", "stored", "value"), [("L", 7, 7), ("I;16", 7, 7), ("1", 1, 1)])
def test_all_formats_with_one_number_for_each_pixel(mode, stored, value):
    expected = np.zeros((12, 16), np.int32)
    expected[1, 2] = value
    content = image_with(mode, stored)
    mask = read_mask(content, "x.png")
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.int32
    decoded = tf.data.Dataset.from_tensors(content).map(decode_mask)
    assert decoded.element_spec.shape.as_list() == [None, None]
    np.testing.assert_array_equal(next(decoded.as_numpy_iterator()), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (image_with("RGB", (1, 1, 1)), r"must be class numbers.*Received: RGB for .*train.masks.01\.png"),
        (image_with("RGBA", (1, 1, 1, 1)), r"Received: RGBA for .*01\.png.*save it as a gray|Received: RGBA for"),
        (image_with("LA", (1, 1)), r"Received: LA for .*01\.png"),
        (jpeg(0, gray=True), r"must be a PNG file that can be read. Received: .*01\.png \(not a PNG\)"),
        (gray(mask_pixels(1))[:60], r"must be a PNG file that can be read. Received: .*01\.png"),
        (
            gray(mask_pixels(1)[:, :15]),
            r"the size of its image. Received: 15x12 pixels .* .*01\.png, whose image has 16x12",
        ),
        (gray(mask_pixels(1).T.copy()), r"Received: 12x16 pixels .* .*01\.png, whose image has 16x12"),
        (image_with("I;16", 256), r"must be 0 to 254.*Received: 256 in the masks of"),
    ],
)
def test_faults_of_masks_are_named(tmp_path, content, message):
    root = write_masks(tmp_path)
    write(root / "train/masks/01.png", content)
    with pytest.raises(UserError, match=message):
        opened(root)


def test_a_value_that_only_the_test_part_has_is_refused(tmp_path):
    root = write_masks(tmp_path)
    write(root / "test/masks/10.png", gray(mask_pixels(1, (0, 4))))
    with pytest.raises(UserError, match=r"must be 0 to 2,.*Received: 4 in .*test.masks.10\.png"):
        opened(root)


def test_masks_of_a_large_data_set_are_checked_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_folder, "MOST_OPENED_FILES", 2)
    root = write_masks(tmp_path)
    write(root / "train/masks/01.png", gray(mask_pixels(1, (0, 4))))  # not among the masks that are looked at
    images = opened(root)
    assert images.class_names == ("class 0", "class 1", "class 2")
    assert len(images.train.record(tf.constant(0, tf.int64))[2].numpy()) > 0
    with pytest.raises(tf.errors.OpError, match=r"must be 0 to 2.*Received: 4 in .*01\.png"):
        list(images.train.records())


def test_binary_masks_with_255_are_refused(tmp_path):
    with pytest.raises(UserError, match="needs 2 to 255 classes. Received: 1 in .*write 1 instead"):
        opened(write_masks(tmp_path, values=(0, 255)))


def test_masks_of_the_turned_image_are_noted(tmp_path):
    root = write_masks(tmp_path)
    write(root / "train/images/01.jpg", turned_photo())
    assert "annotations of 1 images belong to the image as its EXIF" in str(opened(root).notes)


def test_files_without_a_partner_are_named(tmp_path):
    root = write_masks(tmp_path)
    (root / "train/masks/01.png").unlink()
    with pytest.raises(UserError, match=r"Every image needs a mask.*none for .*train.images.01\.jpg \(1\)"):
        opened(root)
    shutil.rmtree(root / "train")
    write_pairs(root / "train", 3)
    (root / "train/images/02.jpg").unlink()
    with pytest.raises(UserError, match=r"Every mask needs an image.*none for .*train.masks.02\.png \(1\)"):
        opened(root)
    write(root / "train/images/02.jpg", b"broken")
    with pytest.raises(UserError, match=r"Every image must be a file that can be read. Received: .*02\.jpg"):
        opened(root)
    shutil.rmtree(root / "train/masks")
    with pytest.raises(UserError, match=r"folders images and masks. Received: no .*train.masks"):
        opened(root)


def test_faults_of_lists_are_named(tmp_path):
    root = write_voc(tmp_path, {"train": ["01", "02"], "val": ["03"]})
    (root / "SegmentationClass/02.png").unlink()
    with pytest.raises(
        UserError, match=r"needs a mask in SegmentationClass. Received: .*train\.txt, and no mask for 02"
    ):
        opened(root)
    (root / "ImageSets/Segmentation/train.txt").unlink()
    with pytest.raises(UserError, match=r"train\.txt or trainval\.txt.*Received: neither in"):
        opened(root)


def test_other_folders_and_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="no_such, which is not a folder"):
        opened(tmp_path / "no_such")
    with pytest.raises(UserError, match="has one of these layouts.*which has none"):
        opened(tmp_path)
    with pytest.raises(UserError, match="split_seed=1, and the test part"):
        opened(write_masks(tmp_path), split_seed=1)
    with pytest.raises(UserError, match="folder:/path or tfds:NAME.*Received: 'pets'"):
        open_masks("pets")
    with pytest.raises(UserError, match="split_seed=2 for tfds:x"):
        open_masks("tfds:x", split_seed=2)
