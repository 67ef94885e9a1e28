"""`tfds:NAME` for detection: coordinates, splits and refused data sets, on small and mocked data sets."""

from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from robust_tf.data.__main__ import main
from robust_tf.data.boxes import open_boxes, tfds_boxes
from robust_tf.data.dataset_check import check_dataset
from robust_tf.data.tfds_preparation import builder_of
from robust_tf.errors import UserError


class _SmallBoxes(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Images of 20x40 pixels. `SPLITS` has the objects of each image: (bbox, label, is_crowd)."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS: dict[str, Any]
    CROWD_KEY = "is_crowd"
    ENCODING = "jpeg"

    def _info(self):
        objects = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            self.CROWD_KEY: np.bool_,
            "area": np.int64,
        }
        features = {
            "image": tfds.features.Image(encoding_format=self.ENCODING),
            "image/filename": tfds.features.Text(),
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(images) for split, images in self.SPLITS.items()}

    def _generate_examples(self, images):
        for key, objects in enumerate(images):
            listed = [
                {"bbox": tfds.features.BBox(*box), "label": label, self.CROWD_KEY: crowd, "area": 1}
                for box, label, crowd in objects
            ]
            image = np.full((20, 40, 3), key, np.uint8)
            yield key, {"image": image, "image/filename": f"{key}.jpg", "objects": listed}


_SOME = [((0.25, 0.5, 0.75, 1.0), 1, False), ((0.0, 0.0, 1.0, 1.0), 0, True)]
_EMPTY = [((0.5, 0.5, 0.5, 0.75), 0, False)]
_CAT = [((0.0, 0.0, 0.5, 0.5), 0, False)]
_ROWS = [[5, 20, 15, 40, 1, 0], [0, 0, 20, 40, 0, 1]]


class BoxesCoco(_SmallBoxes):
    """The images of the test part have no boxes, as in COCO, and one box has no area, as in COCO's training part."""

    SPLITS = {"train": [_SOME, [], _EMPTY, _CAT], "validation": [_SOME], "test": [[], []]}


class BoxesComplete(_SmallBoxes):
    SPLITS = {"train": [_SOME] * 3, "validation": [_SOME] * 2, "test": [_SOME]}
    CROWD_KEY = "is_difficult"
    ENCODING = "png"


class BoxesSingle(_SmallBoxes):
    SPLITS = {"train": [_SOME] * 10}


class BoxesVoc(_SmallBoxes):
    SPLITS = {"train": [[((0.3, 0.525, 0.75, 1.0), 1, False)]] * 5}
    CROWD_KEY = "is_difficult"


class BoxesNone(_SmallBoxes):
    SPLITS = {"train": [[]] * 3, "test": [_SOME]}


class BoxesText(_SmallBoxes):
    SPLITS = {"train": [[]]}

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _generate_examples(self, images):
        yield 0, {"text": "x"}


def boxes_of(part):
    return [rows.tolist() for rows in part.boxes()]


def test_a_test_part_without_boxes_is_not_used(tmp_path):
    images = open_boxes("tfds:boxes_coco", tmp_path)
    assert images.class_names == ("cat", "dog") and images.validation is None
    assert sorted(boxes_of(images.train)) == [[], [], [[0, 0, 10, 20, 0, 0]], _ROWS]
    assert boxes_of(images.test) == [_ROWS]
    assert (images.train.num_examples, images.test.num_examples) == (4, 1)
    assert images.train.most_boxes() == 2
    index, image, label = next(images.test.records().as_numpy_iterator())
    assert index == 0 and image[:2] == b"\xff\xd8" and len(label) == 48
    assert images.test.name(0).startswith("0.jpg boxes_coco-validation")
    assert images.test.labels().tolist() == [0]


def test_difficult_boxes_and_a_validation_part(tmp_path):
    images = open_boxes("tfds:boxes_complete:1.0.0", tmp_path)
    assert images.validation.tolist() == [False] * 3 + [True] * 2
    assert boxes_of(images.test) == [_ROWS]
    assert next(images.test.records().as_numpy_iterator())[1][:4] == b"\x89PNG"


def test_a_single_split_is_divided(tmp_path):
    images = open_boxes("tfds:boxes_single", tmp_path)
    assert (images.train.num_examples, images.test.num_examples) == (8, 2)


def test_unsuitable_data_sets_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tfds:boxes_none with train, test, of which test has boxes"):
        open_boxes("tfds:boxes_none", tmp_path)
    with pytest.raises(UserError, match=r"sequence of objects with bbox and label.*text \(Text\)"):
        open_boxes("tfds:boxes_text", tmp_path)


@pytest.mark.parametrize("name", ["coco/2014", "coco/2017", "voc/2007", "voc/2012"])
def test_the_features_of_coco_and_voc_are_found(tmp_path, name):
    builder = builder_of(f"tfds:{name}", tmp_path)
    assert tfds_boxes._keys(builder, name) == ("image", "objects")
    assert builder.info.features["objects"].feature["label"].num_classes == (80 if "coco" in name else 20)


def test_pixels_of_voc_are_counted_from_one(tmp_path, monkeypatch):
    # TFDS stores xmin = 21 and ymin = 6 of VOC as 21 / 40 and 6 / 20.
    monkeypatch.setattr(tfds_boxes, "_PIXELS_FROM_ONE", ("boxes_voc",))
    rows = next(open_boxes("tfds:boxes_voc", tmp_path).train.boxes())
    np.testing.assert_allclose(rows, [[5, 20, 15, 40, 1, 0]], atol=1e-4)


def test_the_check_of_a_data_set(tmp_path):
    result = check_dataset("tfds:boxes_coco", tmp_path, task_type="detection")
    assert result.state == "not prepared"
    assert "robust_tf.data --task_type=detection --prepare=tfds:boxes_coco" in " ".join(result.advice)
    assert main(["data", "--prepare=tfds:boxes_coco", "--task_type=detection", f"--data_dir={tmp_path}"]) == 0
    result = check_dataset("tfds:boxes_coco", tmp_path, task_type="detection")
    assert result.state == "ready" and result.facts[0].startswith(f"in {tmp_path}")
    assert "training part: 2 boxes, 1 crowd boxes, 2 images without boxes" in result.facts
    path = next((tmp_path / "boxes_coco").rglob("*-validation.tfrecord*"))
    path.write_bytes(path.read_bytes()[:-20])
    result = check_dataset("tfds:boxes_coco", tmp_path, task_type="detection")
    assert result.state == "faulty" and "The data set cannot be read" in result.advice[0]
