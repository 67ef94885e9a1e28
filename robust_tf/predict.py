"""Classifies images with a served model.

    python -m robust_tf.predict --server=http://localhost:8501 --model_name=pets cat.jpg photos/

This prints the most probable classes of each image. Folders are searched for images. Only gRPC needs TensorFlow.
"""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import flag, parse_flags
from robust_tf.serving.client import Guess, ServerError, connect
from robust_tf.serving.client.pictures import find_pictures
from robust_tf.serving.client.retries import RETRY_SECONDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """The flags of this program."""

    server: str = flag(
        "http://localhost:8501",
        "Address of the server: http://host:port, https://host:port, grpc://host:port or grpcs://host:port (TLS).",
    )
    model_name: str = flag("", "Name of the model. It may be left out if a `robust_tf.serve` has only one model.")
    version: int | None = flag(None, "Version of the model. By default, the latest.")
    label: str = flag("", "Label of the version, instead of its number.")
    top: int = flag(3, "Number of classes to print for each image. The server returns at most 5.")
    batch_size: int = flag(16, "Number of images in each request.")
    concurrency: int = flag(4, "Number of concurrent requests.")
    timeout_seconds: float = flag(60.0, "Longest time in seconds that a request may take.")
    retry_seconds: float = flag(
        RETRY_SECONDS, "Longest time in seconds to keep repeating a request while the server is busy. 0 means one try."
    )
    token: str = flag("", "Token for a proxy, sent as `Authorization: Bearer`. Over gRPC, it needs grpcs://.")
    ca_file: str = flag("", "PEM file of the authority that signed the server's certificate (https://, grpcs://).")
    json: bool = flag(False, "Print one JSON object per line.")

    def __post_init__(self) -> None:
        for name in ("top", "batch_size", "concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1. Received: {getattr(self, name)}.")
        if not self.retry_seconds >= 0:
            raise UserError(f"--retry_seconds must be 0 or more. Received: {self.retry_seconds}.")
        if not self.timeout_seconds > 0:
            raise UserError(f"--timeout_seconds must be more than 0. Received: {self.timeout_seconds}.")


def main(argv: Sequence[str]) -> int:
    """Classifies the images that the arguments name, and returns the exit code, 1 if an image was refused.

    Args:
        argv: Name of the program and its arguments.
    """
    config, names = parse_flags(PredictConfig, argv, __doc__ or "")
    if not names:
        raise UserError("Name the images or folders to classify. Received: none.")
    pictures = find_pictures(names)
    if line := pictures.left_out_line():
        print(line, file=sys.stderr)
    answers = _Answers(pictures.entries)
    failed = False
    try:
        with connect(
            config.server,
            model_name=config.model_name,
            version=config.version,
            label=config.label,
            timeout_seconds=config.timeout_seconds,
            token=config.token,
            ca_file=config.ca_file,
            retry_seconds=config.retry_seconds,
        ) as client:
            results = client.classify_many(
                answers.contents(), batch_size=config.batch_size, concurrency=config.concurrency
            )
            for path, result in answers.in_order(results):
                failed |= isinstance(result, str)
                print(_as_json(path, result, config.top) if config.json else _as_text(path, result, config.top))
    except ServerError as error:
        busy = error.reached and error.code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
        way_out = f" Try again later, or increase --retry_seconds={config.retry_seconds:g}." if busy else ""
        raise UserError(f"The server cannot answer. Received: {error}.{way_out}") from error
    return int(failed)


class _Answers:
    """Reads pictures when they are needed, and merges the answers with the reasons why some cannot be read."""

    def __init__(self, entries: Sequence[tuple[pathlib.Path, str]]) -> None:
        self._entries = entries
        self._seen: collections.deque[tuple[pathlib.Path, str]] = collections.deque()

    def contents(self) -> Iterator[bytes]:
        """Yields the content of each picture. Pictures that cannot be read are left out and remembered."""
        for path, reason in self._entries:
            content = b""
            if not reason:
                try:
                    content = path.read_bytes()
                except OSError as error:  # e.g. the file has been removed since the folder was searched
                    reason = f"can't be read: {error.strerror}"
            self._seen.append((path, reason))
            if not reason:
                yield content

    def in_order(
        self, results: Iterable[list[Guess] | ServerError]
    ) -> Iterator[tuple[pathlib.Path, list[Guess] | str]]:
        """Yields each picture with its classes, or with the reason why there are none."""
        for result in results:
            yield from self._without_content()
            path, _ = self._seen.popleft()
            yield path, result.message if isinstance(result, ServerError) else result
        yield from self._without_content()

    def _without_content(self) -> Iterator[tuple[pathlib.Path, str]]:
        while self._seen and self._seen[0][1]:
            yield self._seen.popleft()


def _as_text(path: pathlib.Path, result: list[Guess] | str, top: int) -> str:
    if isinstance(result, str):
        return f"{path}: refused: {result}"
    return f"{path}: " + ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in result[:top])


def _as_json(path: pathlib.Path, result: list[Guess] | str, top: int) -> str:
    if isinstance(result, str):
        return json.dumps({"image": str(path), "error": result})
    return json.dumps({"image": str(path), "predictions": [guess._asdict() for guess in result[:top]]})


if __name__ == "__main__":
    with exit_on_user_error():
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a file name may not be valid text
        sys.exit(main(sys.argv))
