"""A client for TensorFlow Serving and for `robust_tf.serve`, over REST without TensorFlow, or over gRPC.

with connect("http://localhost:8501", model_name="pets") as client:
    for prediction in client.classify([open("cat.jpg", "rb").read()]):
        print(prediction[0].label, prediction[0].probability)
"""

import abc
import email.utils
import itertools
import logging
import random
import ssl
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from robust_tf.errors import UserError

RETRY_SECONDS = 120.0

_LOG = logging.getLogger(__name__)
_TRIES_TO_REACH = 4  # a server that never answered: a wrong address is named soon
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_SECONDS_BETWEEN_WORDS = 5.0  # several threads may wait at the same time

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
        reached: whether a server, or a proxy in front of it, has said so; False when there was no connection.
        retry_after: seconds that it asks to wait before the next try, or None.
    """

    def __init__(self, code: str, message: str, *, reached: bool = True, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.reached = reached
        self.retry_after = retry_after


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
    retry_seconds: float = RETRY_SECONDS,
) -> Client:
    """A client for one model.

    Args:
        server: "http://host:8501", "https://host", "grpc://host:8500" or "grpcs://host:8443" (gRPC over TLS). gRPC
            needs TensorFlow and the serving extra.
        model_name: the model; may be left out when a `robust_tf.serve` has only one.
        version: this version; the latest when None.
        label: the version with this label instead.
        timeout_seconds: of each request.
        token: sent as "Authorization: Bearer ...", for a proxy in front of the server; over gRPC with TLS only.
        ca_file: PEM file of the authority that signed the server's certificate, when it is your own.
        retry_seconds: longest time that a request is asked again when the server has no room for it: RESOURCE_EXHAUSTED
            or UNAVAILABLE (429 and 503 over REST). 0 asks once.

    Raises:
        UserError: the address makes no sense, or the model has to be named.
        ServerError: the server can't be asked which models it has.
    """
    scheme, separator, rest = server.partition("://")
    if not separator or not rest or scheme not in ("http", "https", "grpc", "grpcs"):
        raise UserError(
            "A server is http://host:port, https://host:port, grpc://host:port or grpcs://host:port. Received: "
            f"{server!r}."
        )
    if version is not None and label:
        raise UserError(f"A version or a label chooses, not both. Received: version={version}, label={label!r}.")
    if scheme == "grpc" and (token or ca_file):
        given = " and ".join(name for name, value in (("a token", token), ("a CA file", ca_file)) if value)
        raise UserError(
            f"gRPC takes a token or a CA file over TLS only. Received: {server} with {given}. Use grpcs://."
        )
    if scheme == "http" and ca_file:
        raise UserError(f"A CA file is for a server with TLS. Received: {server} with {ca_file}. Use https://.")
    retries = Retries(retry_seconds)
    if scheme in ("grpc", "grpcs"):
        if not model_name:
            raise UserError("Over gRPC the model must be named. Received: model_name=''.")
        from robust_tf.serving.client.grpc_client import GrpcClient

        return GrpcClient(
            rest,
            model_name=model_name,
            version=version,
            label=label,
            timeout_seconds=timeout_seconds,
            secure=scheme == "grpcs",
            token=token,
            ca_file=ca_file,
            retries=retries,
        )
    from robust_tf.serving.client.rest_client import RestClient

    return RestClient(
        server,
        model_name=model_name,
        version=version,
        label=label,
        timeout_seconds=timeout_seconds,
        token=token,
        ca_file=ca_file,
        retries=retries,
    )


class Retries:
    """Asks again, after growing pauses with jitter, what a server has no room for; may be used from several threads.

    Args:
        seconds: longest time from the first refusal of a request to its last try; 0 asks once.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._reached = False
        self._last_word = -_SECONDS_BETWEEN_WORDS

    def __call__(self, ask: Callable[[], Answer]) -> Answer:
        """What `ask` returns.

        Raises:
            ServerError: of another kind at once, of this kind when the time is over.
        """
        started = 0.0
        for attempt in itertools.count(1):
            try:
                answer = ask()
            except ServerError as error:
                started = started or time.monotonic()
                pause = self._pause(error, attempt, left=self._seconds - (time.monotonic() - started))
            else:
                self._reached = True
                return answer
            time.sleep(pause)
        raise AssertionError  # itertools.count never ends

    def _pause(self, error: ServerError, attempt: int, *, left: float) -> float:
        """Seconds until the next try; raises the error when there is none."""
        self._reached |= error.reached
        if error.code not in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
            raise error
        pause = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        if error.retry_after is not None:
            # A little later than asked, so that those who were refused together do not come back together.
            pause = error.retry_after + pause
        if pause > left or (not self._reached and attempt >= _TRIES_TO_REACH):
            raise error
        with self._lock:
            now = time.monotonic()
            if self._reached and now - self._last_word >= _SECONDS_BETWEEN_WORDS:
                self._last_word = now
                _LOG.warning(
                    "The server has no room (%s). Asking again in %.1f s, for %.0f s at most.", error, pause, left
                )
        return pause


def seconds_after(header: str | None) -> float | None:
    """The seconds that a Retry-After header asks for (a number or a date), or None."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def read_authority(ca_file: str) -> ssl.SSLContext:
    """A context that trusts the certificates of a PEM file.

    Raises:
        UserError: it can't be read, or holds none.
    """
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"The authority's certificate can't be read. Received: {ca_file}: {error}.") from error


def _in_order(work: Callable[[Item], Answer], items: Iterator[Item], concurrency: int) -> Iterator[Answer]:
    """The answers in the order of the items, with at most so many at work and no more items taken than needed."""
    with ThreadPoolExecutor(concurrency) as threads:
        pending = [threads.submit(work, item) for item in itertools.islice(items, concurrency)]
        while pending:
            answer = pending.pop(0).result()
            pending += [threads.submit(work, item) for item in itertools.islice(items, 1)]
            yield answer
