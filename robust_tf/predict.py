"""Classifies images, or finds objects in them, with a served model, an export, or a `.keras` file.

    python -m robust_tf.predict --server=http://localhost:8501 --model_name=pets cat.jpg photos/
    python -m robust_tf.predict --artifact=exports/pets/1 --output=predictions.csv photos/
    python -m robust_tf.predict --classifier=runs/pets/classifier.keras --probe_epsilon=0.5 photos/

This prints the most probable classes of each image, or writes them to a file. With a detector, it prints the boxes, and
with a segmenter, the share of each class; `--draw=FOLDER` draws them. Folders are searched for images, with all
their subfolders. If a run with `--output` is stopped or killed, the same command continues it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from robust_tf.console import meter
from robust_tf.errors import UserError, exit_on_user_error
from robust_tf.flags import flag, parse_flags
from robust_tf.serving.artifacts.card import read_labels
from robust_tf.serving.client import Client, Guess, ServerError, connect
from robust_tf.serving.client.base import Probe, ask_in_batches
from robust_tf.serving.client.dense import DensePrediction, ask_dense, dense_task
from robust_tf.serving.client.dense_predictions import DRAWN_SCORE, DenseFormat, PictureFolder, drawn
from robust_tf.serving.client.pictures import find_pictures
from robust_tf.serving.client.predictions import SUFFIXES, Format, Prediction, predictions_file
from robust_tf.serving.client.retries import RETRY_SECONDS
from robust_tf.serving.wire.names import PROBE_SIGNATURE

_DEFAULT_SERVER = "http://localhost:8501"
_LISTED_AT_MOST = 20
Answer = tuple[list[Guess], Probe | None] | DensePrediction
AnyPrediction = Prediction | DensePrediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """The flags of this program."""

    server: str = flag(
        "",
        "Address of a server: http://host:port, https://host:port, grpc://host:port or grpcs://host:port (TLS). By "
        f"default, {_DEFAULT_SERVER}, unless --classifier or --artifact is given.",
    )
    classifier: str = flag(
        "",
        "Classifier, detector or segmenter to run in this process: the path of a .keras file, or the name of a "
        "published model.",
    )
    artifact: str = flag(
        "", "Export to run in this process: the folder of a version, or a model.onnx or model.tflite file."
    )
    # For a server
    model_name: str = flag("", "Name of the served model. It may be left out if a `robust_tf.serve` has only one.")
    version: int | None = flag(None, "Version of the served model. By default, the latest.")
    label: str = flag("", "Label of the served version, instead of its number.")
    timeout_seconds: float = flag(60.0, "Longest time in seconds that a request may take.")
    retry_seconds: float = flag(
        RETRY_SECONDS, "Longest time in seconds to keep repeating a request while the server is busy. 0 means one try."
    )
    token: str = flag("", "Token for a proxy, sent as `Authorization: Bearer`. Over gRPC, it needs grpcs://.")
    ca_file: str = flag("", "PEM file of the authority that signed the server's certificate (https://, grpcs://).")
    # For a classifier
    labels: str = flag(
        "",
        "Text file with the names of the classes of --classifier in the order of the logits, one on each line. By "
        "default, the names in results.json or, for a published model, those of its data set in TFDS.",
    )
    # What to compute
    top: int = flag(
        3, "Number of classes, at most 5, or of detected objects to print for each image. Files have all objects."
    )
    min_confidence: float = flag(
        0.0,
        "Smallest probability, in [0, 1], at which the most probable class is accepted. Below it, it is rejected. For "
        "a detector, the lowest score of an object that is shown; without the flag, 0.05 in lists and 0.3 in drawings.",
    )
    probe_epsilon: float | None = flag(
        None,
        "Also attack each image within this distance, in [0, 1] pixel units, and say whether its label stays the same. "
        "A server or an export needs the signature attack_probe (--attack_probe of robust_tf.export).",
    )
    probe_norm: str = flag("", "Norm of this attack on --classifier, l2 or linf. By default, the one in results.json.")
    batch_size: int = flag(16, "Number of images in each batch or request.")
    concurrency: int = flag(4, "Number of concurrent batches or requests.")
    # Where to write
    output: str = flag("", "File for the predictions, .csv or .jsonl (JSON Lines). By default, they are printed.")
    json: bool = flag(False, "Print one JSON object per line.")
    draw: str = flag(
        "", "Folder for a picture of each image with the boxes of a detector, or the mask of a segmenter, as PNG."
    )

    def __post_init__(self) -> None:
        for name in ("top", "batch_size", "concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1. Received: {getattr(self, name)}.")
        if not self.retry_seconds >= 0:
            raise UserError(f"--retry_seconds must be 0 or more. Received: {self.retry_seconds}.")
        if not self.timeout_seconds > 0:
            raise UserError(f"--timeout_seconds must be more than 0. Received: {self.timeout_seconds}.")
        if not 0 <= self.min_confidence <= 1:
            raise UserError(f"--min_confidence must be in [0, 1]. Received: {self.min_confidence}.")
        if self.probe_epsilon is not None and not (math.isfinite(self.probe_epsilon) and self.probe_epsilon >= 0):
            raise UserError(f"--probe_epsilon must be 0 or more. Received: {self.probe_epsilon}.")
        if self.output and not self.output.endswith(SUFFIXES):
            raise UserError(f"--output must end in {' or '.join(SUFFIXES)}. Received: {self.output}.")
        if self.output and self.json:
            raise UserError(f"--json is for printed predictions. Received: --json with --output={self.output}.")
        self._check_model()

    def _check_model(self) -> None:
        models = [name for name in ("server", "classifier", "artifact") if getattr(self, name)]
        if "://" in self.artifact:
            raise UserError(f"--artifact is a folder or a file. Received: {self.artifact}. Use --server for a server.")
        if len(models) > 1:
            raise UserError(
                f"Choose one of --server, --classifier and --artifact. Received: --{' and --'.join(models)}."
            )
        of_server = ("model_name", "version", "label", "timeout_seconds", "retry_seconds", "token", "ca_file")
        without_use = [] if models in ([], ["server"]) else list(of_server)
        without_use += [] if models == ["classifier"] else ["labels", "probe_norm"]
        without_use += ["probe_norm"] if self.probe_epsilon is None else []
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in without_use:
            if getattr(self, name) != defaults[name]:
                model = f"--{models[0]}" if models else "--server"
                extra = " without --probe_epsilon" if name == "probe_norm" and self.probe_epsilon is None else ""
                raise UserError(f"--{name} has no effect with {model}{extra}. Received: {getattr(self, name)!r}.")

    @property
    def model(self) -> str:
        """The model as the user named it."""
        return self.classifier or self.artifact or self.server or _DEFAULT_SERVER

    @property
    def form(self) -> "_Form":
        """What is said about each image."""
        plain = Format(self.top, self.min_confidence, self.probe_epsilon is not None)
        return _Form(plain, DenseFormat(self.top, self.min_confidence, self.masks))

    @property
    def masks(self) -> PictureFolder | None:
        """Folder for the masks of a segmenter. Without an output, no masks are written."""
        if not self.output:
            return None
        output = pathlib.Path(self.output)
        return PictureFolder(output.with_name(f"{output.stem}_masks"), f"--output={self.output}")

    @property
    def drawings(self) -> PictureFolder | None:
        """Folder for the drawings; None without the flag."""
        return PictureFolder(pathlib.Path(self.draw), f"--draw={self.draw}") if self.draw else None


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is said about each image, which depends on what the model turns out to be."""

    plain: Format
    dense: DenseFormat

    @property
    def csv_header(self) -> list[str]:
        return self.plain.csv_header

    def csv(self, prediction: AnyPrediction) -> str:
        return self.plain.csv(_plain(prediction))

    def json(self, prediction: AnyPrediction) -> str:
        if isinstance(prediction, DensePrediction):
            return self.dense.json(prediction)
        return self.plain.json(prediction)

    def text(self, prediction: AnyPrediction) -> str:
        if isinstance(prediction, DensePrediction):
            return self.dense.text(prediction)
        return self.plain.text(prediction)


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
    if not config.output:
        failed = False
        for prediction in _predictions(config, pictures.entries):
            failed |= bool(prediction.error)
            print(config.form.json(prediction) if config.json else config.form.text(prediction))
        return int(failed)
    return int(_write_predictions(config, pictures.entries))


