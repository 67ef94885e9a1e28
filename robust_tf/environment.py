"""What this package wants from TensorFlow and Keras before they are imported."""

import json
import os
import pathlib
import sys

from robust_tf.errors import UserError, exit_on_user_error


def set_tensorflow_defaults(*, onednn: bool = True) -> None:
    """Sets environment variables that TensorFlow reads when it is imported; what the user has set stays.

    * oneDNN on every x86 processor: TensorFlow leaves it off where AVX512-VNNI is missing, and convolution gradients
      then take about four times as long.
      `onednn=False` is for programs that only move weights: its allocator keeps the memory that it once had.
    * No messages below an error: without a GPU TensorFlow reports one as missing at each start.

    Ends the program with one line where Keras is set to another backend.
    """
    with exit_on_user_error():
        check_keras_backend()
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", str(int(onednn)))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def check_keras_backend() -> None:
    """Refuses another backend of Keras than TensorFlow; does not import Keras.

    Raises:
        UserError: Keras runs on JAX or PyTorch, or will when it is imported.
    """
    backend, origin = _keras_backend()
    if backend != "tensorflow":
        raise UserError(
            f"robust_tf needs Keras on TensorFlow. Received: the backend {backend!r} from {origin}. Set "
            "KERAS_BACKEND=tensorflow before Keras is imported."
        )


def _keras_backend() -> tuple[str, str]:
    """The backend that Keras has, or will have once it is imported, and what decides it."""
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "config"):  # it lacks that while it is being imported itself
        return keras.config.backend(), "the Keras that is imported already"
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"], "the environment variable KERAS_BACKEND"
    settings = pathlib.Path(os.environ.get("KERAS_HOME") or pathlib.Path.home() / ".keras") / "keras.json"
    try:
        return str(json.loads(settings.read_text(encoding="utf-8")).get("backend", "tensorflow")), str(settings)
    except (OSError, ValueError, AttributeError):  # Keras then takes its default as well
        return "tensorflow", "Keras's default"
