"""The classifier that a transfer starts from: a file or a published model."""

import pathlib

import keras

from robust_tf.errors import UserError, unknown_name
from robust_tf.models import (
    ARCHITECTURES,
    PUBLISHED,
    classifier_from_checkpoint,
    fetch_published,
    load_classifier,
    read_reference_checkpoint,
    standard_twin,
)

_CHECKPOINT_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".best", ".latest")


def is_flag_file(source: str) -> bool:
    """Returns whether a source is a flag file, whose job trains the classifier."""
    return pathlib.Path(source).suffix == ".cfg"


def load_source(source: str, *, architecture: str, image_size: int | None) -> keras.Model:
    """Loads the classifier that a source names.

    Args:
        source: Path of a `.keras` file or of a PyTorch checkpoint, or the name of a published model. A flag file is
            refused, because its job has to run first.
        architecture: Architecture of the classifier. It is needed for a checkpoint, because the file does not name it.
            For other sources "" accepts any architecture.
        image_size: Height and width of the images for a checkpoint, in pixels. None means 224.

    Raises:
        UserError: There is no such source, the file cannot be read, or it has another architecture.
    """
    path = pathlib.Path(source)
    if path.suffix == ".keras":
        classifier = load_classifier(path)
    elif path.suffix in _CHECKPOINT_SUFFIXES:
        if not architecture:
            raise UserError(
                f"A checkpoint does not say which architecture it belongs to. Received: source={source}. Set "
                f"architecture to one of {', '.join(ARCHITECTURES)}."
            )
        checkpoint = read_reference_checkpoint(path)
        classifier = classifier_from_checkpoint(checkpoint, architecture, image_size=image_size or 224)
    elif source in PUBLISHED:
        classifier = load_classifier(fetch_published(source))
    elif path.exists() or "/" in source:
        raise UserError(
            f"The source must be a .keras file, a checkpoint ({', '.join(_CHECKPOINT_SUFFIXES)}), a flag file (.cfg) "
            f"or the name of a published model. Received: source={source}."
        )
    else:
        raise unknown_name("source", source, PUBLISHED)
    if architecture and classifier.name != architecture:
        raise UserError(
            f"The source {source} has the architecture {classifier.name}. Received: architecture={architecture}. Leave "
            "the architecture out, or choose another source."
        )
    return classifier


def published_twin(source: str) -> str:
    """Returns the name of the published standard model to compare a published robust model with.

    Args:
        source: Name of the robust model.

    Raises:
        UserError: The source is a file, so that its standard counterpart is unknown, or it is itself a standard model.
    """
    if source not in PUBLISHED:
        raise UserError(
            "A baseline needs a source whose standard counterpart is known: a flag file, or the name of a published "
            f"model. Received: source={source}. Run the transfer a second time from your standard classifier instead."
        )
    twin = standard_twin(source)
    if twin == source:
        raise UserError(
            "A baseline compares a robust source with its standard counterpart. "
            f"Received: source={source}, which is a standard model. Choose a robust source, or leave out the baseline."
        )
    return twin
