"""Folders of images with boxes: the layouts of COCO and Pascal VOC, and the faults that are named."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from robust_tf.data.boxes import folder as box_folder
from robust_tf.data.boxes import open_boxes
from robust_tf.data.boxes.records import decode_boxes
from robust_tf.errors import UserError
from tests.data.annotated import CATEGORIES, TEST, TRAIN, coco, turned_photo, write_boxes, write_coco
from tests.data.images import encoded, jpeg, write


def voc_xml(objects, *, size=(16, 12)):
    """XML of one image. `objects` has (name, xmin, ymin, xmax, ymax[, difficult])."""
    text = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    for name, left, top, right, bottom, *difficult in objects:
        edges = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        # A part of an object also has a box, which is not an object.
        part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        flag = f"<difficult>{difficult[0]}</difficult>" if difficult else ""
        text += f"<object><name>{name}</name>{flag}{part}<bndbox>{edges}</bndbox></object>"
    return f"<annotation><filename>wrong.jpg</filename>{text}</annotation>"


def write_voc(root, lists, *, with_xml=("train", "val", "trainval", "test")):
    """Writes VOC's own layout, with two objects in each image of the lists."""
    for part, names in lists.items():
        write(root / "ImageSets/Main" / f"{part}.txt", "".join(f"{name}\n" for name in names))
        write(root / "ImageSets/Main" / f"dog_{part}.txt", "".join(f"{name} -1\n" for name in names))
        for name in names:
            write(root / "JPEGImages" / f"{name}.jpg", jpeg(int(name)))
            if part in with_xml:
                content = voc_xml([("dog", 1, 1, 16, 12), ("cat", 3, 2, 8, 6, 1)])
                write(root / "Annotations" / f"{name}.xml", content)
    return root


def opened(root, **options):
    return open_boxes(f"folder:{root}", **options)


def boxes_of(part):
    return [rows.tolist() for rows in part.boxes()]


def names_of(part):
    return [os.path.basename(part.name(index)) for index in range(part.num_examples)]


# Rows [top, left, bottom, right, class, crowd] of TRAIN, whose classes are car, cat and toothbrush.
TRAIN_ROWS = [[[1, 2, 5, 7, 1, 0], [0, 0, 12, 16, 2, 1]], [], [[2.25, 8.5, 8.25, 12.5, 0, 0]]]


@pytest.mark.parametrize("year", ["2017", ""])
def test_the_layout_of_coco(tmp_path, year):
    for part, content in (("train", TRAIN), ("val", TEST)):
        write_coco(tmp_path / "annotations" / f"instances_{part}{year}.json", tmp_path / f"{part}{year}", content)
    images = opened(tmp_path)
    assert images.class_names == ("car", "cat", "toothbrush")
    assert boxes_of(images.train) == TRAIN_ROWS
    assert boxes_of(images.test) == [[[2, 1, 6, 4, 0, 0]], [[1, 1, 2, 2, 1, 0]]]
    assert images.validation is None and images.notes == ()
    assert images.train.most_boxes() == 2


@pytest.mark.parametrize("images_folder", ["", "images"])
def test_a_json_file_for_each_part(tmp_path, images_folder):
    for part, content in (("train", TRAIN), ("valid", coco([[]], first_id=21)), ("test", TEST)):
        write_coco(tmp_path / part / "_annotations.coco.json", tmp_path / part / images_folder, content)
    images = opened(tmp_path)
    assert boxes_of(images.train) == [*TRAIN_ROWS, []]
    assert images.validation.tolist() == [False] * 3 + [True]
    assert names_of(images.test) == ["011.jpg", "012.jpg"]


