"""Checks of values that are known only while a step runs, with one clear line as the error message."""

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from robust_tf.attacks.checks import pixel_error
from robust_tf.errors import UserError

_START, _END = "[robust_tf] ", " [/robust_tf]"


def checked(value: tf.Tensor, condition: tf.Tensor, message: str, *received: tf.Tensor) -> tf.Tensor:
    """Returns `value` unchanged, and checks a condition before anything uses the result. XLA drops the check.

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
    except tf.errors.InvalidArgumentError as error:
        if pixels := pixel_error(error):
            raise pixels from None
        _, start, text = str(error.message).partition(_START)
        if not start:
            raise
        message, _, values = text.replace("\\'", "'").partition(_END)
        received = re.findall(r"-?(?:nan|inf|\d[\d.]*(?:e[+-]?\d+)?)", values)[: message.count("{}")]
        raise UserError(message.format(*(f"{float(value):g}" for value in received))) from None
