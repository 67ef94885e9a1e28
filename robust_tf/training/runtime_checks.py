"""Checks of values that are known only while a step runs, and their errors as one clear line."""

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from robust_tf.attacks.checks import pixel_error
from robust_tf.errors import UserError

_START, _END = "[robust_tf] ", " [/robust_tf]"


def checked(value: tf.Tensor, condition: tf.Tensor, message: str, *received: tf.Tensor) -> tf.Tensor:
    """Returns `value` once `condition` holds: nothing that depends on it runs before.

    XLA leaves such checks out.

    Args:
        value: any tensor.
        condition: scalar bool.
        message: one line for the user, with a `{}` for each value of `received`.
        received: scalars that the message shows.

    Raises:
        UserError: within `explained`, when the condition does not hold.
    """
    with tf.control_dependencies([tf.debugging.Assert(condition, [_START + message + _END, *received])]):
        return tf.identity(value)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns a failure of `checked` or `assert_pixels`, which TensorFlow buries in a page of text, into a UserError."""
    try:
        yield
    except NotImplementedError as error:
        if "symbolic tf.Tensor" not in str(error):
            raise
        raise UserError(
            "The attack needs a classifier of TensorFlow operations or keras.ops, which have gradients. Received: one "
            "whose `call` makes a NumPy array of its input."
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
