"""Tests of the client, over REST and gRPC."""

import email.utils
import http.server
import itertools
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from tensorflow_serving.apis import get_model_metadata_pb2, prediction_service_pb2_grpc

from robust_tf.errors import UserError
from robust_tf.serving.client import ServerError, connect
from robust_tf.serving.client.retries import Retries, seconds_after
from tests.serving.conftest import LIMIT, free_port
from tests.serving.models import LABELS

IMAGES = pathlib.Path(__file__).parent / "images"


@pytest.fixture(params=["rest", "grpc"])
def address(embedded, request):
    return embedded.url if request.param == "rest" else f"grpc://{embedded.target}"


def test_both_transports_return_the_same_arrays(embedded):
    pixels = np.random.default_rng(0).uniform(size=(3, 16, 16, 3)).astype(np.float32)
    answers = []
    for address in (embedded.url, f"grpc://{embedded.target}"):
        with connect(address, model_name="digits") as client:
            answers.append(client.predict({"images": pixels}, signature_name="predict_pixels"))
            assert client.signatures["predict_pixels"].inputs["images"] == ("DT_FLOAT", (None, 16, 16, 3))
            assert "__saved_model_init_op" not in client.signatures
    over_rest, over_grpc = answers
    assert over_rest.keys() == over_grpc.keys()
    for name in over_rest:
        assert over_rest[name].dtype == over_grpc[name].dtype
        np.testing.assert_array_equal(over_rest[name], over_grpc[name])


@pytest.mark.parametrize("as_list", [False, True])
def test_numbers_are_transmitted_exactly(address, as_list):
    numbers = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    numbers[:4] = np.nan, np.inf, -np.inf, -0.0
    if as_list:
        numbers = [float(number) for number in numbers]  # type: ignore[assignment]
    with connect(address, model_name="echo") as client:
        (answer,) = client.predict({"x": numbers}, signature_name="echo_float32").values()
    np.testing.assert_array_equal(answer, np.asarray(numbers, np.float32))
    np.testing.assert_array_equal(np.signbit(answer), np.signbit(numbers))


def test_images_are_classified(address):
    images = [path.read_bytes() for path in sorted(IMAGES.iterdir())]
    with connect(address, model_name="digits") as client:
        client.wait_until_available(LIMIT)
        results = client.classify(images)
        assert len(results) == 5
        for guesses in results:
            assert {guess.label for guess in guesses} == set(LABELS)
            probabilities = [guess.probability for guess in guesses]
            assert probabilities == sorted(probabilities, reverse=True)
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        mixed = list(client.classify_many([images[0], b"broken", images[1]] * 3, batch_size=2, concurrency=2))
        assert [isinstance(result, ServerError) for result in mixed] == [False, True, False] * 3
        assert "Unknown image file format" in mixed[1].message
        for alone, together in [(mixed[0], results[0]), (mixed[2], results[1]), (mixed[6], results[0])]:
            assert [guess.label for guess in alone] == [guess.label for guess in together]
            # Another batch size uses other kernels, which round differently.
            np.testing.assert_allclose([g.probability for g in alone], [g.probability for g in together], atol=1e-5)


def test_bytes_are_returned_as_bytes(address):
    with connect(address, model_name="digits") as client:
        answer = client.predict(
            {"image_bytes": [(IMAGES / "a.png").read_bytes()], "label": [-1], "epsilon": [0.5]},
            signature_name="attack_probe",
        )
    assert answer["adversarial_image_bytes"][0].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"model_name": "nobody"}, "NOT_FOUND", "nobody"),
        ({"model_name": "digits", "version": 77}, "NOT_FOUND", "77"),
        ({"model_name": "digits", "label": "blue"}, "INVALID_ARGUMENT", "blue"),
    ],
)
def test_errors_have_code_and_message(address, options, code, message):
    with connect(address, **options) as client, pytest.raises(ServerError) as raised:
        client.classify([b""])
    assert raised.value.code == code
    assert message in raised.value.message


def test_server_reports_an_unknown_signature(address):
    with connect(address, model_name="digits") as client, pytest.raises(ServerError, match='"painting"'):
        client.predict({"image_bytes": [b""]}, signature_name="painting")