def _write_predictions(config: PredictConfig, entries: Sequence[tuple[pathlib.Path, str]]) -> bool:
    """Writes the predictions that the output does not have yet. Returns whether an image was refused."""
    refused = []
    path = pathlib.Path(config.output)
    is_continued = path.is_file() and path.stat().st_size > 0
    with predictions_file(path, config.form, _settings(config)) as output:
        missing = [entry for entry in entries if str(entry[0]) not in output.done]
        if len(missing) < len(entries):
            print(f"{config.output} already has {len(entries) - len(missing)} of {len(entries)} images.")
        with meter("images", total=len(entries)) as bar:
            done = len(entries) - len(missing)
            bar.update(done)
            for prediction in _predictions(config, missing, is_continued) if missing else ():
                output.add(prediction)
                done += 1
                if prediction.error:
                    refused.append(prediction)
                bar.update(done, f"refused {len(refused)}" if refused else "")
    print(f"Wrote {len(missing)} predictions to {config.output}.")
    if refused:
        print(f"{len(refused)} images were refused; the column or key `error` says why:", file=sys.stderr)
        for prediction in refused[:_LISTED_AT_MOST]:
            print(f"  {prediction.image}: {prediction.error}", file=sys.stderr)
        if len(refused) > _LISTED_AT_MOST:
            print(f"  and {len(refused) - _LISTED_AT_MOST} more", file=sys.stderr)
    return bool(refused)


