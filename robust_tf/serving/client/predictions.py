"""The predictions for pictures: as text, as lines of JSON or CSV, and in a file that an interrupted run continues."""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from robust_tf.errors import UserError
from robust_tf.files import write_json
from robust_tf.serving.client.base import Guess, Probe

SUFFIXES = (".csv", ".jsonl")


class Prediction(NamedTuple):
    """The answer for one picture.

    Attributes:
        image: Path of the picture.
        guesses: Its most probable classes, the most probable first. Empty if the picture was refused.
        probe: What a small attack does to the label. None if no attack was asked for.
        error: Why the picture was refused, or "".
    """

    image: str
    guesses: tuple[Guess, ...] = ()
    probe: Probe | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Format:
    """What is said about each picture.

    Attributes:
        top: Number of classes.
        min_confidence: Smallest probability of the most probable class at which a prediction is accepted. 0 accepts
            all, and then nothing is said about it.
        probed: Whether there was a small attack.
    """

    top: int
    min_confidence: float
    probed: bool

    def accepted(self, prediction: Prediction) -> bool:
        """Returns whether the most probable class is probable enough."""
        return prediction.guesses[0].probability >= self.min_confidence

    def text(self, prediction: Prediction) -> str:
        """Returns one line for people."""
        if prediction.error:
            return f"{prediction.image}: refused: {prediction.error}"
        line = ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in prediction.guesses[: self.top])
        if not self.accepted(prediction):
            line = f"rejected: {line}"
        if prediction.probe:
            line += "; robust" if prediction.probe.survives else f"; attacked: {prediction.probe.label}"
        return f"{prediction.image}: {line}"

    def json(self, prediction: Prediction) -> str:
        """Returns one JSON object in one line."""
        if prediction.error:
            return json.dumps({"image": prediction.image, "error": prediction.error})
        facts: dict[str, Any] = {
            "image": prediction.image,
            "predictions": [guess._asdict() for guess in prediction.guesses[: self.top]],
        }
        if self.min_confidence:
            facts["accepted"] = self.accepted(prediction)
        if prediction.probe:
            facts |= {"robust": prediction.probe.survives, "attacked_label": prediction.probe.label}
        return json.dumps(facts)

    @property
    def csv_header(self) -> list[str]:
        """Names of the columns in a CSV file."""
        names = ["image", "label", "probability"]
        names += [f"{name}_{rank}" for rank in range(2, self.top + 1) for name in ("label", "probability")]
        names += ["accepted"] * bool(self.min_confidence) + ["robust", "attacked_label"] * self.probed
        return [*names, "error"]

    def csv(self, prediction: Prediction) -> str:
        """Returns one line of a CSV file."""
        cells = {"image": prediction.image, "error": prediction.error}
        for rank, guess in enumerate(prediction.guesses[: self.top], 1):
            suffix = "" if rank == 1 else f"_{rank}"
            cells |= {f"label{suffix}": guess.label, f"probability{suffix}": f"{guess.probability:.6g}"}
        if self.min_confidence and not prediction.error:
            cells["accepted"] = str(self.accepted(prediction)).lower()
        if prediction.probe:
            cells |= {"robust": str(prediction.probe.survives).lower(), "attacked_label": prediction.probe.label}
        return _csv_line([cells.get(name, "") for name in self.csv_header])


class Lines(Protocol):
    """How predictions become lines of a file; `Format` is one for the predictions of classifiers."""

    @property
    def csv_header(self) -> list[str]:
        """Names of the columns in a CSV file."""

    def csv(self, prediction: Any) -> str:
        """Returns one line of a CSV file."""

    def json(self, prediction: Any) -> str:
        """Returns one JSON object in one line."""


class PredictionsFile:
    """A CSV or JSON Lines file to which predictions are appended; see `predictions_file`.

    Attributes:
        done: Paths of the pictures that the file already has.
    """

    def __init__(self, file: io.FileIO, path: pathlib.Path, form: Lines) -> None:
        self._file, self._path, self._form = file, path, form
        self._csv = path.suffix == ".csv"
        content = file.read()
        whole = _whole_lines(content, quotes=self._csv)
        if len(whole) < len(content):
            file.truncate(len(whole))
        text = whole.decode("utf-8", "surrogateescape")
        if self._csv:
            self.done = {row["image"] for row in csv.DictReader(io.StringIO(text, newline=""))}
        else:
            self.done = {json.loads(line)["image"] for line in text.splitlines()}
        self._has_header = bool(whole)

    def add(self, prediction: Any) -> None:
        """Appends a prediction.

        Raises:
            UserError: The file cannot be written to, for example because there is no space left.
        """
        if self._csv and not self._has_header:
            self._write(_csv_line(self._form.csv_header))
            self._has_header = True
        self._write(self._form.csv(prediction) if self._csv else self._form.json(prediction))

    def _write(self, line: str) -> None:
        try:
            self._append(line.encode("utf-8", "surrogateescape") + b"\n")
        except OSError as error:
            raise UserError(
                f"The predictions can't be written. Received: --output={self._path}: {error.strerror}. What it has is "
                "kept; the same command continues there."
            ) from error

    def _append(self, content: bytes) -> None:
        if self._file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def predictions_file(path: pathlib.Path, form: Lines, settings: Mapping[str, Any]) -> Iterator[PredictionsFile]:
    """Opens a file of predictions. If it exists, the run continues it.

    A second file, whose name ends in `.settings.json`, holds the settings, so that one file never mixes the predictions
    of different classifiers.

    Args:
        path: Path of the file. Its suffix, .csv or .jsonl, determines its format.
        form: What is said about each picture.
        settings: All settings on which the predictions depend, as JSON values.

    Raises:
        UserError: The file has predictions with other settings, was not written by this program, is written to by
            another program now, or cannot be written.
    """
    record = path.with_name(f"{path.name}.settings.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"--output can't be written. Received: {path}: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another program is writing these predictions. Received: --output={path}. Wait for it, or choose "
                "another --output."
            ) from None
        if file.tell():
            _check_settings(path, record, settings)
        else:
            write_json(record, dict(settings))
        file.seek(0)
        try:
            yield PredictionsFile(file, path, form)
        finally:
            if not os.fstat(file.fileno()).st_size:  # the run was refused before its first prediction
                record.unlink(missing_ok=True)
                path.unlink(missing_ok=True)


def _check_settings(path: pathlib.Path, record: pathlib.Path, settings: Mapping[str, Any]) -> None:
    way_out = "Choose another --output, or remove the file."
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            "--output is continued only if the file beside it says how it was made. Received: "
            f"{path} without a readable {record.name}. {way_out}"
        ) from error
    now = json.loads(json.dumps(settings))
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if names:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise UserError(f"--output has predictions with other settings. Received: {path}: {changes}. {way_out}")


def _whole_lines(content: bytes, *, quotes: bool) -> bytes:
    """Returns the content up to the last complete line. In a CSV file, a quoted cell may hold line breaks."""
    end = length = open_quotes = 0
    for line in content.splitlines(keepends=True):
        length += len(line)
        open_quotes += line.count(b'"') if quotes else 0
        if line.endswith(b"\n") and open_quotes % 2 == 0:
            end = length
    return content[:end]


def _csv_line(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