def test_bad_addresses_are_refused():
    for address in ("localhost:8501", "ftp://x", "http://"):
        with pytest.raises(UserError, match=repr(address)):
            connect(address, model_name="m")
    with pytest.raises(UserError, match="version=1, label='a'"):
        connect("http://localhost", model_name="m", version=1, label="a")
    with pytest.raises(UserError, match="model_name=''"):
        connect("grpc://localhost:1")


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock by one that advances only during pauses, and returns the list of pauses."""
    now, pauses = [100.0], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    # Only the clock of this module: the event loop of a server that runs in this process needs the real one.
    stand_in = types.SimpleNamespace(sleep=sleep, monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr("robust_tf.serving.client.retries.time", stand_in)
    return pauses


def test_options_that_a_scheme_cannot_carry_are_refused():
    for options, given in [
        ({"token": "t"}, "with a token. Use grpcs://"),
        ({"ca_file": "c"}, "with a CA file. Use grpcs://"),
        ({"token": "t", "ca_file": "c"}, "with a token and a CA file. Use grpcs://"),
    ]:
        with pytest.raises(UserError, match=given):
            connect("grpc://localhost:1", model_name="m", **options)
    with pytest.raises(UserError, match="Use https://"):
        connect("http://localhost", model_name="m", ca_file="c")
    with pytest.raises(UserError, match="none.pem"):
        connect("grpcs://localhost:1", model_name="m", ca_file="none.pem")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_grpcs_sends_the_token(tmp_path, clock):
    key, certificate = tmp_path / "server.key", tmp_path / "server.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key)]
        + ["-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    seen = []
    too_large = ["The request is too large", "Received message larger than max (9 vs. 4)"]

    class Proxy(prediction_service_pb2_grpc.PredictionServiceServicer):
        """Answers like a proxy that checks tokens and limits requests."""

        def GetModelMetadata(self, request, context):
            seen.append(dict(context.invocation_metadata()).get("authorization"))
            if len(seen) == 1:
                context.set_trailing_metadata([("retry-after", "7")])
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many requests")
            if seen[-1] != "Bearer secret":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            reply = get_model_metadata_pb2.GetModelMetadataResponse()
            reply.metadata["signature_def"].Pack(get_model_metadata_pb2.SignatureDefMap())
            return reply

        def Predict(self, request, context):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large.pop())

    server = grpc.server(ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Proxy(), server)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    address = f"grpcs://localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    options = {"model_name": "m", "ca_file": str(certificate)}
    with connect(address, **options, token="secret") as client:
        assert client.signatures == {}
        assert [int(pause) for pause in clock] == [7]
        clock.clear()
        while too_large:
            with pytest.raises(ServerError) as raised:  # tried once, because the request stays too large
                client.predict({"x": [1.0]})
            assert (raised.value.code, clock) == ("INVALID_ARGUMENT", [])
    with connect(address, **options) as client, pytest.raises(ServerError, match="UNAUTHENTICATED"):
        client.signatures  # noqa: B018
    assert seen == ["Bearer secret"] * 2 + [None]
    with connect(address, model_name="m", token="secret") as client, pytest.raises(ServerError, match="UNAVAILABLE"):
        client.signatures  # noqa: B018  # the certificate is not trusted
    assert len(seen) == 3
    server.stop(0)


def test_absent_server_is_tried_a_few_times_and_then_named(clock):
    port = free_port()
    for scheme in ("http", "grpc"):
        clock.clear()
        with connect(f"{scheme}://127.0.0.1:{port}", model_name="m") as client:
            with pytest.raises(ServerError) as raised:
                client.classify([b""])
            assert not client.available()
        assert raised.value.code == "UNAVAILABLE"
        assert len(clock) == 3
        for pause, longest in zip(clock, [0.1, 0.2, 0.4], strict=True):
            assert longest / 2 <= pause <= longest


class _Script(http.server.BaseHTTPRequestHandler):
    """Answers with the listed statuses, one after the other."""

    statuses: list[int] = []
    headers_sent: dict[str, str] = {}
    seen: list[tuple[str, str]] = []

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("Authorization", "")))
        self.send_response(self.statuses.pop(0))
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b'{"metadata": {"signature_def": {"signature_def": {}}}}')

    def log_message(self, *args):
        pass


@pytest.fixture
def scripted():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Script) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        _Script.seen.clear()
        _Script.headers_sent.clear()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()


@pytest.mark.usefixtures("clock")
def test_only_refusals_by_a_busy_server_are_retried(scripted):
    with connect(scripted, model_name="a b", label="x", token="secret") as client:
        _Script.statuses[:] = [503, 429, 502, 503, 429, 200]
        assert client.signatures == {}
        assert _Script.seen == [("/v1/models/a%20b/labels/x/metadata", "Bearer secret")] * 6
    for status in (500, 413, 404, 401):
        _Script.seen.clear()
        _Script.statuses[:] = [status]
        with connect(scripted, model_name="m") as client, pytest.raises(ServerError):
            client.signatures  # noqa: B018
        assert len(_Script.seen) == 1


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_pauses_grow_until_the_time_is_up(clock, caplog, code):
    asked = []

    def ask():
        asked.append(1)
        raise ServerError(code, "no room")

    with pytest.raises(ServerError, match="no room"):
        Retries(60.0)(ask)
    assert len(asked) == len(clock) + 1
    assert 40 < sum(clock) <= 60
    assert all(earlier < later for earlier, later in itertools.pairwise(clock[::2][:4]))
    assert max(clock) <= 10
    assert f"The server is busy ({code}: no room). Trying again in " in caplog.text
    assert 2 <= len(caplog.records) <= 13  # at most one every five seconds
    assert len({round(pause, 6) for pause in clock}) == len(clock)  # jitter
    asked.clear()
    with pytest.raises(ServerError):
        Retries(0.0)(ask)
    assert len(asked) == 1


def test_server_chooses_the_pause_with_retry_after(scripted, clock):
    _Script.headers_sent["Retry-After"] = "7"
    _Script.statuses[:] = [429, 503, 200]
    with connect(scripted, model_name="m") as client:
        assert client.signatures == {}
    assert [int(pause) for pause in clock] == [7, 7]
    clock.clear()
    _Script.headers_sent["Retry-After"] = "3600"
    _Script.statuses[:] = [429]
    with connect(scripted, model_name="m", retry_seconds=60) as client, pytest.raises(ServerError) as raised:
        client.signatures  # noqa: B018
    assert (raised.value.retry_after, clock) == (3600, [])


def test_retry_after_may_be_a_number_or_a_date():
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 0 < seconds_after(in_a_minute) <= 60
    assert seconds_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert [seconds_after(text) for text in ("3", "-1", "soon", "", None)] == [3, 0, None, None, None]


def test_client_waits_for_a_server_that_answered_before(clock):
    answers = [ServerError("UNAVAILABLE", "nobody there", reached=False)] * 8 + ["at last"]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, ServerError):
            raise answer
        return answer

    retries = Retries(60.0)
    assert retries(lambda: "first") == "first"
    assert retries(ask) == "at last"
    assert len(clock) == 8


def test_client_does_not_import_tensorflow():
    script = "import sys, robust_tf.predict; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
