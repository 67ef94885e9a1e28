"""Opens a data set for detection by its name."""

import pathlib

from etils import epath

from robust_tf.data.boxes.folder import open_box_folder
from robust_tf.data.boxes.records import LabeledBoxes
from robust_tf.data.boxes.tfds_boxes import open_tfds_boxes
from robust_tf.data.datasets import FOLDER_PREFIX, TFDS_PREFIX
from robust_tf.errors import UserError


def open_boxes(name: str, data_dir: epath.Path | pathlib.Path | None = None, *, split_seed: int = 0) -> LabeledBoxes:
    """Opens a data set of images with boxes, downloading and preparing it first if TFDS has it.

    The labels of the records are strings, see `decode_boxes`. The parts of the result also have the methods `boxes()`,
    which yields the boxes of each image, and `most_boxes()`.

    Args:
        name: `tfds:NAME[/config][:version]` or `folder:/path`. See `open_box_folder` for the layouts.
        data_dir: Folder of TFDS. None uses TFDS's default.
        split_seed: Seed for the choice of the test images of a folder that has no test part.

    Raises:
        UserError: If the name is neither of the two, or if the data set cannot be prepared or has a fault.

    Example:
        >>> import json, pathlib, tempfile
        >>> import tensorflow as tf
        >>> from robust_tf.data.boxes import open_boxes
        >>> image = tf.io.encode_png(tf.zeros((40, 50, 3), tf.uint8)).numpy()
        >>> content = {
        ...     "categories": [{"id": 7, "name": "tree"}],
        ...     "images": [{"id": number, "file_name": f"{number}.png"} for number in range(10)],
        ...     "annotations": [
        ...         {"image_id": number, "category_id": 7, "bbox": [5, 10, 20, 15]} for number in range(10)
        ...     ],
        ... }
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for number in range(10):
        ...         _ = pathlib.Path(root, f"{number}.png").write_bytes(image)
        ...     _ = pathlib.Path(root, "annotations.json").write_text(json.dumps(content))
        ...     images = open_boxes(f"folder:{root}")
        >>> images.class_names, images.train.num_examples, images.test.num_examples
        (('tree',), 8, 2)
        >>> next(images.train.boxes()).tolist()  # top, left, bottom, right, class, crowd
        [[10.0, 5.0, 25.0, 25.0, 0.0, 0.0]]
    """
    if name.startswith(FOLDER_PREFIX) and name != FOLDER_PREFIX:
        return open_box_folder(pathlib.Path(name.removeprefix(FOLDER_PREFIX)).expanduser(), split_seed=split_seed)
    if not name.startswith(TFDS_PREFIX) or name == TFDS_PREFIX:
        raise UserError(
            "A data set for detection is folder:/path or tfds:NAME[/config][:version], such as tfds:voc/2007. "
            f"Received: {name!r}."
        )
    if split_seed:
        raise UserError(
            f"split_seed is only for a folder without a test part. Received: split_seed={split_seed} for {name}."
        )
    return open_tfds_boxes(name, data_dir)
