"""The state of an evaluation on disk, with which an interrupted evaluation is resumed."""

import json
import pathlib
from typing import Any

from robust_tf.errors import UserError
from robust_tf.files import write_json


def stored_identity(path: pathlib.Path) -> dict[str, Any]:
    """Returns the identity of the run that wrote a state file; empty if there is no such file or it is damaged.

    Args:
        path: Path of the file.
    """
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):  # `StateFile` says what is wrong
        return {}
    return identity if isinstance(identity, dict) else {}


class StateFile:
    """A JSON file with the finished and unfinished parts of an evaluation.

    The file is written atomically after every step, so a run that was killed can be resumed from it.

    Args:
        path: Path of the file, which is read if it exists.
        identity: JSON values, by name, which must be the same in this run and in the run that wrote the file.

    Raises:
        UserError: If the file is damaged or belongs to a run with another identity. The message says what differs.
    """

    def __init__(self, path: pathlib.Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))  # turns tuples into lists, as they are read from the file
        self._finished: dict[str, Any] = {}
        self._unfinished: dict[str, Any] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        way_out = f"Choose another --output, or delete {self._path} to start again."
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            identity, self._finished = content["identity"], content["finished"]
            self._unfinished = content["unfinished"]
            if not isinstance(self._finished, dict) or not isinstance(self._unfinished, dict):
                raise ValueError("finished and unfinished must be objects")
            differences = [
                f"{name}: {_short(identity.get(name))} -> {_short(self._identity.get(name))}"
                for name in {**identity, **self._identity}
                if identity.get(name) != self._identity.get(name)
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._path} is not the state of an evaluation. Received: {type(error).__name__}: {error}. {way_out}"
            ) from error
        if differences:
            raise UserError(
                f"{self._path} is the state of another evaluation (in the file -> now): {'; '.join(differences)}. "
                f"{way_out}"
            )

    def finished(self, key: str) -> Any:
        """Returns the result of a part, or None if the part is not finished."""
        return self._finished.get(key)

    def unfinished(self, key: str) -> Any:
        """Returns the last progress that `keep` has stored for an unfinished part, or None."""
        return self._unfinished.get(key)

    def keep(self, key: str, progress: Any) -> None:
        """Stores the progress of a part.

        Args:
            key: Key of the part.
            progress: JSON value with which the part can be resumed.
        """
        self._unfinished[key] = progress
        self._write()

    def finish(self, key: str, result: Any) -> None:
        """Stores the result of a part.

        Args:
            key: Key of the part.
            result: Result as a JSON value.
        """
        self._unfinished.pop(key, None)
        self._finished[key] = result
        self._write()

    def _write(self) -> None:
        content = {"identity": self._identity, "finished": self._finished, "unfinished": self._unfinished}
        write_json(self._path, content)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
