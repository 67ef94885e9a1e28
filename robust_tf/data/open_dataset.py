"""From the value of --dataset to a data set that can be read."""

import pathlib

import tensorflow as tf
from etils import epath

from robust_tf.data.datasets import FOLDER_PREFIX
from robust_tf.data.folder_records import open_folder
from robust_tf.data.records import LabeledImages
from robust_tf.data.tfds_records import open_tfds
from robust_tf.errors import UserError


def data_folder(name: str) -> epath.Path | None:
    """The TFDS folder that --data_dir names, of this machine or of a store that TensorFlow reads; None for "".

    Args:
        name: a path such as ~/tensorflow_datasets, or gs://bucket/folder.

    Raises:
        UserError: it is in a store that the installed TensorFlow cannot read, such as s3://.
    """
    scheme, separator, _ = name.partition("://")
    schemes = sorted(filter(None, tf.io.gfile.get_registered_schemes()))
    if separator and scheme not in schemes:
        raise UserError(
            f"TensorFlow {tf.__version__} reads no {scheme}:// here, only {', '.join(schemes)}. Received: "
            f"--data_dir={name}. Mount the bucket as a folder, or copy the prepared data set to a disk."
        )
    # pathlib would make gs:/bucket of gs://bucket.
    return epath.Path(name).expanduser() if name else None


def open_dataset(
    name: str,
    data_dir: epath.Path | pathlib.Path | None = None,
    *,
    split_seed: int = 0,
    skip_bad_images: bool = False,
) -> LabeledImages:
    """Opens a row of DATASETS, `tfds:NAME[/config][:version]` or `folder:/path`.

    Args:
        name: the value of --dataset.
        data_dir: TFDS folder; None takes TFDS's default.
        split_seed: of the test part of a folder that has none.
        skip_bad_images: leave out images of a folder that are of a kind that cannot be decoded.

    Raises:
        UserError: unknown name, or a data set that is not there, cannot be prepared or is not in order.
    """
    if name.startswith(FOLDER_PREFIX) and name != FOLDER_PREFIX:
        root = pathlib.Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
        return open_folder(root, split_seed=split_seed, skip_bad_images=skip_bad_images)
    if split_seed:
        raise UserError(
            f"--split_seed is for a folder of images without a test part. Received: {split_seed} for {name}."
        )
    return open_tfds(name, data_dir)
