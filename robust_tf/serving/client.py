"""A client for TensorFlow Serving and for `robust_tf.serve`, over REST without TensorFlow, or over gRPC.

with connect("http://localhost:8501", model_name="pets") as client:
    for prediction in client.classify([open("cat.jpg", "rb").read()]):
        print(prediction[0].label, prediction[0].probability)
"""

import abc
import itertools
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from robust_tf.errors import UserError

TRIES = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Guess(NamedTuple):
    """One class of a prediction: its name and its probability in [0, 1]."""

    label: str
    probability: float


class TensorInfo(NamedTuple):
    """An input or output of a signature: TensorFlow's type name ("DT_FLOAT"), and its shape, None where it is free."""

    dtype: str
    shape: tuple[int | None, ...] | None


class Signature(NamedTuple):
    """What a signature takes and gives, by name."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]


class ServerError(Exception):
    """The server refused a request, or could not be reached.

    Attributes:
        code: canonical status name, e.g. "INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE".
        message: what the server says.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Client(abc.ABC):
    """One model of one server; may be used from several threads. Made by `connect`, closed by `with` or `close`."""

    def __init__(self) -> None:
        self._signatures: dict[str, Signature] | None = None

    @abc.abstractmethod
    def predict(self, inputs: Mapping[str, Any], *, signature_name: str = "serving_default") -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
            inputs: an array, or something that makes one, for each input; strings as bytes. The first dimension is the
                batch.
            signature_name: one of `signatures`.

        Returns:
            An array for each output; strings as bytes.

        Raises:
            ServerError: what the server answers.
        """

    @abc.abstractmethod
    def available(self) -> bool:
        """Whether the server is there and a version answers requests."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the connections."""

    @abc.abstractmethod
    def _read_signatures(self) -> dict[str, Signature]: ...

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: types.TracebackType | type | BaseException | None) -> None:
        self.close()

    @property
    def signatures(self) -> dict[str, Signature]:
        """The model's signatures, read from the server once."""
        if self._signatures is None:
            self._signatures = self._read_signatures()
        return self._signatures

    def wait_until_available(self, timeout_seconds: float = 60.0) -> None:
        """Returns when the model answers.

        Raises:
            ServerError: it doesn't within the time.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.available():
            if time.monotonic() > deadline:
                raise ServerError("DEADLINE_EXCEEDED", f"The model is not available after {timeout_seconds:g} s.")
            time.sleep(0.2)

    def classify(self, images: Sequence[bytes]) -> list[list[Guess]]:
        """The most probable classes of encoded images (JPEG, PNG, ...), best first.

        Raises:
            ServerError: what the server answers; one bad image refuses the batch.
        """
        answer = self.predict({"image_bytes": list(images)})
        chosen = np.take_along_axis(answer["probabilities"], answer["top_k"], axis=-1)
        return [
            [Guess(label.decode("utf-8"), float(value)) for label, value in zip(labels, values, strict=True)]
            for labels, values in zip(answer["classes"], chosen, strict=True)
        ]

    def classify_many(
        self, images: Iterable[bytes], *, batch_size: int = 16, concurrency: int = 4
    ) -> Iterator[list[Guess] | ServerError]:
        """`classify` for any number of images, a few batches at a time; in order, the error in place of a bad image.

        Raises:
            ServerError: the server can't be reached, or the model isn't there.
        """

        def answer(batch: list[bytes]) -> list[list[Guess] | ServerError]:
            try:
                return list(self.classify(batch))
            except ServerError as error:
                if error.code != "INVALID_ARGUMENT":
                    raise
                if len(batch) == 1:
                    return [error]
                return [result for image in batch for result in answer([image])]

        source = iter(images)
        batches = iter(lambda: list(itertools.islice(source, batch_size)), [])
        for results in _in_order(answer, batches, concurrency):
            yield from results


def connect(
    server: str,
    *,
    model_name: str = "",
    version: int | None = None,
    label: str = "",
    timeout_seconds: float = 60.0,
    token: str = "",
    ca_file: str = "",
) -> Client:
    """A client for one model.

    Args:
        server: "http://host:8501", "https://host" or "grpc://host:8500" (needs TensorFlow and the serving extra).
        model_name: the model; may be left out when a `robust_tf.serve` has only one.
        version: this version; the latest when None.
        label: the version with this label instead.
        timeout_seconds: of each request.
        token: sent as "Authorization: Bearer ...", for a proxy in front of the server.
        ca_file: PEM file of the authority that signed the server's certificate, when it is your own.

    Raises:
        UserError: the address makes no sense, or the model has to be named.
        ServerError: the server can't be asked which models it has.
    """
    scheme, separator, rest = server.partition("://")
    if not separator or not rest or scheme not in ("http", "https", "grpc"):
        raise UserError(f"A server is http://host:port, https://host:port or grpc://host:port. Received: {server!r}.")
    if version is not None and label:
        raise UserError(f"A version or a label chooses, not both. Received: version={version}, label={label!r}.")
    if scheme == "grpc":
        if not model_name:
            raise UserError("Over gRPC the model must be named. Received: model_name=''.")
        from robust_tf.serving.grpc_client import GrpcClient

        return GrpcClient(rest, model_name=model_name, version=version, label=label, timeout_seconds=timeout_seconds)
    from robust_tf.serving.rest_client import RestClient

    return RestClient(
        server,
        model_name=model_name,
        version=version,
        label=label,
        timeout_seconds=timeout_seconds,
        token=token,
        ca_file=ca_file,
    )


def retried(ask: Callable[[], Answer], *, tries: int = TRIES) -> Answer:
    """Calls again, after growing pauses, what fails with UNAVAILABLE: the server is not there or has no room."""
    pause = _FIRST_PAUSE
    for attempt in itertools.count(1):
        try:
            return ask()
        except ServerError as error:
            if error.code != "UNAVAILABLE" or attempt >= tries:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    raise AssertionError  # itertools.count never ends


def _in_order(work: Callable[[Item], Answer], items: Iterator[Item], concurrency: int) -> Iterator[Answer]:
    """The answers in the order of the items, with at most so many at work and no more items taken than needed."""
    with ThreadPoolExecutor(concurrency) as threads:
        pending = [threads.submit(work, item) for item in itertools.islice(items, concurrency)]
        while pending:
            answer = pending.pop(0).result()
            pending += [threads.submit(work, item) for item in itertools.islice(items, 1)]
            yield answer
