"""Tests that values of the wrong type or shape are refused in one line, for each signature, over REST and gRPC."""

import base64
import json
import pathlib
import shutil

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import classification_pb2

from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.status import ServingError
from robust_tf.serving.server.model_settings import ModelSettings
from robust_tf.serving.server.versions import ModelManager
from tests.serving.conftest import LIMIT, running_server
from tests.serving.fuzz import unfit_for_clients
from tests.serving.test_grpc import predict_request, with_examples

JPEG = (pathlib.Path(__file__).parent / "images" / "d.jpg").read_bytes()
SIGNATURES = {
    "serving_default": "image_bytes",
    "predict_pixels": "images",
    "predict_uint8": "images",
    "features": "images",
    "classify": "inputs",
    "attack_probe": "image_bytes",
}


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "batched"])
def asked(request, server_flags, embedded):
    if not request.param:
        yield embedded
        return
    with running_server(**server_flags, enable_batching=True) as running:
        yield running


def pixels(value):
    return np.full((1, 16, 16, 3), value, np.float32)


JSON_VALUES = [
    {"b64": base64.b64encode(JPEG).decode()},
    {"b64": base64.b64encode(b"\xff\xfe\x00\x1b\n").decode()},
    {"b64": ""},
    "text\nwith a line break and \ud800",
    5,
    True,
    None,
    [],
    [[1.5] * 16],
    pixels(0.5).tolist(),
    pixels(-0.5)[0].tolist(),
    pixels(200)[0].tolist(),
    pixels(np.nan)[0].tolist(),
]


@pytest.mark.parametrize("signature", SIGNATURES)
def test_wrong_values_over_rest_are_refused_in_one_line(asked, signature):
    refused = 0
    for value in JSON_VALUES:
        instance = value
        if signature == "attack_probe":
            instance = {"image_bytes": value, "label": 0, "epsilon": 0.1}
        body = json.dumps({"signature_name": signature, "instances": [instance]})
        reply = asked.rest.post("/v1/models/digits:predict", content=body)
        assert reply.status_code in (200, 400), (value, reply.text)
        if reply.status_code == 400:
            refused += 1
            assert not unfit_for_clients(reply.json()["error"]), reply.text
    # Only the first value, an image, is valid, and only for the two signatures that take images.
    assert len(JSON_VALUES) - refused == (1 if signature in ("serving_default", "attack_probe") else 0)


@pytest.mark.parametrize("signature", SIGNATURES)
def test_wrong_values_over_grpc_are_refused_in_one_line(asked, signature):
    more = {"label": np.int64([0]), "epsilon": np.float32([0.1])} if signature == "attack_probe" else {}
    values = [np.array([JPEG], object), np.array(JPEG, object), np.float16([1]), np.int64([[1]]), np.bool_([True])]
    values += [pixels(0.5)[:, :8], pixels(0.5)[0], pixels(255.0), np.array([[JPEG]], object), np.zeros(0, object)]
    for value in values:
        request = predict_request("digits", signature, {SIGNATURES[signature]: value, **more})
        try:
            asked.predict.Predict(request, timeout=LIMIT)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, (value, error.details())
            assert not unfit_for_clients(error.details()), error.details()
        else:
            assert signature in ("serving_default", "attack_probe")
            assert value.shape == (1,)  # type: ignore[attr-defined]


def test_classify_refuses_an_image_in_place_of_an_example(asked):
    """TensorFlow's message quotes the bytes, which are not text, so Python cannot decode it."""
    instance = {"b64": base64.b64encode(JPEG).decode()}
    reply = asked.rest.post(
        "/v1/models/digits:predict", content=json.dumps({"signature_name": "classify", "instances": [instance]})
    )
    assert reply.status_code == 400
    assert reply.json()["error"].startswith(r"Could not parse example input, value: '\xff\xd8")
    with pytest.raises(grpc.RpcError) as raised:
        asked.predict.Classify(
            with_examples(classification_pb2.ClassificationRequest(), "digits", "classify", {"x": 1.0}), timeout=LIMIT
        )
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Feature: image/encoded (data type: string) is required" in raised.value.details()


