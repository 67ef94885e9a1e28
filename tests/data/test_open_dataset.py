"""`data_folder`: a folder on this machine, or in a store that TensorFlow can read."""

import pathlib

import pytest

from robust_tf.config.job import JobConfig
from robust_tf.data.open_dataset import data_folder
from robust_tf.data.tfds_preparation import builder_of, root_of
from robust_tf.errors import UserError
from robust_tf.job.task import load_job_task


def test_local_paths_may_begin_with_the_home_folder():
    assert data_folder("") is None
    assert str(data_folder("/data/tfds")) == "/data/tfds"
    assert str(data_folder("~/tfds")) == str(pathlib.Path.home() / "tfds")


def test_tfds_gets_the_address_of_a_bucket_unchanged(monkeypatch):
    class Opened(Exception):
        pass

    def opened(name, data_dir):
        raise Opened(str(data_dir))

    monkeypatch.setattr("robust_tf.data.open_dataset.open_tfds", opened)
    with pytest.raises(Opened, match="^gs://bucket/tfds$"):  # pathlib would turn it into gs:/bucket/tfds
        load_job_task(JobConfig.from_flags(data_dir="gs://bucket/tfds"))


def test_root_of_a_prepared_data_set_is_the_data_dir(data_dir):
    assert str(root_of(builder_of("digits", data_dir))) == str(data_dir)


def test_stores_that_tensorflow_cannot_read_are_refused():
    with pytest.raises(UserError, match="cannot read s3:// here, only .*gs.*Received: data_dir=s3://bucket/tfds"):
        data_folder("s3://bucket/tfds")