def _predictions(
    config: PredictConfig, entries: Sequence[tuple[pathlib.Path, str]], is_continued: bool = False
) -> Iterator[AnyPrediction]:
    """Yields the prediction for each image, in order. With `is_continued`, files of an interrupted run are replaced."""
    answers = _Answers(entries)
    with _server_errors_explained(config), _open_model(config) as client:
        if task := dense_task(client):
            _check_dense(config, task)
            yield from _dense_predictions(config, client, task, entries, is_continued)
            return
        if config.draw:
            raise UserError(f"--draw is for detectors and segmenters. Received: {config.model}, a classifier.")
        if config.probe_epsilon is not None and not client.has_signature(PROBE_SIGNATURE):
            raise UserError(
                f"--probe_epsilon needs a model with the signature {PROBE_SIGNATURE}. Received: {config.model}, which "
                "has none. Export it with --attack_probe, or use --classifier."
            )

        def ask(batch: list[bytes]) -> list[Answer]:
            guesses = client.classify(batch)
            if config.probe_epsilon is None:
                return [(guess, None) for guess in guesses]
            return list(zip(guesses, client.probe(batch, config.probe_epsilon), strict=True))

        results = ask_in_batches(ask, answers.contents(), batch_size=config.batch_size, concurrency=config.concurrency)
        yield from answers.in_order(results)


def _dense_predictions(
    config: PredictConfig,
    client: Client,
    task: str,
    entries: Sequence[tuple[pathlib.Path, str]],
    is_continued: bool,
) -> Iterator[AnyPrediction]:
    """Yields the answer of a detector or segmenter for each image, in order, after drawing it."""
    drawings = config.drawings
    masks = config.masks if task == "segmentation" else None
    if not is_continued:
        for folder in (drawings, masks):
            if folder:
                folder.check(str(path) for path, _ in entries)

    def ask(batch: list[bytes]) -> list[Answer]:
        return list(ask_dense(client, batch, with_preview=drawings is not None))

    answers = _Answers(entries)
    results = ask_in_batches(ask, answers.contents(), batch_size=config.batch_size, concurrency=config.concurrency)
    for prediction in answers.in_order(results):
        if drawings and isinstance(prediction, DensePrediction):
            drawings.write(prediction.image, drawn(prediction, min_score=config.min_confidence or DRAWN_SCORE))
            prediction = prediction._replace(preview=b"")
        yield prediction


