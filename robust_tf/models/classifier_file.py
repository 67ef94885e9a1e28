"""Writing a `.keras` file, atomically, and reading one that may be anything."""

import pathlib
import tempfile
import zipfile

import keras

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically
from robust_tf.models.large_weights import saved_without_copies


def save_classifier(classifier: keras.Model, path: pathlib.Path) -> None:
    """Writes a classifier as a `.keras` file, which replaces an older one when it is complete.

    Raises:
        UserError: the folder or the file cannot be written; an older file is as it was.
    """
    with replaced_atomically(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Over a folder: Keras would write the archive in memory first, twice the weights.
        with saved_without_copies(classifier):
            classifier.save(folder, zipped=False)
        with zipfile.ZipFile(temporary, "w") as archive:
            for part in sorted(path for path in pathlib.Path(folder).iterdir() if path.is_file()):
                archive.write(part, part.name)


def load_classifier(path: pathlib.Path) -> keras.Model:
    """Reads a classifier from a `.keras` file, in safe mode: nothing in the file is executed.

    Returns:
        A model from images (batch, size, size, 3) to logits, not compiled.

    Raises:
        UserError: the file is missing, damaged, or holds no image classifier.
    """
    if not path.is_file():
        raise UserError(f"There is no classifier {path}.")
    try:
        classifier = keras.saving.load_model(path, compile=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"Cannot read the classifier {path} ({path.stat().st_size} bytes): {reason}. It is damaged, not a "
            ".keras file, or needs custom code. Train or export it again."
        ) from error
    shape = getattr(classifier, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[-1] != 3 or shape[1] != shape[2]:
        raise UserError(f"A classifier takes square images, (batch, size, size, 3). Received: {shape} in {path}.")
    return classifier
