"""Checks of values that are known only while a step runs, with one clear line as the error message."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks.checks import pixel_error
from robust_tf.errors import UserError
from robust_tf.training.image_input import images_of

_START, _END = "[robust_tf] ", " [/robust_tf]"
_FIRST_IMAGES = 256  # number of images at the start of an array that count as its first batch


def checked(value: tf.Tensor, condition: tf.Tensor, message: str, *received: tf.Tensor) -> tf.Tensor:
    """Returns `value` unchanged, and checks a condition before anything uses that value. XLA drops the check.

    Args:
        value: Any tensor.
        condition: Condition that must hold, a scalar bool.
        message: Error message of one line, with a `{}` for each value in `received`.
        *received: Scalars to show in the message.

    Raises:
        UserError: The condition does not hold, and the step runs within `explained`.
    """
    with tf.control_dependencies([tf.debugging.Assert(condition, [_START + message + _END, *received])]):
        return tf.identity(value)


def with_first_batch_checked(data: Any, labels: Any, *, check: Callable[[Any, Any], tf.Tensor]) -> Any:
    """Checks the first batch of the data of `fit` or `evaluate`, at once or when it is read, and returns the data.

    Use it where XLA drops the checks inside the step.

    Args:
        data: Images, or a data set of batches. Data in other forms, such as generators, is not checked.
        labels: Labels, unless `data` is a data set.
        check: Function of images and labels that checks both and returns the images.
    """
    if isinstance(data, tf.data.Dataset):

        def checked_batch(index: tf.Tensor, *batch: Any) -> Any:
            images, labels, _ = keras.utils.unpack_x_y_sample_weight(batch)
            valid = tf.cond(index == 0, lambda: check(images, labels), lambda: images_of(images))
            with tf.control_dependencies([valid]):
                return keras.tree.map_structure(tf.identity, batch)

        return data.enumerate().map(lambda index, batch: checked_batch(index, *batch))
    if all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in keras.tree.flatten((data, labels))):
        check(*keras.tree.map_structure(lambda leaf: leaf[:_FIRST_IMAGES], (data, labels)))
    return data


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Returns a context that turns a failure of `checked` or `assert_pixels` into a UserError of one line.

    TensorFlow's own error message fills a page.
    """
    try:
        yield
    except NotImplementedError as error:
        if "symbolic tf.Tensor" not in str(error):
            raise
        raise UserError(
            "The attack needs gradients, so the classifier must consist of TensorFlow operations or keras.ops. "
            "Received: a classifier whose `call` converts its input to a NumPy array."
        ) from None
    except tf.errors.UnimplementedError as error:
        # From TensorFlow's conversion to XLA, or from XLA itself.
        text = next((line for line in str(error.message).splitlines() if "deterministic" in line), None)
        if text is None:
            raise
        raise UserError(
            f"XLA has no deterministic kernel for an operation of the classifier. Received: {text} Train without XLA "
            "(jit_compile=False), or without op determinism."
        ) from None
    except tf.errors.InvalidArgumentError as error:
        if pixels := pixel_error(error):
            raise pixels from None
        _, start, text = str(error.message).partition(_START)
        if not start:
            raise
        message, _, values = text.replace("\\'", "'").partition(_END)
        received = re.findall(r"-?(?:nan|inf|\d[\d.]*(?:e[+-]?\d+)?)", values)[: message.count("{}")]
        raise UserError(message.format(*(f"{float(value):g}" for value in received))) from None
