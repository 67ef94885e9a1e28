"""Writing a `.keras` file, atomically, and reading one that may be anything."""

import pathlib
import re
import tempfile
import zipfile

import keras

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically
from robust_tf.models.large_weights import saved_without_copies
from robust_tf.models.plain import image_shape, plain_classifier


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
        A model from images (batch, size, size, 3) to logits, not compiled, see `plain_classifier`.

    Raises:
        UserError: the file is missing, damaged, or holds no image classifier.
    """
    return plain_classifier(read_model(path))


def read_model(path: pathlib.Path) -> keras.Model:
    """Reads the model of a `.keras` file as it was saved, with a look at the images that it takes.

    Raises:
        UserError: as of `load_classifier`.
    """
    if not path.is_file():
        raise UserError(f"There is no classifier {path}.")
    try:
        model = keras.saving.load_model(path, compile=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        if unknown := re.match(r"Could not locate (?:class|function) '(.*?)'", reason):
            raise UserError(
                f"A classifier is made of Keras's own layers. Received: {path}, which needs the Python code of "
                f"{unknown[1]!r}. Save keras.Model(images, model.call(images)) instead, with images = "
                "keras.Input((size, size, 3)), where all inside is Keras's own."
            ) from error
        raise UserError(
            f"Cannot read the classifier {path} ({path.stat().st_size} bytes): {reason[:300]}. It is damaged, not a "
            ".keras file, or needs custom code. Train or export it again."
        ) from error
    shape = image_shape(model)
    if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise UserError(f"A classifier takes square images, (batch, size, size, 3). Received: {shape} in {path}.")
    return model
