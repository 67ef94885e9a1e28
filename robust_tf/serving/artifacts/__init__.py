"""Runs a deployed classifier, whatever its format: a SavedModel, an ONNX or LiteRT file, or a server.

Start with `open_artifact`. To add a format, write an `Artifact`, as in `onnx_file.py`, and enter it in `FORMATS`
(`card.py`), in `open_artifact`, and in `CONVERTERS` (`publish/formats.py`), from which `robust_tf.export` writes it.
"""

from robust_tf.serving.artifacts.artifact import Artifact
from robust_tf.serving.artifacts.card import FORMATS
from robust_tf.serving.artifacts.opening import open_artifact

__all__ = ["FORMATS", "Artifact", "open_artifact"]
