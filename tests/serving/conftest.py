"""Fixtures of the serving tests: models on disk, made once, and servers in this process."""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import grpc
import httpx
import keras
import numpy as np
import pytest
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from robust_tf.serving.artifacts import FORMATS
from robust_tf.serving.publish import export
from robust_tf.serving.publish.export import export_classifier
from robust_tf.serving.publish.export_dense import export_dense
from robust_tf.serving.publish.formats import Samples
from robust_tf.serving.server.serve_config import ServeConfig
from robust_tf.serving.server.server import Server
from tests.serving.dense_models import BOX_LABELS, MASK_LABELS, small_detector, small_segmenter
from tests.serving.models import (
    LABELS,
    export_small_classifier,
    save_echo,
    save_half_plus_two,
    small_classifier,
    write_config,
)

LIMIT = 120  # seconds to wait for something that takes a moment; enough even on a heavily overloaded machine


def free_port() -> int:
    """Returns a free port."""
    # Below the range of outgoing connections, one of which could take the port before the caller does. The numbers come
    # from the system, because Keras seeds Python's own, and then two processes would try the same ports.
    while True:
        port = random.SystemRandom().randint(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as found:
            return found.getsockname()[1]


def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


class Gate:
    """Holds a request to the model of `save_gate` in the middle of its run until `open` is called.

    Attributes:
        inputs: Inputs that the request must send in addition to `x`.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._pipes = {name: pathlib.Path(tempfile.mkdtemp(dir=folder)) / name for name in ("entrance", "exit")}
        for pipe in self._pipes.values():
            os.mkfifo(pipe)
        self.inputs = {name: [str(pipe)] for name, pipe in self._pipes.items()}

    def wait_until_entered(self) -> None:
        """Waits until the request is in the middle of its run."""
        self._read("entrance")

    def open(self) -> None:
        """Lets the request finish."""
        self._read("exit")

    def _read(self, name: str) -> None:
        """Reads what the model writes. Until then, the model waits to open the pipe."""
        with open(os.open(self._pipes[name], os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
            until(lambda: pipe.read(1) == b"!")


@dataclasses.dataclass
class Running:
    """A running server and clients for it."""

    url: str
    target: str
    rest: httpx.Client
    predict: prediction_service_pb2_grpc.PredictionServiceStub
    models: model_service_pb2_grpc.ModelServiceStub
    server: Server | None = None  # the embedded server, if this is one

    @property
    def rest_port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@contextlib.contextmanager
def clients_of(url: str, target: str, server: Server | None = None) -> Iterator[Running]:
    channel = grpc.insecure_channel(target, [("grpc.max_receive_message_length", -1)])
    with httpx.Client(base_url=url, timeout=LIMIT) as client, channel:
        yield Running(
            url,
            target,
            client,
            prediction_service_pb2_grpc.PredictionServiceStub(channel),
            model_service_pb2_grpc.ModelServiceStub(channel),
            server,
        )


def accepts_connections(port: int) -> bool:
    """Returns whether a server listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@contextlib.contextmanager
def running_server(**flags) -> Iterator[Running]:
    """Runs the embedded server in this process."""
    config = ServeConfig(**{"port": free_port(), "rest_api_port": free_port(), **flags})
    server = Server(config)
    try:
        server.start()
        url, target = f"http://127.0.0.1:{config.rest_api_port}", f"127.0.0.1:{config.port}"
        with clients_of(url, target, server) as running:
            yield running
    finally:
        server.stop()


@contextlib.contextmanager
def tensorflow_serving(flags: dict[str, str]) -> Iterator[Running]:
    """Yields the TensorFlow Serving that the environment names, or runs one if it is installed."""
    url, target = os.environ.get("TF_SERVING_REST_URL"), os.environ.get("TF_SERVING_GRPC_TARGET")
    if url and target:
        with clients_of(url, target) as running:
            yield running
        return
    binary = shutil.which("tensorflow_model_server")
    if binary is None:
        pytest.skip("needs tensorflow_model_server on PATH, or TF_SERVING_REST_URL and TF_SERVING_GRPC_TARGET")
    rest_port, port = free_port(), free_port()
    command = [binary, f"--port={port}", f"--rest_api_port={rest_port}"]
    process = subprocess.Popen([*command, *(f"--{name}={value}" for name, value in flags.items())])
    try:
        with clients_of(f"http://127.0.0.1:{rest_port}", f"127.0.0.1:{port}") as running:
            until(lambda: accepts_connections(running.rest_port))
            yield running
    finally:
        process.terminate()
        process.wait(LIMIT)


@pytest.fixture(scope="session")
def half_plus_two(tmp_path_factory) -> pathlib.Path:
    """Folder of a model with the version 00000123."""
    base = tmp_path_factory.mktemp("half_plus_two")
    save_half_plus_two(base / "00000123")
    return base


@pytest.fixture(scope="session")
def echo(tmp_path_factory) -> pathlib.Path:
    base = tmp_path_factory.mktemp("echo")
    save_echo(base / "1")
    return base


@pytest.fixture(scope="session")
def classifier() -> keras.Model:
    return small_classifier()


@pytest.fixture(scope="session")
def exported(tmp_path_factory, classifier) -> pathlib.Path:
    """Version folder of `classifier`, exported as the model "digits"."""
    return export_small_classifier(classifier, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def detector() -> keras.Model:
    return small_detector()


@pytest.fixture(scope="session")
def segmenter() -> keras.Model:
    return small_segmenter()


@pytest.fixture(scope="session")
def exported_detector(tmp_path_factory, detector) -> pathlib.Path:
    """Version folder of `detector`, exported as the model "toys"."""
    folder = tmp_path_factory.mktemp("boxes")
    return export_dense(detector, folder, "toys", labels=BOX_LABELS, model_card={"dataset": "toys"})


@pytest.fixture(scope="session")
def exported_segmenter(tmp_path_factory, segmenter) -> pathlib.Path:
    """Version folder of `segmenter`, exported as the model "scenes"."""
    return export_dense(segmenter, tmp_path_factory.mktemp("masks"), "scenes", labels=MASK_LABELS, model_card={})


@pytest.fixture
def no_fresh_process(monkeypatch):
    """Leaves out the trial in a fresh process, which takes seconds. `test_formats.py` has the tests of it."""
    monkeypatch.setattr(export, "verify_artifact", lambda *_: {})


@pytest.fixture(scope="session")
def samples(classifier) -> Samples:
    """The images, of many random ones, about which the classifier is surest, with its predictions as labels."""
    rng = np.random.default_rng(8)
    images = (rng.uniform(size=(300, 16, 16, 3)) * rng.uniform(size=(300, 1, 1, 3))).astype(np.float32)
    logits = classifier.predict(images, verbose=0)
    margins = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0]
    chosen = np.sort(np.argsort(-margins)[:60])
    return Samples(images[chosen], logits[chosen].argmax(axis=1))


@pytest.fixture(scope="session")
def formats(tmp_path_factory, classifier, samples) -> pathlib.Path:
    """Folder of `classifier`, exported as the model "digits" in every format, version 1."""
    first = export_classifier(
        classifier,
        tmp_path_factory.mktemp("formats"),
        "digits",
        labels=LABELS,
        resize_size=20,
        model_card={"dataset": "digits"},
        formats=list(FORMATS),
        samples=samples,
        fresh_process=True,
    )
    return first.parent


@pytest.fixture(scope="session")
def server_flags(half_plus_two, echo, exported, tmp_path_factory) -> dict[str, str]:
    """Flags of a server with all three models."""
    bases = {"half_plus_two": half_plus_two, "echo": echo, "digits": exported.parent}
    return write_config(tmp_path_factory.mktemp("config"), bases)


@pytest.fixture(scope="session")
def embedded(server_flags) -> Iterator[Running]:
    """The embedded server, shared by all tests that only send requests."""
    with running_server(**server_flags) as running:
        yield running


@pytest.fixture(scope="session", params=["embedded", "tensorflow_serving"])
def server(request, server_flags) -> Iterator[Running]:
    """The embedded server and, where it is available, the real one. Both must pass the same tests."""
    if request.param == "embedded":
        yield request.getfixturevalue("embedded")
    else:
        with tensorflow_serving(server_flags) as running:
            yield running
