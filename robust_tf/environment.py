"""What the programs want from TensorFlow before it is imported."""

import os


def set_tensorflow_defaults(*, onednn: bool = True) -> None:
    """Sets environment variables that TensorFlow reads when it is imported; what the user has set stays.

    * oneDNN on every x86 processor: TensorFlow leaves it off where AVX512-VNNI is missing, and convolution gradients
      then take about four times as long.
      `onednn=False` is for programs that only move weights: its allocator keeps the memory that it once had.
    * No messages below an error: without a GPU TensorFlow reports one as missing at each start.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", str(int(onednn)))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
