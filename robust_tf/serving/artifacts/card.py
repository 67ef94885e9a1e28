"""The model card of an artifact, which travels with it: labels, sizes, and a digest of each file."""

import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from robust_tf.errors import UserError, unknown_name
from robust_tf.files import write_json

CARD_NAME = "model_card.json"
LABELS_NAME = "labels.txt"
SAVED_MODEL_FORMAT = "savedmodel"
INT8_FORMAT = "litert_int8"


class Format(NamedTuple):
    """A format in which classifiers are deployed.

    Attributes:
        title: Name in tables.
        file: Name of the file that marks a folder as an artifact of this format.
        extra: Extra of this package that installs what the format needs.
        packages: Packages of the extra that convert to the format and run it.
    """

    title: str
    file: str
    extra: str = ""
    packages: tuple[str, ...] = ()


# The formats by their names in `robust_tf.export --format`, which are also the names of their folders.
FORMATS = {
    SAVED_MODEL_FORMAT: Format("SavedModel", "saved_model.pb"),
    "onnx": Format("ONNX", "model.onnx", "onnx", ("tf2onnx", "onnxruntime")),
    "litert": Format("LiteRT", "model.tflite", "litert", ("ai_edge_litert",)),
    INT8_FORMAT: Format("LiteRT int8", "model.tflite", "litert", ("ai_edge_litert",)),
}


def check_formats(names: Sequence[str]) -> None:
    """Refuses unknown formats, duplicates, and formats whose packages are not installed.

    Args:
        names: Names of formats.

    Raises:
        UserError: A format is refused. The message says how to install what is missing.

    Example:
        >>> check_formats(["savedmodel", "savedmodel"])
        Traceback (most recent call last):
        robust_tf.errors.UserError: Each format can be named once. Received: savedmodel,savedmodel.
    """
    for name in names:
        if name not in FORMATS:
            raise unknown_name("format", name, FORMATS)
        missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"The format {name} needs packages that are not installed. Received: no {' and no '.join(missing)}. "
                f"Install them: pip install 'robust_tf[{FORMATS[name].extra}]'."
            )
    if not names or len(set(names)) < len(names):
        raise UserError(f"Each format can be named once. Received: {','.join(names) or 'no format'}.")


def write_card(folder: pathlib.Path, format_name: str, facts: Mapping[str, Any]) -> None:
    """Writes the model card of an artifact whose other files are complete, with the size and digest of each.

    Args:
        folder: Folder of the artifact.
        format_name: Name in `FORMATS`.
        facts: Further content of the card.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD_NAME)
    files = {path.relative_to(folder).as_posix(): _described(path) for path in paths}
    write_json(folder / CARD_NAME, {**facts, "format": format_name, "files": files})


def write_labels(path: pathlib.Path, labels: Sequence[str]) -> None:
    """Writes the names of the classes, one on each line, in the order of the logits."""
    path.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")


def read_labels(path: str) -> list[str]:
    """Returns the names of the classes in a text file that the user named by --labels, one on each line.

    Raises:
        UserError: The file cannot be read, or is not text.
    """
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels must be a text file. Received: {path}: {error}.") from error


def read_card(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the model card of an artifact, after comparing the artifact's files with it.

    Args:
        folder: Folder of the artifact.

    Raises:
        UserError: There is no card, it cannot be read, or a file is missing or differs from it.
    """
    path = folder / CARD_NAME
    again = "Export the classifier again with python -m robust_tf.export."
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        files = card.get("files", {})  # SavedModels of older versions have none
        if len(card["labels"]) != card["classes"] or not isinstance(card["image_size"], int):
            raise ValueError(f"{len(card['labels'])} labels for {card['classes']} classes")
        for name, expected in files.items():
            found = _described(folder / name) if (folder / name).is_file() else None
            if found != expected:
                change = "is missing" if found is None else "has changed since it was exported"
                raise UserError(
                    f"The files of an artifact must be those that its {CARD_NAME} describes. Received: "
                    f"{folder / name}, which {change}. {again}"
                )
    except FileNotFoundError as error:
        raise UserError(
            f"An artifact needs the {CARD_NAME} of its export. Received: {folder} without it. {again}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not the card of an artifact. Received: {type(error).__name__}: {error}. {again}"
        ) from error
    return dict(card)


def _described(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
