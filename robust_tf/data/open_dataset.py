"""Opens a data set by its name: a row of `DATASETS`, a data set of TFDS, or a folder of images."""

import pathlib

import tensorflow as tf
from etils import epath

from robust_tf.data.datasets import FOLDER_PREFIX
from robust_tf.data.folder_records import open_folder
from robust_tf.data.records import LabeledImages
from robust_tf.data.tfds_records import open_tfds
from robust_tf.errors import UserError


def data_folder(name: str) -> epath.Path | None:
    """Returns the path of a TFDS folder, which may be on this machine or in a store that TensorFlow can read.

    Args:
        name: Path such as ~/tensorflow_datasets, or address such as gs://bucket/folder.

    Returns:
        The path, or None if `name` is empty.

    Raises:
        UserError: If the installed TensorFlow cannot read the store, such as s3://.
    """
    scheme, separator, _ = name.partition("://")
    schemes = sorted(filter(None, tf.io.gfile.get_registered_schemes()))
    if separator and scheme not in schemes:
        raise UserError(
            f"data_dir must be a folder that TensorFlow can read. TensorFlow {tf.__version__} cannot read {scheme}:// "
            f"here, only {', '.join(schemes)}. Received: data_dir={name}. Mount the bucket as a folder, or copy the "
            "prepared data set to a disk."
        )
    # pathlib would turn gs://bucket into gs:/bucket.
    return epath.Path(name).expanduser() if name else None


def open_dataset(
    name: str,
    data_dir: epath.Path | pathlib.Path | None = None,
    *,
    split_seed: int = 0,
    skip_bad_images: bool = False,
) -> LabeledImages:
    """Opens a data set by its name, downloading and preparing it first if necessary.

    Args:
        name: Key of `DATASETS`, `tfds:NAME[/config][:version]` or `folder:/path`.
        data_dir: Folder of TFDS. None uses TFDS's default.
        split_seed: Seed for the choice of the test images of a folder that has no test part.
        skip_bad_images: Whether to leave out files of a folder that are empty, unreadable or in a format that
            TensorFlow cannot decode, instead of raising an error.

    Raises:
        UserError: If the name is unknown, or if the data set does not exist, cannot be prepared or has a fault.
    """
    if name.startswith(FOLDER_PREFIX) and name != FOLDER_PREFIX:
        root = pathlib.Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
        return open_folder(root, split_seed=split_seed, skip_bad_images=skip_bad_images)
    if split_seed:
        raise UserError(
            "split_seed is only for a folder of images without a test part. Received: "
            f"split_seed={split_seed} for {name}."
        )
    return open_tfds(name, data_dir)
