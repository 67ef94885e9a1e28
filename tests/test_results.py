"""One reader of results.json: every value by name, of the right type, and nothing that evaluation needs left out."""

import dataclasses
import json
import pathlib

import pytest

from robust_tf.config.data import DataConfig
from robust_tf.config.job import JobConfig
from robust_tf.errors import UserError
from robust_tf.evaluation import subject as subject_module
from robust_tf.flags import to_flag_file
from robust_tf.results import JobRecord, job_record, read_job_record, read_results

# Fields of `DataConfig` that don't change the test images, or that a run decides for itself.
OF_TRAINING = {"augmentation", "rand_augment", "mixing", "validation_fraction", "examples_per_class", "subset"}
OF_THE_RUN = {"data_dir", "cache", "cache_dir"}


def test_everything_that_decides_the_test_images_is_recorded_and_followed(monkeypatch, tmp_path):
    """A new field of `DataConfig` has to be recorded too, or evaluation would measure on other images."""
    deciding = {field.name for field in dataclasses.fields(DataConfig)} - OF_TRAINING - OF_THE_RUN
    assert deciding <= {field.name for field in dataclasses.fields(JobRecord)}
    asked = {}

    class Enough(Exception):
        pass

    def recorded(data, *, batch_size):
        asked.update(dataclasses.asdict(data))
        raise Enough

    reading = {"exif": "apply", "alpha_background": "white"}
    config = JobConfig.from_flags(
        dataset="folder:/x", classes=(2, 0), downscale=9, split_seed=3, skip_bad_images=True, **reading
    )
    (tmp_path / "results.json").write_text(json.dumps({"flags": to_flag_file(config).splitlines(), "image_size": 8}))
    monkeypatch.setattr(subject_module, "load_task", recorded)
    monkeypatch.setattr(subject_module, "load_classifier", lambda path: type("C", (), {"input_shape": (None, 8, 8, 3)}))
    with pytest.raises(Enough):
        subject_module.load_subject(str(tmp_path / "classifier.keras"))
    expected = {"downscale": 9, "split_seed": 3, "skip_bad_images": True, "classes": (2, 0), "image_size": 8}
    assert expected.items() <= asked.items()
    assert reading.items() <= asked.items()
    with pytest.raises(Enough):
        subject_module.load_subject(str(tmp_path / "classifier.keras"), dataset="digits")
    # The classifier was made for reduced images; the split is of the other data set.
    assert (asked["downscale"], asked["split_seed"], asked["skip_bad_images"]) == (9, 0, False)


def test_the_keys_of_the_file_and_the_flags():
    record = job_record(
        {
            "dataset": "digits",
            "classes": [3, 4],
            "class_names": ["three", "four"],
            "image_size": 16,
            "resize_size": 18,
            "downscale": None,
            "robust_accuracy_attack": {"norm": "l2", "epsilon": 0.5},
            "flags": ["--split_seed=7", "--downscale=4"],
        }
    )
    assert record == JobRecord(
        dataset="digits",
        classes=(3, 4),
        class_names=("three", "four"),
        image_size=16,
        resize_size=18,
        downscale=None,
        split_seed=7,
        norm="l2",
        epsilon=0.5,
    )
    assert job_record({}) == JobRecord()


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"dataset": 5}, "dataset=5"),
        ({"classes": "0,1"}, "classes='0,1'"),
        ({"classes": [0, "1"]}, "classes="),
        ({"downscale": "8"}, "downscale='8'"),
        ({"image_size": True}, "image_size=True"),
        ({"robust_accuracy_attack": "pgd"}, "robust_accuracy_attack='pgd'"),
        ({"robust_accuracy_attack": {"norm": "l2", "epsilon": "1"}}, "robust_accuracy_attack="),
        ({"flags": ["--no_such_flag=1"]}, "flags that this version does not know: .*no_such_flag"),
        ({"flags": 1}, "flags that this version does not know"),
    ],
)
def test_a_value_of_another_type_is_named(results, message):
    with pytest.raises(UserError, match=f"R.json is not what a training job writes. Received: {message}"):
        job_record(results, "R.json")


@pytest.mark.parametrize(("text", "message"), [("[1]", "list"), ("{", "JSONDecodeError"), ("\x00", "JSONDecodeError")])
def test_a_file_that_is_no_object_is_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    assert read_results(path) == {} and read_job_record(path) == JobRecord()
    path.write_text(text)
    with pytest.raises(UserError, match=rf"results.json is not what a training job writes. Received: {message}"):
        read_results(path)


def test_a_record_of_other_images_is_refused():
    record = JobRecord(image_size=32)
    record.check_image_size(32, pathlib.Path("c.keras"))
    record.check_image_size(None, pathlib.Path("c.keras"))
    with pytest.raises(UserError, match="c.keras for images of 16 pixels a side, and a results.json that says 32"):
        record.check_image_size(16, pathlib.Path("c.keras"))