def test_records_have_the_image_and_its_boxes_in_any_order(tmp_path):
    train = opened(write_boxes(tmp_path)).train
    records = list(train.records().as_numpy_iterator())
    assert [index for index, _, _ in records] == [0, 1, 2]
    for index in (2, 0, 1):
        number, image, label = train.record(index)
        assert (int(number), image.numpy(), label.numpy()) == records[index]
        assert image.numpy() == jpeg(index + 1)  # the id of the image
        boxes, classes, crowd = decode_boxes(label)
        rows = np.float32(TRAIN_ROWS[index]).reshape(-1, 6)
        np.testing.assert_array_equal(boxes, rows[:, :4])
        np.testing.assert_array_equal(classes, rows[:, 4])
        np.testing.assert_array_equal(crowd, rows[:, 5])
    assert train.labels().tolist() == [0, 0, 0]


def test_a_fifth_of_a_single_part_becomes_the_test_part(tmp_path):
    content = coco([[(3, [1, 1, 2, number % 5 + 1])] for number in range(20)])
    write_coco(tmp_path / "annotations.json", tmp_path / "images", content)
    images = opened(tmp_path)
    assert (images.train.num_examples, images.test.num_examples) == (16, 4)
    assert len({*names_of(images.train), *names_of(images.test)}) == 20
    for part in (images.train, images.test):  # the boxes stay with their images
        for name, rows in zip(names_of(part), part.boxes(), strict=True):
            assert rows[0, 2] - rows[0, 0] == (int(name[:3]) - 1) % 5 + 1
    assert names_of(opened(tmp_path).test) == names_of(images.test)
    assert names_of(opened(tmp_path, split_seed=1).test) != names_of(images.test)


def test_the_fingerprint_follows_images_and_boxes(tmp_path):
    root = write_boxes(tmp_path / "a")
    before = opened(root).fingerprint
    shutil.copytree(root, tmp_path / "b")
    assert opened(tmp_path / "b").fingerprint == before
    write(root / "train/annotations.json", json.dumps(coco([[(17, [2, 1, 5, 3])], [], []])))
    boxes = opened(root).fingerprint
    os.utime(root / "train/001.jpg", ns=(1, 1))
    assert len({before, boxes, opened(root).fingerprint}) == 3


def test_boxes_beyond_the_image_are_clipped_and_counted(tmp_path):
    content = coco([[(3, [-2, -3, 6, 7]), (3, [10, 5, 6, 99]), (3, [0, 0, 16.004, 12])]])
    images = opened(write_boxes(tmp_path, train=content))
    assert boxes_of(images.train) == [[[0, 0, 4, 4, 0, 0], [5, 10, 12, 16, 0, 0], [0, 0, 12, 16, 0, 0]]]
    assert images.notes == ("Boxes that reach beyond their image and are cut off at its edge: 2.",)


def test_boxes_without_area_are_left_out_in_the_layout_of_coco_only(tmp_path):
    content = coco([[(3, [1, 1, 2, 2]), (3, [9.98, 3.5, 5.5, 0.0])]])
    write_coco(tmp_path / "annotations/instances_train.json", tmp_path / "train", content)
    write_coco(tmp_path / "annotations/instances_val.json", tmp_path / "val", TEST)
    images = opened(tmp_path)
    assert boxes_of(images.train) == [[[1, 1, 3, 3, 0, 0]]]
    assert "without area, which are left out (1): annotation 2 (image 001.jpg" in images.notes[0]


def test_annotations_of_the_turned_image_are_noted(tmp_path):
    root = write_boxes(tmp_path)
    write(root / "train/001.jpg", turned_photo())
    assert "annotations of 1 images belong to the image as its EXIF data turns it. Use --exif=apply" in str(
        opened(root).notes
    )


