"""Where a transfer starts from: files and published models become a classifier."""

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
    """Whether `--source` is a job of its own."""
    return pathlib.Path(source).suffix == ".cfg"


def load_source(source: str, *, architecture: str, image_size: int | None) -> keras.Model:
    """The classifier that `--source` names: a `.keras` file, a checkpoint of the reference, or a published model.

    Args:
        source: path or name. A flag file is not resolved here: its job has to be run.
        architecture: needed for a checkpoint, which doesn't tell it; otherwise "" or what the source must be.
        image_size: side in pixels for a checkpoint; None takes 224.

    Raises:
        UserError: nothing of this name, a file that can't be read, or another architecture than asked for.
    """
    path = pathlib.Path(source)
    if path.suffix == ".keras":
        classifier = load_classifier(path)
    elif path.suffix in _CHECKPOINT_SUFFIXES:
        if not architecture:
            raise UserError(
                f"A checkpoint does not tell its architecture. Received: --source={source}. Add --architecture=, one "
                f"of {', '.join(ARCHITECTURES)}."
            )
        checkpoint = read_reference_checkpoint(path)
        classifier = classifier_from_checkpoint(checkpoint, architecture, image_size=image_size or 224)
    elif source in PUBLISHED:
        classifier = load_classifier(fetch_published(source))
    elif path.exists() or "/" in source:
        raise UserError(
            f"--source must be a .keras file, a checkpoint ({', '.join(_CHECKPOINT_SUFFIXES)}), a flag file (.cfg) "
            f"or the name of a published model. Received: {source}."
        )
    else:
        raise unknown_name("source", source, PUBLISHED)
    if architecture and classifier.name != architecture:
        raise UserError(
            f"The source is a {classifier.name}. Received: --architecture={architecture}. Leave --architecture out, "
            "or choose another --source."
        )
    return classifier


def published_twin(source: str) -> str:
    """The standard model to compare a published robust one with.

    Raises:
        UserError: the source is a file, whose standard twin nobody knows.
    """
    if source not in PUBLISHED:
        raise UserError(
            "--baseline needs a source whose standard twin is known: a flag file, or the name of a published model. "
            f"Received: --source={source}. Run the transfer a second time from your standard classifier instead."
        )
    twin = standard_twin(source)
    if twin == source:
        raise UserError(f"--baseline compares with the standard twin, but --source={source} is the standard one.")
    return twin
