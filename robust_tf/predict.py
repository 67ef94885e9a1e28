"""Classifies images with a served model.

    python -m robust_tf.predict --server=http://localhost:8501 --model_name=pets cat.jpg photos/

prints the most probable classes of each image; folders are searched for images. Needs no TensorFlow (except for grpc://).
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from robust_tf.command_line import flag, parse_flags
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.serving.client import Guess, ServerError, connect

_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """The flags of this program."""

    server: str = flag("http://localhost:8501", "http://host:port, https://host:port or grpc://host:port.")
    model_name: str = flag("", "Model to ask. Default: the only one of a `robust_tf.serve`.")
    version: int | None = flag(None, "Version to ask. Default: the latest.")
    label: str = flag("", "Label of the version to ask.")
    top: int = flag(3, "Classes to print; the server gives 5 at most.")
    batch_size: int = flag(16, "Images in a request.")
    concurrency: int = flag(4, "Requests at the same time.")
    timeout_seconds: float = flag(60.0, "Of each request.")
    token: str = flag("", "Sent as `Authorization: Bearer`, for a proxy.")
    ca_file: str = flag("", "PEM file of the authority behind the server's certificate.")
    json: bool = flag(False, "Print one JSON object a line.")

    def __post_init__(self) -> None:
        for name in ("top", "batch_size", "concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is at least 1. Received: {getattr(self, name)}.")


def main(argv: Sequence[str]) -> int:
    """Classifies as the arguments say; gives the exit code: 1 when an image was refused."""
    config, names = parse_flags(PredictConfig, argv, __doc__ or "")
    if not names:
        raise UserError("Images or folders to classify are needed. Received: none.")
    paths = [path for name in names for path in _images(pathlib.Path(name))]
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
        ) as client:
            results = client.classify_many(
                (path.read_bytes() for path in paths),
                batch_size=config.batch_size,
                concurrency=config.concurrency,
            )
            for path, result in zip(paths, results, strict=True):
                failed |= isinstance(result, ServerError)
                print(_as_json(path, result, config.top) if config.json else _as_text(path, result, config.top))
    except ServerError as error:
        raise UserError(f"The server refuses. Received: {error}.") from error
    except OSError as error:
        raise UserError(f"Cannot read an image. Received: {error}.") from error
    return int(failed)


def _images(path: pathlib.Path) -> Iterator[pathlib.Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not found:
            raise UserError(f"There is no image ({', '.join(sorted(_SUFFIXES))}) in the folder. Received: {path}.")
        yield from found
    elif path.is_file():
        yield path
    else:
        raise UserError(f"There is no such file or folder. Received: {path}.")


def _as_text(path: pathlib.Path, result: list[Guess] | ServerError, top: int) -> str:
    if isinstance(result, ServerError):
        return f"{path}: refused: {result.message}"
    return f"{path}: " + ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in result[:top])


def _as_json(path: pathlib.Path, result: list[Guess] | ServerError, top: int) -> str:
    if isinstance(result, ServerError):
        return json.dumps({"image": str(path), "error": result.message})
    return json.dumps({"image": str(path), "predictions": [guess._asdict() for guess in result[:top]]})


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(sys.argv))