def faulty(content, **changes):
    return {**content, **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"must be a JSON file.*Received: .*train.annotations\.json, which is no JSON"),
        ("[" * 100_000, "must be a JSON file"),
        ([], "lists images, annotations and categories.*without images and annotations and categories, with list"),
        ({"images": [], "info": 1}, "without annotations and categories, with images, info"),
        (faulty(TRAIN, images=[3]), "entries of images must be JSON objects.*Received: 3"),
        (faulty(TRAIN, images=[{"id": 1}]), "Every image needs file_name, a text. Received: None"),
        (
            faulty(TRAIN, images=[{"file_name": "001.jpg"}]),
            "Every image needs id, an integer or a text. Received: None",
        ),
        (faulty(TRAIN, images=TRAIN["images"] * 2), "must be listed once. Received: image id 1 twice"),
        (
            faulty(TRAIN, images=[*TRAIN["images"], {"id": 9, "file_name": "002.jpg"}]),
            r"must be listed once. Received: file 002\.jpg twice",
        ),
        (faulty(TRAIN, images=TRAIN["images"][:1]), "Received: image_id 3 of annotation 3 in"),
        (
            faulty(TRAIN, images=[{"id": 1, "file_name": "no.jpg"}], annotations=[]),
            r"must exist. Received: no\.jpg, whi",
        ),
        (faulty(TRAIN, images=[{"id": 1, "file_name": "../x.jpg"}]), r"within the folder.*Received: '\.\./x\.jpg'"),
        (faulty(TRAIN, categories=[{"id": 1}]), "Every category needs name, a text. Received: None"),
        (faulty(TRAIN, categories=[{"id": "1", "name": "x"}]), "Every category needs id, an integer. Received: '1'"),
        (
            faulty(TRAIN, categories=CATEGORIES + CATEGORIES[:1]),
            "its own id and name. Received: 'toothbrush' with id 90",
        ),
        (coco([[(4, [1, 1, 2, 2])]]), "category_id 4 of annotation 1 in .*which lists 3, 17, 90"),
        (coco([[(3, [1, 1, 2])]]), r"bbox must be four numbers.*Received: \[1, 1, 2\] of annotation 1"),
        (coco([[(3, [1, 1, 2, "2"])]]), r"bbox must be four numbers.*Received: \[1, 1, 2, '2'\]"),
        (
            coco([[(3, [2, 1, 0, 4])]]),
            r"width and a height. Received: .* 1, 2, 5, 2 of annotation 1, image 001\.jpg of",
        ),
        (coco([[(3, [2, 1, 3, -4])]]), "width and a height. Received: .* 1, 2, -3, 5 of annotation 1"),
        (coco([[(3, [2, 1, float("nan"), 4])]]), "width and a height. Received: .* 1, 2, 5, nan of annotation 1"),
        (coco([[(3, [16, 1, 3, 4])]]), r"partly within its image. Received: .* 1, 16, 5, 19 .*has 16x12 pixels"),
        (coco([[]]), "needs boxes for training. Received: none"),
        (coco([]), "images for training and testing. Received: none"),
        (faulty(TRAIN, categories=CATEGORIES[1:]), "Received: category_id 90 of annotation 2"),
        (
            coco([[(3, [1, 1, 2, 2])]], categories=[{"id": 3, "name": "bus"}, *CATEGORIES[::2]]),
            r"same categories. Received: 'bus' with id 3, 'car' with id 3 in only one of",
        ),
        (
            coco([[(3, [1, 1, 2, 2])]], categories=[{"id": 3, "name": " "}]),
            "one line of text that is not blank|same categories",
        ),
    ],
)
def test_faults_of_json_files_are_named(tmp_path, content, message):
    root = write_boxes(tmp_path)
    write(root / "train/annotations.json", content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message):
        opened(root)


def test_a_data_set_without_categories_is_refused(tmp_path):
    empty = coco([[]], categories=[])
    with pytest.raises(UserError, match="needs one class or more. Received: none in"):
        opened(write_boxes(tmp_path, train=empty, test=empty))


def test_a_single_class_is_enough(tmp_path):
    content = coco([[(3, [1, 1, 2, 2])]] * 2, categories=CATEGORIES[1:2])
    assert opened(write_boxes(tmp_path, train=content, test=content)).class_names == ("car",)


def test_a_size_that_differs_from_the_image_is_refused(tmp_path):
    root = write_boxes(tmp_path)
    write(root / "train/002.jpg", encoded(Image.fromarray(np.zeros((12, 15, 3), np.uint8)), "JPEG"))
    with pytest.raises(UserError, match=r"Received: 16x12 pixels .* for image 002\.jpg of .*whose file has 15x12"):
        opened(root)


