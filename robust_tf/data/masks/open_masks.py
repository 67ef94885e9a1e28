"""Opens a data set for segmentation by its name."""

import pathlib

from etils import epath

from robust_tf.data.datasets import FOLDER_PREFIX, TFDS_PREFIX
from robust_tf.data.masks.folder import open_mask_folder
from robust_tf.data.masks.records import LabeledMasks
from robust_tf.data.masks.tfds_masks import open_tfds_masks
from robust_tf.errors import UserError


def open_masks(name: str, data_dir: epath.Path | pathlib.Path | None = None, *, split_seed: int = 0) -> LabeledMasks:
    """Opens a data set of images with masks, downloading and preparing it first if TFDS has it.

    The labels of the records are encoded masks, see `decode_mask`. The parts of the result also have the method
    `masks()`, which yields the mask of each image.

    Args:
        name: `tfds:NAME[/config][:version]` or `folder:/path`. See `open_mask_folder` for the layouts.
        data_dir: Folder of TFDS. None uses TFDS's default.
        split_seed: Seed for the choice of the test images of a folder that has no test part.

    Raises:
        UserError: If the name is neither of the two, or if the data set cannot be prepared or has a fault.

    Example:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> from robust_tf.data.masks import open_masks
        >>> image = tf.io.encode_png(tf.zeros((4, 6, 3), tf.uint8))
        >>> mask = tf.io.encode_png(tf.ones((4, 6, 1), tf.uint8))
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for number in range(10):
        ...         tf.io.write_file(f"{root}/images/{number}.png", image)
        ...         tf.io.write_file(f"{root}/masks/{number}.png", mask)
        ...     images = open_masks(f"folder:{root}")
        >>> images.class_names, images.train.num_examples, images.test.num_examples
        (('class 0', 'class 1'), 8, 2)
    """
    if name.startswith(FOLDER_PREFIX) and name != FOLDER_PREFIX:
        return open_mask_folder(pathlib.Path(name.removeprefix(FOLDER_PREFIX)).expanduser(), split_seed=split_seed)
    if not name.startswith(TFDS_PREFIX) or name == TFDS_PREFIX:
        raise UserError(
            "A data set for segmentation is folder:/path or tfds:NAME[/config][:version], such as "
            f"tfds:oxford_iiit_pet. Received: {name!r}."
        )
    if split_seed:
        raise UserError(
            f"split_seed is only for a folder without a test part. Received: split_seed={split_seed} for {name}."
        )
    return open_tfds_masks(name, data_dir)