def _check_dense(config: PredictConfig, task: str) -> None:
    """Refuses flags that mean nothing for a detector or segmenter."""
    model = f"{config.model}, a network for {task}"
    if config.probe_epsilon is not None:
        raise UserError(
            f"--probe_epsilon attacks classifiers. Received: {model}. Measure it under attack with "
            "python -m robust_tf.evaluate."
        )
    if config.output.endswith(".csv"):
        raise UserError(
            f"The predictions of a network for {task} do not fit into the columns of a CSV file. Received: "
            f"--output={config.output}. Use a name that ends in .jsonl."
        )
    if task == "segmentation" and config.min_confidence:
        raise UserError(
            f"--min_confidence is for classifiers and detectors. Received: {config.min_confidence} for {model}."
        )


def _plain(prediction: AnyPrediction) -> Prediction:
    return prediction if isinstance(prediction, Prediction) else Prediction(prediction.image, error=prediction.error)


def _open_model(config: PredictConfig) -> Client:
    if config.classifier or config.artifact:
        from robust_tf.environment import start_tensorflow

        start_tensorflow()
        from robust_tf.serving.local import open_classifier, open_export

        if config.artifact:
            return open_export(config.artifact)
        return open_classifier(
            config.classifier,
            labels=read_labels(config.labels) if config.labels else (),
            with_probe=config.probe_epsilon is not None,
            norm=config.probe_norm,
        )
    return connect(
        config.server or _DEFAULT_SERVER,
        model_name=config.model_name,
        version=config.version,
        label=config.label,
        timeout_seconds=config.timeout_seconds,
        token=config.token,
        ca_file=config.ca_file,
        retry_seconds=config.retry_seconds,
    )


@contextlib.contextmanager
def _server_errors_explained(config: PredictConfig) -> Iterator[None]:
    try:
        yield
    except ServerError as error:
        busy = error.reached and error.code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
        way_out = f" Try again later, or increase --retry_seconds={config.retry_seconds:g}." if busy else ""
        raise UserError(f"The server cannot answer. Received: {error}.{way_out}") from error


def _settings(config: PredictConfig) -> dict[str, Any]:
    """Returns everything on which a prediction depends."""
    names = ("server", "classifier", "artifact", "model_name", "version", "label", "labels", "top", "min_confidence")
    settings = {name: getattr(config, name) for name in (*names, "probe_epsilon", "probe_norm")}
    if config.draw:  # left out otherwise, so that files of earlier versions can be continued
        settings["draw"] = config.draw
    path = pathlib.Path(config.classifier or config.artifact)
    if (config.classifier or config.artifact) and path.exists():
        settings["sha256"] = _sha256(path)
    return settings


def _sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


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

    def in_order(self, results: Iterable[Answer | ServerError]) -> Iterator[AnyPrediction]:
        """Yields a prediction for each picture, which may say why the picture was refused."""
        for result in results:
            yield from self._without_content()
            path, _ = self._seen.popleft()
            if isinstance(result, ServerError):
                yield Prediction(str(path), error=result.message)
            elif isinstance(result, DensePrediction):
                yield result._replace(image=str(path))
            else:
                guesses, probe = result
                yield Prediction(str(path), tuple(guesses), probe)
        yield from self._without_content()

    def _without_content(self) -> Iterator[Prediction]:
        while self._seen and self._seen[0][1]:
            path, reason = self._seen.popleft()
            yield Prediction(str(path), error=reason)


if __name__ == "__main__":
    with exit_on_user_error():
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a file name may not be valid text
        sys.exit(main(sys.argv))
