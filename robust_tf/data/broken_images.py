"""Finds the images that cannot be decoded, so that they can be named in an error or left out."""

import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from robust_tf.data.boxes.transforms import TOO_MANY_BOXES
from robust_tf.data.masks.transforms import SIZES_DIFFER
from robust_tf.data.records import Part
from robust_tf.data.transforms import FLOATS_OUT_OF_RANGE, decode
from robust_tf.errors import UserError, warn_user
from robust_tf.files import write_json


def broken_images(part: Part) -> np.ndarray:
    """Returns the numbers of the examples that cannot be read or decoded, int64 in ascending order.

    Decodes all images of the part.
    """

    def checked(index: tf.Tensor, encoded: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # The shape is returned only so that the image is decoded: tf.data would remove an unused result.
        return index, tf.shape(decode(encoded))

    whole = part.records().map(checked, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
    indices = [batch for batch, _ in whole.batch(1024).as_numpy_iterator()]
    return np.setdiff1d(np.arange(part.num_examples), np.concatenate([np.zeros(0, np.int64), *indices]))


def remembered_broken_images(part: Part, fingerprint: str, folder: pathlib.Path) -> np.ndarray:
    """Returns the same as `broken_images`, but stores the result in a file and reads this file the next time.

    Args:
        part: Part of a data set.
        fingerprint: Text that changes when the content of the part changes.
        folder: Folder for the results, one small file for each fingerprint.
    """
    path = folder / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:20]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # a missing or damaged file is written again
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("fingerprint") == fingerprint:
            return np.array(content["broken"], np.int64)
    broken = broken_images(part)
    try:
        write_json(path, {"fingerprint": fingerprint, "broken": broken.tolist()})
    except UserError as error:
        warn_user(f"{error} The next start has to search for broken images again.")
    return broken


@contextlib.contextmanager
def broken_images_named(parts: Sequence[Part]) -> Iterator[None]:
    """Turns TensorFlow's error for an image that cannot be decoded into an error that names the image.

    Args:
        parts: Parts whose images are decoded within the block.

    Raises:
        UserError: If the block fails because an image of `parts` cannot be decoded.
    """
    try:
        yield
    except (tf.errors.InvalidArgumentError, tf.errors.NotFoundError, tf.errors.PermissionDeniedError) as error:
        for part in parts:
            broken = broken_images(part)
            if broken.size:
                others = f" and {broken.size - 1} more" if broken.size > 1 else ""
                raise UserError(
                    f"Cannot decode the image {part.name(int(broken[0]))}{others}: {reason_of(part, int(broken[0]))}. "
                    "Repair or remove it, or leave such images out with skip_bad_images=True (--skip_bad_images)."
                ) from error
        # A mask that cannot be read, or whose size or number of boxes is found to be wrong only now.
        for rule in (r"UserError: (.+)", rf"({SIZES_DIFFER}.*)", rf"({TOO_MANY_BOXES}.*)"):
            if found := re.search(rule, error.message):
                raise UserError(f"{found[1].strip()} Correct the annotation, or remove its image.") from error
        if FLOATS_OUT_OF_RANGE in error.message:
            rule = error.message[error.message.index(FLOATS_OUT_OF_RANGE) :].partition(" images.")[0]
            raise UserError(
                f"{rule} images. Received: pixels outside of this range. Prepare the data set again with all pixels in "
                "one range."
            ) from error
        raise


def reason_of(part: Part, index: int) -> str:
    """Returns the reason that the decoder gives for failing on an image."""
    try:
        for _, encoded, _ in part.records().skip(index).take(1):
            decode(encoded)
    except tf.errors.OpError as error:
        # Cuts off the names of the operations that TensorFlow adds before and after the reason.
        return str(error.message).splitlines()[0].partition(" [Op:")[0].rpartition("}} ")[2].strip(" .")
    return "unknown reason"