@pytest.mark.parametrize("signature", ["predict_pixels", "features"])
@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0, 255, "[0] [to] [255]"), (-1, 1, "[-1] [to] [1]"), (-0.5, 0.5, "[-0.5] [to] [0.5]"), (0, np.nan, "nan")],
)
def test_pixels_in_other_units_are_refused(asked, signature, low, high, said):
    images = np.linspace(low, high, 768).astype(np.float32).reshape(1, 16, 16, 3)
    if np.isnan(high):
        images = pixels(0.5)
        images[0, 3, 4, 1] = np.nan
    with pytest.raises(grpc.RpcError) as raised:
        asked.predict.Predict(predict_request("digits", signature, {"images": images}), timeout=LIMIT)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Pixels must be in [0, 1]. Received: from" in raised.value.details()
    assert said in raised.value.details()


def test_pixels_slightly_outside_the_range_are_accepted(asked):
    images = np.concatenate([pixels(1.02), pixels(-0.02)])
    asked.predict.Predict(predict_request("digits", "predict_pixels", {"images": images}), timeout=LIMIT)


@pytest.mark.parametrize("outputs", [(), ("logits",), ("top_k",)])
def test_pixels_are_checked_inside_the_graph(exported, outputs):
    """TensorFlow Serving also runs a Session, and with only those outputs that a request names."""
    model = LoadedModel(exported)
    with pytest.raises(ServingError, match=r"Pixels must be in \[0, 1\]"):
        model.run("predict_pixels", {"images": pixels(255.0)}, outputs)
    model.close()


def test_internal_errors_are_one_line_without_a_traceback(half_plus_two, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise KeyError(f"secret in {__file__}")

    with running_server(model_name="m", model_base_path=str(half_plus_two)) as running:
        monkeypatch.setattr(LoadedModel, "run", broken)
        reply = running.rest.post("/v1/models/m:predict", json={"instances": [1.0]})
        assert (reply.status_code, reply.json()) == (
            500,
            {"error": "The server failed to answer this request. Its log says why."},
        )
        with pytest.raises(grpc.RpcError) as raised:
            running.predict.Predict(predict_request("m"), timeout=LIMIT)
        assert raised.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in raised.value.details()
    assert "secret in" in caplog.text
    assert 'status="INTERNAL"} 2' in running.server._service.metrics.render()


def test_messages_are_one_short_line_without_control_characters():
    message = ServingError("INTERNAL", "a\n\n  b\x00\x1b[31m \ud800" + 3000 * "x").message
    assert message.startswith(r"a  b\x00\x1b[31m \ud800xxx")
    assert message.endswith("x...TRUNCATED")
    assert len(message) < 1100


@pytest.mark.parametrize("batching", [False, True])
def test_python_errors_during_a_run_get_a_status_code(half_plus_two, batching, monkeypatch):
    errors = {
        ValueError("first\nsecond"): "INVALID_ARGUMENT",
        MemoryError(): "RESOURCE_EXHAUSTED",
        RuntimeError("closed"): "UNAVAILABLE",
        tf.errors.InternalError(None, None, "a\n\t [[{{node b}}]]"): "INTERNAL",
    }
    with running_server(model_name="m", model_base_path=str(half_plus_two), enable_batching=batching) as running:
        (version,) = running.server._manager._versions["m"].values()
        for error, code in errors.items():

            def call(*args, error=error, **kwargs):
                raise error

            loaded = version.model._model if batching else version.model  # type: ignore[attr-defined]
            monkeypatch.setattr(loaded, "_callable", lambda *args, call=call: call)
            with pytest.raises(grpc.RpcError) as raised:
                running.predict.Predict(predict_request("m"), timeout=LIMIT)
            assert raised.value.code().name == code
            assert not unfit_for_clients(raised.value.details())


def test_status_of_a_failed_version_hides_the_path(tmp_path, half_plus_two):
    base = tmp_path / "m"
    shutil.copytree(half_plus_two, base)
    (base / "200").mkdir()
    (base / "200" / "saved_model.pb").write_bytes(b"broken")
    manager = ModelManager(LoadedModel, poll_seconds=0)
    manager.configure([ModelSettings(name="m", base_path=base, latest=2)])
    (_, state, error), (_, other_state, _) = manager.states("m")
    assert (state, other_state) == ("END", "AVAILABLE")
    assert "m/200" in error.message
    assert not unfit_for_clients(error.message)
    manager.stop()
