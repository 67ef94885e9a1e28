"""Writes `.keras` files atomically, and reads them safely even if they come from an unknown source."""

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
    """Writes a classifier as a `.keras` file. An older file is replaced only when the new one is complete.

    Args:
        classifier: Classifier to save.
        path: Path of the file.

    Raises:
        UserError: The folder or the file cannot be written. An older file is left unchanged.

    Example:
        >>> import pathlib, tempfile
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "classifier.keras"
        ...     save_classifier(model, path)
        ...     load_classifier(path).output_shape
        (None, 2)
    """
    with replaced_atomically(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Saved to a folder first, because Keras would build the archive in memory, at twice the size of the weights.
        with saved_without_copies(classifier):
            classifier.save(folder, zipped=False)
        with zipfile.ZipFile(temporary, "w") as archive:
            for part in sorted(path for path in pathlib.Path(folder).iterdir() if path.is_file()):
                archive.write(part, part.name)


def load_classifier(path: pathlib.Path) -> keras.Model:
    """Reads a classifier from a `.keras` file in safe mode, so no code in the file is run.

    Args:
        path: Path of the file.

    Returns:
        A model that maps images (batch, size, size, 3) to logits, see `plain_classifier`. It is not compiled.

    Raises:
        UserError: The file is missing or damaged, or does not hold an image classifier.

    Example:
        >>> from robust_tf.models import fetch_published
        >>> load_classifier(fetch_published("resnet20_fashion_mnist_l2_eps1")).output_shape
        (None, 10)
    """
    return plain_classifier(read_model(path))


def read_model(path: pathlib.Path) -> keras.Model:
    """Reads the model of a `.keras` file as it was saved, and checks that it takes square images.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file is missing or damaged, or its model does not take square images.

    Example:
        >>> from robust_tf.models import fetch_published
        >>> read_model(fetch_published("resnet20_fashion_mnist_l2_eps1")).name
        'resnet20'
    """
    if not path.is_file():
        raise UserError(f"There is no classifier {path}.")
    try:
        model = keras.saving.load_model(path, compile=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        if unknown := re.match(r"Could not locate (?:class|function) '(.*?)'", reason):
            raise UserError(
                f"A classifier must consist of Keras's own layers. Received: {path}, which needs the Python code of "
                f"{unknown[1]!r}. If only the model itself is a custom class, save "
                "keras.Model(images, model.call(images)) with images = keras.Input((size, size, 3)) instead."
            ) from error
        raise UserError(
            f"Cannot read the classifier {path} ({path.stat().st_size} bytes): {reason[:300]}. It is damaged, not a "
            ".keras file, or needs custom code. Train or export it again."
        ) from error
    shape = image_shape(model)
    if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise UserError(f"A classifier must take square images, (batch, size, size, 3). Received: {shape} in {path}.")
    return model
