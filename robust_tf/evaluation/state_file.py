"""The memory of an evaluation on disk: what is finished, and how far the unfinished part is."""

import json
import pathlib
from typing import Any

from robust_tf.errors import UserError
from robust_tf.files import write_json


class StateFile:
    """Results by key, written after every step and never half-written, so that a killed run goes on where it was.

    Args:
        path: of the JSON file; read when it is there.
        identity: what a run must have in common with the one that wrote the file, as JSON values by name.

    Raises:
        UserError: the file belongs to a run with another identity (says what differs), or is damaged.
    """

    def __init__(self, path: pathlib.Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))  # tuples become lists, as they come back from the file
        self._finished: dict[str, Any] = {}
        self._unfinished: dict[str, Any] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        way_out = f"Choose another --output, or delete {self._path} to start anew."
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            identity, self._finished = content["identity"], content["finished"]
            self._unfinished = content["unfinished"]
            if not isinstance(self._finished, dict) or not isinstance(self._unfinished, dict):
                raise ValueError("finished and unfinished are no objects")
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
                f"{self._path} is the state of another evaluation (there -> now): {'; '.join(differences)}. {way_out}"
            )

    def finished(self, key: str) -> Any:
        """The result of a part, or None."""
        return self._finished.get(key)

    def unfinished(self, key: str) -> Any:
        """What `keep` was last given for a part that is not finished, or None."""
        return self._unfinished.get(key)

    def keep(self, key: str, progress: Any) -> None:
        """Notes how far a part is."""
        self._unfinished[key] = progress
        self._write()

    def finish(self, key: str, result: Any) -> None:
        """Notes the result of a part."""
        self._unfinished.pop(key, None)
        self._finished[key] = result
        self._write()

    def _write(self) -> None:
        content = {"identity": self._identity, "finished": self._finished, "unfinished": self._unfinished}
        write_json(self._path, content)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
