"""Runs an ONNX file in ONNX Runtime, without TensorFlow."""

import os
import pathlib

import numpy as np

# Since version 1.29, the official packages for Linux report each session to Microsoft unless this is set before the
# import. It also writes files into the temporary folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime  # noqa: E402

from robust_tf.errors import UserError
from robust_tf.serving.artifacts.artifact import Artifact
from robust_tf.serving.artifacts.card import FORMATS, read_card


class OnnxArtifact(Artifact):
    """An ONNX file with the input `images` and the output `logits`. It runs on the CPU.

    Args:
        path: The file, beside its model card.

    Raises:
        UserError: The card or the file cannot be read.
    """

    def __init__(self, path: pathlib.Path) -> None:
        card = read_card(path.parent)
        super().__init__(name=FORMATS["onnx"].title, labels=card["labels"], image_size=card["image_size"], card=card)
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  # ONNX Runtime raises many classes of errors
            raise UserError(f"ONNX Runtime cannot load the file. Received: {path}: {error}.") from error

    def _run(self, images: np.ndarray) -> np.ndarray:
        (logits,) = self._session.run(["logits"], {"images": images})
        return np.asarray(logits)
