"""The messages about a data set that is not prepared and cannot be prepared here."""

import socket

import pytest
import tensorflow_datasets as tfds

from robust_tf.data.open_dataset import open_dataset
from robust_tf.data.tfds_preparation import builder_of, root_of, ways_to_prepare
from robust_tf.errors import UserError
from tests.data.images import write


@pytest.fixture
def offline(monkeypatch):
    """Makes every host unknown, so that nothing can be downloaded."""

    def unknown(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pets",
            "--prepare=pets .*774 MiB.*annotations.tar.gz .*and images.tar.gz .*into {root}/downloads",
        ),
        (
            "aircraft",
            "robots.ox.ac.uk.*--prepare=aircraft --data_dir={root} .download: 2.6 GiB.*first: Put fgvc",
        ),
        ("caltech101", "data.caltech.edu.*--prepare=caltech101.*131 MiB.*Put caltech-101.zip"),
        ("sun397", "--prepare=sun397.*36.4 GiB.*Put SUN397.tar.gz and Partitions.zip.*copy {root}/sun397_original"),
        ("tfds:eurosat", "madm.dfki.de.*--prepare=tfds:eurosat.*at most 2,062 MiB.*copy {root}/eurosat"),
        (
            "cars",
            "Received: .*pytorch/vision#7545.*is {root}/downloads/manual. .*1.8 GiB. Then run .*--prepare=cars",
        ),
        ("birdsnap", "get_birdsnap.py.*49,829 photographs"),
        ("imagenet2012", "ILSVRC2012_img_train.tar.*144 GiB.*--prepare=imagenet2012"),
    ],
)
def test_without_internet_the_error_has_the_command_the_size_and_the_manual_way(name, message, tmp_path, offline):
    pattern = "(?s)not prepared in {root}, and preparing it failed.*" + message + ".*--data_dir"
    with pytest.raises(UserError, match=pattern.replace("{root}", str(tmp_path))):
        open_dataset(name, tmp_path)


def test_files_in_the_manual_folder_are_not_downloaded(tmp_path, offline):
    """TFDS sees from their checksums that these files are wrong."""
    for name in ("images.tar.gz", "annotations.tar.gz"):
        write(tmp_path / "downloads" / "manual" / name, "x")
    with pytest.raises(UserError, match="(?s)wrong checksum.*--prepare=pets"):
        open_dataset("pets", tmp_path)


def test_a_config_may_need_only_some_of_the_files(tmp_path, offline):
    write(tmp_path / "downloads" / "manual" / "EuroSAT.zip", "x")  # the other file is for eurosat/all
    with pytest.raises(UserError, match="(?s)wrong checksum"):
        open_dataset("tfds:eurosat", tmp_path)


def test_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", full)
    with pytest.raises(UserError, match="'digits'.*No space left on device.*--data_dir"):
        open_dataset("digits", tmp_path)


def test_a_data_set_without_download_needs_only_the_command(tmp_path):
    first, copy = ways_to_prepare("digits", builder_of("digits", tmp_path))
    assert first == f"Run python -m robust_tf.data --prepare=digits --data_dir={tmp_path}."
    assert str(tmp_path / "digits") in copy


@pytest.mark.parametrize("name", ["digits", "tfds:eurosat", "tfds:birdsnap/official:1.0.0"])
def test_root_of_a_builder_is_the_given_folder(name, tmp_path):
    assert root_of(builder_of(name, tmp_path)) == tmp_path
