"""The layout of a model's folder, which the exporter, the server and TensorFlow Serving share."""

import os
import pathlib
import re
from typing import NamedTuple

from robust_tf.errors import UserError

MAX_VERSION = 2**63 - 1
SAVED_MODEL = "saved_model.pb"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


class Absence(NamedTuple):
    """Why a model's folder has no version.

    Attributes:
        reason: The reason, and what to do about it, in whole sentences.
        final: Whether no version can ever appear there, so that waiting is pointless.
    """

    reason: str
    final: bool


def version_folders(base: pathlib.Path) -> dict[int, pathlib.Path]:
    """Returns the versions in a model's folder: the subfolders whose name is a number, which may have leading zeros.

    Args:
        base: Folder of the model.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base = pathlib.Path(folder)
        ...     for name in ("1", "0002", "old"):
        ...         (base / name).mkdir()
        ...     sorted(version_folders(base))
        [1, 2]
    """
    if not base.is_dir():
        return {}
    numbered = [path for path in sorted(base.iterdir()) if path.name.isascii() and path.name.isdigit()]
    return {int(path.name): path for path in numbered if int(path.name) <= MAX_VERSION and path.is_dir()}


def complete_versions(base: pathlib.Path) -> dict[int, pathlib.Path]:
    """Returns the versions that hold a SavedModel. A folder without one is probably still being copied."""
    return {number: path for number, path in version_folders(base).items() if (path / SAVED_MODEL).is_file()}


def is_remote(path: str) -> bool:
    """Returns whether a path is an address such as gs://bucket/model.

    Example:
        >>> is_remote("gs://bucket/pets"), is_remote("/models/pets")
        (True, False)
    """
    return _URL.match(path) is not None


def check_local(path: str, what: str) -> None:
    """Refuses a path that is an address such as gs://bucket/model.

    Args:
        path: Path to check.
        what: What the path is for, as the error message calls it.

    Raises:
        UserError: The path is an address.
    """
    if is_remote(path):
        raise UserError(
            f"This server reads folders of this machine only. Received: {what}: {path}. Copy the model to a local "
            "folder and name that, or run tensorflow_model_server."
        )


def why_no_version(base: pathlib.Path) -> Absence | None:
    """Returns the reason why a folder has no complete version, or None if it has one."""
    try:
        return None if complete_versions(base) else _why_no_version(base)
    except OSError as error:
        return Absence(f"{base} can't be read: {error.strerror}. Make it readable for this user.", False)


def _why_no_version(base: pathlib.Path) -> Absence:
    if base.is_symlink() and not base.exists():
        return Absence(f"{base} is a link to {os.readlink(base)}, which does not exist.", False)
    if not base.exists():
        nearest = next(parent for parent in base.parents if parent.exists())
        return Absence(f"This folder does not exist, only {nearest} does. Check the path, or export a model.", False)
    if not base.is_dir():
        return Absence(
            f"{base} is a file. A model is the folder that holds its versions, as python -m robust_tf.export writes "
            "it.",
            True,
        )
    if (base / SAVED_MODEL).is_file():
        if base.name.isascii() and base.name.isdigit():
            return Absence(
                f"{base} is one version. The model is the folder that holds the versions: {base.parent}.", True
            )
        return Absence(
            f"{base} holds a SavedModel itself. A version is a folder whose name is a number: rename this one, for "
            f"example to {base.parent / '1'}, and name the folder that holds it: {base.parent}.",
            True,
        )
    incomplete = sorted(version_folders(base))
    if incomplete:
        numbers = ", ".join(map(str, incomplete))
        return Absence(
            f"Version {numbers} has no {SAVED_MODEL}. It is still being copied, or it holds no SavedModel.", False
        )
    folders = sorted(path for path in base.iterdir() if path.is_dir())
    named = [path.name for path in folders if (path / SAVED_MODEL).is_file()]
    if named:
        return Absence(
            f"{named[0]!r} holds a SavedModel, but a version is a folder whose name is a number. Rename it, for "
            "example to 1.",
            False,
        )
    deeper = [path for path in folders if complete_versions(path)]
    if deeper:
        return Absence(f"The versions are one folder deeper. Name the folder {deeper[0]} instead.", False)
    return Absence(
        f"A version is a folder whose name is a number and that holds {SAVED_MODEL}, as python -m robust_tf.export "
        "writes it.",
        False,
    )
