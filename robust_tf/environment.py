"""Settings of TensorFlow and Keras that have to be made before they are imported."""

import json
import os
import pathlib
import sys

from robust_tf.errors import UserError, exit_on_user_error


def set_tensorflow_defaults(*, onednn: bool = True) -> None:
    """Sets environment variables that TensorFlow reads when it is imported, unless the user has set them.

    They turn oneDNN on for every x86 processor, and suppress messages less severe than errors. TensorFlow leaves oneDNN
    off where AVX512-VNNI is missing, and the gradients of convolutions then take about four times as long. Without a
    GPU, TensorFlow would report it as missing at every start.

    If Keras is set to another backend, the program ends with one line on stderr.

    Args:
        onednn: Whether to turn oneDNN on. Programs that only copy weights turn it off, because its allocator never
            releases memory.
    """
    with exit_on_user_error():
        check_keras_backend()
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", str(int(onednn)))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def check_keras_backend() -> None:
    """Refuses a Keras backend other than TensorFlow, without importing Keras.

    Raises:
        UserError: Keras runs on JAX or PyTorch, or will do so once it is imported.
    """
    backend, origin = _keras_backend()
    if backend != "tensorflow":
        raise UserError(
            f"robust_tf needs Keras on TensorFlow. Received: the backend {backend!r} from {origin}. Set "
            "KERAS_BACKEND=tensorflow before you import Keras."
        )


def _keras_backend() -> tuple[str, str]:
    """Returns the backend that Keras has, or will have once it is imported, and what decides it."""
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
