"""The parts that the clients over REST and gRPC share: methods, results and errors."""

import abc
import itertools
import ssl
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from robust_tf.errors import UserError
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE, PROBE_SIGNATURE

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Guess(NamedTuple):
    """One class of a prediction.

    Attributes:
        label: Name of the class.
        probability: Its probability, in [0, 1].
    """

    label: str
    probability: float


class Probe(NamedTuple):
    """What a small attack does to the label of an image.

    Attributes:
        survives: Whether the label stays the same.
        label: Name of the class after the attack.
    """

    survives: bool
    label: str


class TensorInfo(NamedTuple):
    """Type and shape of an input or output of a signature.

    Attributes:
        dtype: TensorFlow's name of the type, e.g. "DT_FLOAT".
        shape: Size of each dimension, or None if it may vary. None if even the number of dimensions may vary.
    """

    dtype: str
    shape: tuple[int | None, ...] | None


class Signature(NamedTuple):
    """Inputs and outputs of a signature, by name."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]


class ServerError(Exception):
    """The server refused a request, or could not be reached.

    Attributes:
        code: Canonical status name, e.g. "INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE".
        message: The server's message.
        reached: Whether a server, or a proxy in front of it, answered. False if there was no connection.
        retry_after: Seconds that the server asks clients to wait before the next try, or None.
    """

    def __init__(self, code: str, message: str, *, reached: bool = True, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.reached = reached
        self.retry_after = retry_after


class Client(abc.ABC):
    """A connection to one model of one server.

    `connect` creates clients; `close`, or the end of a `with` block, closes them. Several threads may share one.
    """

    def __init__(self) -> None:
        self._signatures: dict[str, Signature] | None = None

    @abc.abstractmethod
    def predict(self, inputs: Mapping[str, Any], *, signature_name: str = DEFAULT_SIGNATURE) -> dict[str, np.ndarray]:
        """Runs a signature of the model.

        Args:
            inputs: For each input, an array or anything that NumPy converts to one. Strings are passed as bytes. The
                first dimension is the batch.
            signature_name: One of `signatures`.

        Returns:
            An array for each output. Strings are returned as bytes.

        Raises:
            ServerError: The server refused the request, or could not be reached.
        """

    @abc.abstractmethod
    def available(self) -> bool:
        """Returns whether the server is up and a version of the model answers requests."""

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
        """The model's signatures by name. They are read from the server once."""
        if self._signatures is None:
            self._signatures = self._read_signatures()
        return self._signatures

    def has_signature(self, name: str) -> bool:
        """Returns whether the model has a signature of this name."""
        return name in self.signatures

    def wait_until_available(self, timeout_seconds: float = 60.0) -> None:
        """Waits until the model answers requests.

        Args:
            timeout_seconds: Longest time to wait, in seconds.

        Raises:
            ServerError: The model does not answer within this time.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.available():
            if time.monotonic() > deadline:
                raise ServerError("DEADLINE_EXCEEDED", f"The model is not available after {timeout_seconds:g} s.")
            time.sleep(0.2)

    def classify(self, images: Sequence[bytes]) -> list[list[Guess]]:
        """Classifies one batch of images.

        Args:
            images: Encoded images (JPEG, PNG, ...).

        Returns:
            The most probable classes of each image, the most probable first.

        Raises:
            ServerError: The server refused the batch, for example because one of the images is bad.
        """
        answer = self.predict({"image_bytes": list(images)})
        chosen = np.take_along_axis(answer["probabilities"], answer["top_k"], axis=-1)
        return [
            [Guess(label.decode("utf-8"), float(value)) for label, value in zip(labels, values, strict=True)]
            for labels, values in zip(answer["classes"], chosen, strict=True)
        ]

    def probe(self, images: Sequence[bytes], epsilon: float) -> list[Probe]:
        """Attacks one batch of images within a small distance, and returns whether their labels stay the same.

        Args:
            images: Encoded images (JPEG, PNG, ...).
            epsilon: Largest distance, in [0, 1] pixel units. The model determines the norm and the attack; see the
                signature `attack_probe` in serving/README.md.

        Returns:
            One result for each image. The label before the attack is the most probable class.

        Raises:
            ServerError: The server refused the batch, or the model has no signature `attack_probe`.
        """
        count = len(images)
        inputs = {
            "image_bytes": list(images),
            "label": np.full(count, -1, np.int64),  # the predicted class
            "epsilon": np.full(count, epsilon, np.float32),
        }
        answer = self.predict(inputs, signature_name=PROBE_SIGNATURE)
        return [
            Probe(bool(robust), label.decode("utf-8"))
            for robust, label in zip(answer["robust"], answer["adversarial_class"], strict=True)
        ]

    def classify_many(
        self, images: Iterable[bytes], *, batch_size: int = 16, concurrency: int = 4
    ) -> Iterator[list[Guess] | ServerError]:
        """Classifies any number of images, several batches at a time.

        Args:
            images: Encoded images. They are read from the iterable only as fast as the server answers.
            batch_size: Number of images in a request.
            concurrency: Number of requests at the same time.

        Yields:
            For each image, in order: its most probable classes, as `classify` returns them, or the error if the server
            refused this image.

        Raises:
            ServerError: The server cannot be reached, or does not have the model.
        """
        yield from ask_in_batches(self.classify, images, batch_size=batch_size, concurrency=concurrency)


def ask_in_batches(
    ask: Callable[[list[bytes]], Iterable[Answer]], images: Iterable[bytes], *, batch_size: int, concurrency: int
) -> Iterator[Answer | ServerError]:
    """Sends any number of images in batches, several at a time.

    Args:
        ask: Function that sends one batch and returns an answer for each image.
        images: Encoded images. They are read from the iterable only as fast as the answers arrive.
        batch_size: Number of images in a batch.
        concurrency: Number of batches at the same time.

    Yields:
        For each image, in order: its answer, or the error if this image was refused. The images of a batch that is
        refused are sent again one by one.

    Raises:
        ServerError: The server cannot be reached, or does not have the model.
    """

    def answers(batch: list[bytes]) -> list[Answer | ServerError]:
        try:
            return list(ask(batch))
        except ServerError as error:
            if error.code != "INVALID_ARGUMENT":
                raise
            if len(batch) == 1:
                return [error]
            return [result for image in batch for result in answers([image])]

    source = iter(images)
    batches = iter(lambda: list(itertools.islice(source, batch_size)), [])
    for results in _in_order(answers, batches, concurrency):
        yield from results


def trust_authority(ca_file: str) -> ssl.SSLContext:
    """Returns a TLS context that trusts the certificates in a PEM file.

    Args:
        ca_file: Path of the file.

    Raises:
        UserError: The file cannot be read, or holds no certificate.
    """
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"The authority's certificate can't be read. Received: {ca_file}: {error}.") from error


def _in_order(work: Callable[[Item], Answer], items: Iterator[Item], concurrency: int) -> Iterator[Answer]:
    """Yields the answers in the order of the items. At most `concurrency` items are in progress at a time."""
    with ThreadPoolExecutor(concurrency) as threads:
        pending = [threads.submit(work, item) for item in itertools.islice(items, concurrency)]
        while pending:
            answer = pending.pop(0).result()
            pending += [threads.submit(work, item) for item in itertools.islice(items, 1)]
            yield answer
