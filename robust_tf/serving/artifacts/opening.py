"""Finds out which format an artifact has, and opens it."""

import contextlib
import pathlib
from collections.abc import Iterator

from robust_tf.errors import UserError
from robust_tf.serving.artifacts.artifact import Artifact
from robust_tf.serving.artifacts.card import FORMATS
from robust_tf.serving.model.folders import is_remote, version_folders

_RULE = (
    "An artifact is a version folder of python -m robust_tf.export, its model.onnx or model.tflite, or the address of "
    "a server, such as http://localhost:8501/MODEL or grpc://localhost:8500/MODEL."
)
_FILES = {form.file for form in FORMATS.values()}
_SERVERS = ("http://", "https://", "grpc://", "grpcs://")


def open_artifact(location: str) -> Artifact:
    """Opens a deployed classifier in its own runtime. TensorFlow is imported only for a SavedModel and for gRPC.

    Args:
        location: Where the artifact is:
            * the folder of a version that `robust_tf.export` has written, in any format;
            * the folder of all versions of one format, which stands for the latest;
            * the file `model.onnx` or `model.tflite` in the folder of a version;
            * the address of a server, `http://`, `https://`, `grpc://` or `grpcs://`, then `host:port/MODEL`. Over
              REST, the model may be left out if a `robust_tf.serve` has only one.

    Returns:
        The artifact, ready to run.

    Raises:
        UserError: There is no artifact at the location, a file differs from its model card, the packages of its
            runtime are not installed, or the server does not answer.

    Example:
        >>> import tempfile
        >>> import keras
        >>> import numpy as np
        >>> from robust_tf.serving.publish import export_classifier
        >>> images = keras.Input((8, 8, 3))
        >>> classifier = keras.Model(images, keras.layers.Dense(2)(keras.layers.Flatten()(images)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     version = export_classifier(classifier, folder, "tiny", model_card={}, labels=["cat", "dog"])
        ...     with open_artifact(str(version)) as artifact:
        ...         artifact.name, artifact.labels, artifact.logits(np.zeros((5, 8, 8, 3), np.float32)).shape
        ('SavedModel', ('cat', 'dog'), (5, 2))
    """
    if location.startswith(_SERVERS):
        with _packages(location, "serve"):
            from robust_tf.serving.artifacts.server import ServerArtifact

            return ServerArtifact(location)
    path = _file_at(location)
    if path.suffix == ".onnx":
        with _packages(location, "onnx"):
            from robust_tf.serving.artifacts.onnx_file import OnnxArtifact
        return OnnxArtifact(path)
    if path.suffix == ".tflite":
        with _packages(location, "litert"):
            from robust_tf.serving.artifacts.litert_file import LiteRtArtifact
        return LiteRtArtifact(path)
    from robust_tf.serving.artifacts.saved_model import SavedModelArtifact

    return SavedModelArtifact(path.parent)


def _file_at(location: str) -> pathlib.Path:
    """Returns the file of an artifact: the location itself, or the one in its folder, or in its latest version."""
    if is_remote(location):
        raise UserError(f"{_RULE} Received: {location!r}. Copy the artifact to a folder of this machine.")
    path = pathlib.Path(location)
    if path.is_file() and path.name in _FILES:
        return path
    for folder in (path, *(folder for _, folder in sorted(version_folders(path).items(), reverse=True))):
        for name in sorted(_FILES):
            if (folder / name).is_file():
                return folder / name
    kind = "a file" if path.is_file() else "a folder without one" if path.is_dir() else "which does not exist"
    raise UserError(f"{_RULE} Received: {location!r}, {kind}.")


@contextlib.contextmanager
def _packages(location: str, extra: str) -> Iterator[None]:
    """Says how to install the packages of an extra if one of them is missing in this block."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"This artifact needs packages that are not installed. Received: {location}, without the package "
            f"{error.name}. Install them: pip install 'robust_tf[{extra}]'."
        ) from error
