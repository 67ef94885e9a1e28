"""How versions lie in a model's folder: exporter, server and TensorFlow Serving share this layout."""

import pathlib

MAX_VERSION = 2**63 - 1


def version_folders(base: pathlib.Path) -> dict[int, pathlib.Path]:
    """The versions in a model's folder: children whose name is a number, leading zeros allowed."""
    if not base.is_dir():
        return {}
    numbered = [path for path in sorted(base.iterdir()) if path.name.isascii() and path.name.isdigit()]
    return {int(path.name): path for path in numbered if int(path.name) <= MAX_VERSION and path.is_dir()}
