"""Images that cannot be decoded: found, named, and left out when that is asked for."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from robust_tf.data.records import Part
from robust_tf.data.transforms import FLOATS_OUT_OF_RANGE, decode
from robust_tf.errors import UserError, warn_user
from robust_tf.files import write_json


def broken_images(part: Part) -> np.ndarray:
    """Numbers of the examples of a part that cannot be read or decoded, by decoding all of them; int64, rising."""

    def checked(index: tf.Tensor, encoded: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # The shape is asked for because of what has to be done for it; a mere dependency would be optimized away.
        return index, tf.shape(decode(encoded))

    whole = part.records().map(checked, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
    indices = [batch for batch, _ in whole.batch(1024).as_numpy_iterator()]
    return np.setdiff1d(np.arange(part.num_examples), np.concatenate([np.zeros(0, np.int64), *indices]))


def remembered_broken_images(part: Part, fingerprint: str, folder: pathlib.Path) -> np.ndarray:
    """`broken_images`, which is looked for only once: the result is kept in `folder`.

    Args:
        part: of a data set.
        fingerprint: changes when the content of the part does.
        folder: gets one small file for each fingerprint.
    """
    path = folder / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:20]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # missing or damaged: it is made again
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("fingerprint") == fingerprint:
            return np.array(content["broken"], np.int64)
    broken = broken_images(part)
    try:
        write_json(path, {"fingerprint": fingerprint, "broken": broken.tolist()})
    except UserError as error:
        warn_user(f"{error} The next start looks for broken images again.")
    return broken


@contextlib.contextmanager
def broken_images_named(parts: Sequence[Part]) -> Iterator[None]:
    """Turns the error of a decoder within the block, which names no image, into one that does.

    Raises:
        UserError: an image of `parts` cannot be decoded, and that has ended the block.
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
                    "Repair or remove it, or leave such images out with --skip_bad_images."
                ) from error
        if FLOATS_OUT_OF_RANGE in error.message:
            rule = error.message[error.message.index(FLOATS_OUT_OF_RANGE) :].partition(" pictures.")[0]
            raise UserError(
                f"{rule} pictures. Received: others. Prepare the data set again, all in one range."
            ) from error
        raise


def reason_of(part: Part, index: int) -> str:
    """What the decoder says about an image."""
    try:
        for _, encoded, _ in part.records().skip(index).take(1):
            decode(encoded)
    except tf.errors.OpError as error:
        # Without the names of the operations that TensorFlow puts around it.
        return error.message.splitlines()[0].partition(" [Op:")[0].rpartition("}} ")[2].strip(" .")
    return "unknown reason"
