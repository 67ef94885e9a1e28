"""Makes settings of TensorFlow and Keras that must be made before they are imported."""

import contextlib
import faulthandler
import importlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Literal

from absl import logging

from robust_tf.errors import UserError, exit_on_user_error


def set_tensorflow_defaults(*, onednn: bool = True) -> None:
    """Sets environment variables that TensorFlow reads when it is imported, unless the user has set them.

    They turn oneDNN on for every x86 processor, and suppress messages less severe than errors. TensorFlow leaves oneDNN
    off on processors without AVX512-VNNI, where the gradients of convolutions then take about four times as long. On a
    machine without a GPU, TensorFlow would report the missing GPU at every start.

    If Keras is set to another backend, the program ends with one line on stderr.

    Args:
        onednn: Whether to turn oneDNN on. Programs that only copy weights turn it off, because its allocator never
            releases memory.
    """
    with exit_on_user_error():
        check_keras_backend()
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", str(int(onednn)))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


Verbosity = Literal["error", "warning", "info"]
# The levels of each verbosity, for TensorFlow's C++ part and for its Python part.
_CPP_LEVELS = {"error": "3", "warning": "1", "info": "0"}
_PYTHON_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO}
_verbosity: Verbosity = "error"


def set_verbosity(verbosity: Verbosity) -> None:
    """Chooses which messages of TensorFlow and of the other libraries a program lets through.

    Call it before `start_tensorflow`. It takes precedence over the environment variable TF_CPP_MIN_LOG_LEVEL.

    Args:
        verbosity: The least severe messages to show. "error" also hides what the libraries print while they load.
    """
    global _verbosity
    _verbosity = verbosity
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = _CPP_LEVELS[verbosity]


def start_tensorflow(*, onednn: bool = True) -> None:
    """Imports TensorFlow for a program, without the messages that it prints while it loads.

    Some of these messages ignore TF_CPP_MIN_LOG_LEVEL, because they are printed before logging is set up. They report
    that there is no GPU, or that a library was registered twice. Call this before you import other modules that need
    TensorFlow.

    Args:
        onednn: Passed to `set_tensorflow_defaults`.
    """
    set_tensorflow_defaults(onednn=onednn)
    is_quiet = os.environ["TF_CPP_MIN_LOG_LEVEL"] >= "3" and "tensorflow" not in sys.modules
    with _stderr_held_back() if is_quiet else contextlib.nullcontext():
        tensorflow = importlib.import_module("tensorflow")
    logging.set_verbosity(_PYTHON_LEVELS[_verbosity])
    tensorflow.get_logger().setLevel(_verbosity.upper())


@contextlib.contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Holds back what is written to file descriptor 2, even by C++, and shows it only if the block raises an error."""
    try:
        stderr = os.dup(2)
    except OSError:  # the program was started with stderr closed
        yield
        return
    with open(stderr, "wb", buffering=0) as shown, tempfile.TemporaryFile() as held_back:
        # A crash ends the process at once (TensorFlow aborts on a processor without AVX), so at least say where it was.
        says_where = not faulthandler.is_enabled()
        if says_where:
            faulthandler.enable(shown)
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            shown.write(held_back.read())
            raise
        finally:
            os.dup2(stderr, 2)
            if says_where:
                faulthandler.disable()


def check_keras_backend() -> None:
    """Refuses a Keras backend other than TensorFlow, without importing Keras.

    Raises:
        UserError: Keras uses another backend, or will use one once it is imported.
    """
    backend, origin = _keras_backend()
    if backend != "tensorflow":
        raise UserError(
            f"robust_tf needs Keras on TensorFlow. Received: the backend {backend!r} from {origin}. Set "
            "KERAS_BACKEND=tensorflow before you import Keras."
        )


def _keras_backend() -> tuple[str, str]:
    """Returns the backend that Keras uses, or will use once it is imported, and where this is set."""
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "config"):  # missing while Keras itself is being imported
        return keras.config.backend(), "the Keras that is already imported"
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"], "the environment variable KERAS_BACKEND"
    settings = pathlib.Path(os.environ.get("KERAS_HOME") or pathlib.Path.home() / ".keras") / "keras.json"
    try:
        return str(json.loads(settings.read_text(encoding="utf-8")).get("backend", "tensorflow")), str(settings)
    except (OSError, ValueError, AttributeError):  # Keras itself then uses its default
        return "tensorflow", "Keras's default"
