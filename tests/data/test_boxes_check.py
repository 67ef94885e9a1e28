"""`python -m robust_tf.data --check` for detection and segmentation."""

import json

import pytest

from robust_tf.data.__main__ import main
from robust_tf.data.dataset_check import check_dataset
from robust_tf.errors import UserError
from tests.data.annotated import CATEGORIES, coco, gray, mask_pixels, write_boxes, write_masks
from tests.data.images import jpeg, write

TREES = coco([[(3, [-2, 1, 5, 4]), (17, [0, 0, 4, 4]), (90, [1, 1, 2, 2])], [], [(3, [1, 1, 4, 4], 1)]])


def run(*arguments):
    return main(["data", "--check", *map(str, arguments)])


def test_boxes_are_counted(tmp_path, capsys):
    root = write_boxes(tmp_path, train=TREES)
    assert run("--task_type=detection", f"folder:{root}") == 0
    text = capsys.readouterr().out
    assert f"folder:{root}: ready" in text
    assert "3 classes, 3 training and 2 test images" in text
    assert "training part: 3 boxes, 1 crowd boxes, 1 images without boxes" in text
    assert "test part: 2 boxes, 0 crowd boxes, 0 images without boxes" in text
    assert "boxes of each class, training / test: car 1 / 1, cat 1 / 1, toothbrush 1 / 0" in text
    assert "Boxes that reach beyond their image and are cut off at its edge: 1." in text


def test_only_some_classes_are_listed():
    from robust_tf.data.boxes.check import more_classes
    from robust_tf.data.records import LabeledImages

    images = LabeledImages.__new__(LabeledImages)
    object.__setattr__(images, "class_names", tuple(map(str, range(23))))
    assert more_classes(images) == " and 3 more classes"


def test_faults_of_boxes_are_named(tmp_path, capsys):
    root = write_boxes(tmp_path, train=coco([[(17, [0, 0, 4, 4]), (3, [0, 0, 4, 4], 1)], []]))
    write(root / "train/002.jpg", b"\xff\xd8\xff")
    write(root / "test/011.jpg", jpeg(1))  # train/001.jpg
    assert run("--task_type=detection", f"folder:{root}") == 1
    assert "002.jpg" in capsys.readouterr().out  # its size cannot be read
    write(root / "train/002.jpg", jpeg(2)[:650])
    assert run("--task_type=detection", f"folder:{root}") == 1
    text = capsys.readouterr().out
    assert "Received: none for car, toothbrush." in text
    assert "Images that cannot be decoded (1): " in text and "that are also in the training part (1)" in text
    write(root / "train/annotations.json", json.dumps(coco([[(3, [2, 1, 0, 4])]])))
    result = check_dataset(f"folder:{root}", task_type="detection")
    assert result.state == "faulty" and "width and a height" in result.advice[0]


def test_a_test_part_with_only_crowd_boxes_is_a_fault(tmp_path):
    test = coco([[(3, [1, 1, 4, 4], 1)]], first_id=11)
    train = coco([[(3, [1, 1, 4, 4])]], categories=CATEGORIES[1:2])
    root = write_boxes(tmp_path, train=train, test=test | {"categories": CATEGORIES[1:2]})
    result = check_dataset(f"folder:{root}", task_type="detection")
    assert result.facts[1] == "1 class, 1 training and 1 test images"
    assert result.advice == ("The test part needs boxes that are no crowd boxes. Received: none. Add some images.",)


def test_pixels_are_counted(tmp_path, capsys):
    root = write_masks(tmp_path)
    for number in range(3):
        pixels = mask_pixels(0) * 0
        pixels[:6], pixels[6:9] = 1, 2
        pixels[:, :8] = 255
        write(root / f"train/masks/{number:02d}.png", gray(pixels))
    assert run("--task_type=segmentation", f"folder:{root}") == 0
    text = capsys.readouterr().out
    assert "class 0 25.00% / " in text and "class 1 50.00% / " in text and "class 2 25.00% / " in text
    assert "ignored pixels, training / test: 50.00% / " in text


def test_faults_of_masks_are_named(tmp_path):
    root = write_masks(tmp_path)
    write(root / "classes.txt", "a\nb\nc\nd\n")
    result = check_dataset(f"folder:{root}", task_type="segmentation")
    assert result.state == "faulty"
    assert "Every class needs pixels in the training part. Received: none for d." in result.advice[0]
    for number in (10, 11):
        write(root / f"test/masks/{number}.png", gray(mask_pixels(0) * 0 + 255))
    result = check_dataset(f"folder:{root}", task_type="segmentation")
    assert "The test part needs pixels that are not ignored. Received: none." in result.advice[1]


def test_wrong_arguments_are_refused():
    with pytest.raises(UserError, match="--task_type=detection needs the names of data sets"):
        run("--task_type=detection")
    with pytest.raises(UserError, match="'detections'. Did you mean 'detection'"):
        run("--task_type=detections", "folder:x")
    with pytest.raises(UserError, match="Unknown task type. Received: 'boxes'"):
        check_dataset("folder:x", task_type="boxes")