def test_images_of_a_large_data_set_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(box_folder, "MOST_OPENED_FILES", 4)
    root = write_boxes(tmp_path)
    write(root / "train/001.jpg", b"broken")
    assert boxes_of(opened(root).train) == TRAIN_ROWS
    del TEST_WITHOUT_SIZE["images"][0]["height"]
    write(root / "test/annotations.json", json.dumps(TEST_WITHOUT_SIZE))
    write(root / "test/011.jpg", b"broken")
    with pytest.raises(UserError, match=r"file that can be read. Received: .*test/011\.jpg"):
        opened(root)


TEST_WITHOUT_SIZE = json.loads(json.dumps(TEST))


def test_folders_in_no_layout_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no_such, which is not a folder"):
        opened(tmp_path / "no_such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has one of these layouts: .*Received: .*empty, which has none"):
        opened(tmp_path / "empty")
    root = write_boxes(tmp_path / "two")
    write(root / "val/001.jpg", jpeg(1))
    with pytest.raises(UserError, match=r"no JSON file in .*val, but .*train.annotations\.json"):
        opened(root)
    shutil.rmtree(root / "val")
    write(root / "training/x.txt", "")
    with pytest.raises(UserError, match="one folder for each part. Received: train and training"):
        opened(root)
    shutil.rmtree(root / "training")
    with pytest.raises(UserError, match=r"split_seed=3, and the test part in "):
        opened(root, split_seed=3)
    (root / "train/annotations.json").rename(root / "train/one.json")
    write(root / "train/two.json", "{}")
    with pytest.raises(UserError, match=r"one file of annotations. Received: .*one\.json, .*two\.json"):
        opened(root)
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="needs a folder that is called train. Received: .* with test, but"):
        opened(root)


def test_two_years_of_coco_are_refused(tmp_path):
    for year in ("2014", "2017"):
        write_coco(tmp_path / f"annotations/instances_train{year}.json", tmp_path / f"train{year}", TRAIN)
    with pytest.raises(UserError, match=r"Received: .*instances_train2014\.json, .*instances_train2017\.json"):
        opened(tmp_path)


def test_other_names_are_refused():
    with pytest.raises(UserError, match="folder:/path or tfds:NAME.*Received: 'pets'"):
        open_boxes("pets")
    with pytest.raises(UserError, match="split_seed=2 for tfds:voc"):
        open_boxes("tfds:voc", split_seed=2)


# Rows of the objects of `write_voc`: classes cat and dog, pixels counted from 1 to the last one.
VOC_ROWS = [[0, 0, 12, 16, 1, 0], [1, 2, 6, 8, 0, 1]]


@pytest.mark.parametrize("test_has_boxes", [True, False])
def test_the_layout_of_voc(tmp_path, test_has_boxes):
    lists = {"train": ["01", "02"], "val": ["03"], "trainval": ["01", "02", "03"], "test": ["04"]}
    root = write_voc(tmp_path, lists, with_xml=("train", "val", *(["test"] if test_has_boxes else [])))
    images = opened(root)
    assert images.class_names == ("cat", "dog")
    if test_has_boxes:
        assert names_of(images.train) == ["01.jpg", "02.jpg", "03.jpg"] and names_of(images.test) == ["04.jpg"]
        assert images.validation.tolist() == [False, False, True]
    else:
        assert names_of(images.train) == ["01.jpg", "02.jpg"] and names_of(images.test) == ["03.jpg"]
        assert images.validation is None
    assert boxes_of(images.test) == [VOC_ROWS] and boxes_of(images.train)[0] == VOC_ROWS


def test_only_trainval_of_voc_is_split(tmp_path):
    images = opened(write_voc(tmp_path, {"trainval": [f"{number:02d}" for number in range(10)]}))
    assert (images.train.num_examples, images.test.num_examples) == (8, 2)


