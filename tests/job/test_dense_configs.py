"""The flag files for COCO and Pascal VOC run for an epoch on made-up data in the form of these data sets."""

import pathlib
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from robust_tf import train
from robust_tf.config.job import read_flag_file
from robust_tf.data.boxes import tfds_boxes
from robust_tf.results import JobResults
from tests.dense_data import SIZE, write_source

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


class MadeUpObjects(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A few images with a bright box, in the form of COCO and VOC in TensorFlow Datasets."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        objects = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "is_crowd": np.bool_,
        }
        features = {"image": tfds.features.Image(encoding_format="png"), "objects": tfds.features.Sequence(objects)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: object) -> dict[str, object]:
        return {"train": self._generate_examples(12), "validation": self._generate_examples(4)}

    def _generate_examples(self, count: int):
        for key in range(count):
            image = np.full((48, 64, 3), 40, np.uint8)
            image[12:36, 16:48] = 200
            box = {"bbox": tfds.features.BBox(0.25, 0.25, 0.75, 0.75), "label": key % 2, "is_crowd": False}
            yield key, {"image": image, "objects": [box]}


def write_voc_masks(root: pathlib.Path) -> None:
    """Writes a few images with palette masks in the layout of VOC2012."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for part, count in (("train", 12), ("val", 4)):
        names = [f"{part}{number}" for number in range(count)]
        (root / "ImageSets/Segmentation" / f"{part}.txt").write_text("\n".join(names))
        for name in names:
            image, mask = np.full((48, 64, 3), 40, np.uint8), np.zeros((48, 64), np.uint8)
            image[12:36, 16:48], mask[12:36, 16:48], mask[11] = 200, 8, 255
            Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg")
            palette = Image.fromarray(mask, mode="P")
            palette.putpalette(list(range(256)) * 3)
            palette.save(root / "SegmentationClass" / f"{name}.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco_detection", "voc_detection", "voc_segmentation"])
def test_a_flag_file_runs_on_data_in_the_form_of_its_data_set(name, tmp_path, monkeypatch):
    flags = {
        "source": str(write_source(tmp_path / "source.keras")),
        "image_size": SIZE,
        "batch_size": 8,
        "epochs": 1,
        "attack_steps": 1,
        "eval_steps": 1,
        "precision": "float32",
        "workdir": str(tmp_path / "job"),
    }
    if name == "voc_segmentation":
        write_voc_masks(tmp_path / "VOC2012")
        flags["dataset"] = f"folder:{tmp_path / 'VOC2012'}"
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where TFDS leaves an empty folder
        builder = MadeUpObjects(data_dir=tmp_path / "tfds")
        builder.download_and_prepare()
        monkeypatch.setattr(tfds_boxes, "prepared_builder", lambda *_, **__: builder)
    job = read_flag_file(CONFIGS / f"{name}.cfg").with_flags(**flags)
    train.run(job)
    results = JobResults.read(tmp_path / "job" / "results.json")
    assert results is not None and results.task_type == job.data.task_type
    assert results.num_train_images == 11 and results.num_test_images == 4
    assert len(results.class_names) == (21 if name == "voc_segmentation" else 2)
    assert results.robust is not None and results.robust.value is not None
