"""Runs a LiteRT file (formerly TensorFlow Lite) in LiteRT, without TensorFlow."""

import os
import pathlib

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from robust_tf.errors import UserError
from robust_tf.serving.artifacts.artifact import Artifact
from robust_tf.serving.artifacts.card import FORMATS, read_card


class LiteRtArtifact(Artifact):
    """A LiteRT file with the signature `images` -> `logits`, both float32. An int8 file quantizes its input itself.

    Args:
        path: The file, beside its model card.

    Raises:
        UserError: The card or the file cannot be read.
    """

    def __init__(self, path: pathlib.Path) -> None:
        card = read_card(path.parent)
        title = FORMATS[card.get("format", "litert")].title
        super().__init__(name=title, labels=card["labels"], image_size=card["image_size"], card=card)
        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=os.cpu_count())
            self._infer = self._interpreter.get_signature_runner()
        except (ValueError, RuntimeError) as error:
            raise UserError(f"LiteRT cannot load the file. Received: {path}: {error}.") from error

    def _run(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._infer(images=images)["logits"])