@pytest.mark.parametrize("folders", [("", ""), ("images", "annotations")])
def test_xml_files_next_to_images(tmp_path, folders):
    for number in range(1, 6):
        part = "train" if number < 5 else "test"
        write(tmp_path / part / folders[0] / f"a.{number}.jpg", jpeg(number))
        content = voc_xml([("cow", number, 2, 16, 12)] if number != 2 else [], size=(0, 0) if number == 3 else None)
        write(tmp_path / part / folders[1] / f"a.{number}.xml", content)
    images = opened(tmp_path)
    assert boxes_of(images.train) == [[[1, left, 12, 16, 0, 0]] if left != 1 else [] for left in range(4)]
    assert images.test.num_examples == 1
    alone = opened(tmp_path / "train")
    assert (alone.train.num_examples, alone.test.num_examples) == (3, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<annotation>", r"must be an XML file. Received: .*01\.xml \(no element found"),
        (b"<html></html>", "one element called annotation. Received: html"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><annotation/>', "without a document type declaration"),
        ('<?xml version="1.0" encoding="UTF-16"?><!doctype x><annotation/>'.encode("utf-16"), "document type decl"),
        (b'<?xml version="1.0" encoding="nope"?><annotation/>', "must be an XML file"),
        (voc_xml([("", 1, 1, 2, 2)]), r"needs a name.*none for object 1 of .*01\.xml"),
        (voc_xml([("cat", "a", 1, 2, 2)]), r"bndbox/xmin must be a number. Received: 'a' for object 1 of .*01\.xml"),
        (voc_xml([("cat", "nan", 1, 2, 2)]), r"width and a height.*nan.*object 1 of .*01\.xml"),
        (voc_xml([("cat", 3, 1, 2, 2)]), r"width and a height. Received: .* 0, 2, 2, 2 of object 1 of .*01\.xml"),
        (voc_xml([("cat", 20, 1, 22, 2)]), r"partly within its image. Received: .* 0, 19, 2, 22 of object 1"),
        (voc_xml([("cat", 2, 1, 3, 2)], size=(99, 12)), r"Received: 99x12 pixels .* for image .*01\.jpg"),
        (None, r"Every image of a list needs an XML file. Received: .*train\.txt, and no .*01\.xml"),
    ],
)
def test_faults_of_xml_files_are_named(tmp_path, content, message):
    root = write_voc(tmp_path, {"train": ["01", "02"], "val": ["03"]})
    if content is None:
        (root / "Annotations/01.xml").unlink()
    else:
        write(root / "Annotations/01.xml", content)
    with pytest.raises(UserError, match=message):
        opened(root)


def test_missing_files_and_repeated_names_of_voc_are_named(tmp_path):
    root = write_voc(tmp_path / "voc", {"train": ["01", "02"], "val": ["03"]})
    (root / "JPEGImages/02.jpg").unlink()
    with pytest.raises(UserError, match=r"must exist. Received: .*train\.txt, and no .*02\.jpg"):
        opened(root)
    write(root / "ImageSets/Main/train.txt", "01\n01\n")
    with pytest.raises(UserError, match=r"listed once. Received: 01 twice in .*train\.txt"):
        opened(root)
    (root / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(UserError, match=r"needs the list .*train\.txt or trainval\.txt.*Received: neither in"):
        opened(root)

    plain = tmp_path / "plain"
    for number in range(3):
        write(plain / f"{number}.jpg", jpeg(number))
        write(plain / f"{number}.xml", voc_xml([("cat", 1, 1, 2, 2)]))
    (plain / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"Every XML file needs an image.*none for .*1\.xml"):
        opened(plain)
    (plain / "1.xml").unlink()
    (plain / "2.xml").unlink()
    with pytest.raises(UserError, match=r"Every image needs an XML file.*none for .*2\.jpg"):
        opened(plain)
    write(plain / "0.png", encoded(Image.new("RGB", (3, 3)), "PNG"))
    with pytest.raises(UserError, match=r"differ in more than the suffix.*0\.jpg and .*0\.png"):
        opened(plain)
    write(plain / "3.jpg", b"")
    with pytest.raises(UserError, match=r"Received: .*3\.jpg \(empty, 0 bytes\)|differ in more than the suffix"):
        opened(plain)
