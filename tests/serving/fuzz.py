"""Sends damaged and nonsensical requests. Each must get a client error or an answer, and none may harm the server.

    python -m tests.serving.fuzz --requests=10000

The server also has a health service, which gets such requests as well, and logs all requests that it can answer. The
logs have to be readable at the end.
"""

import argparse
import base64
import contextlib
import json
import os
import pathlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import httpx
import hypothesis
import numpy as np
import tensorflow as tf
from grpc_health.v1 import health_pb2
from hypothesis import strategies as st
from tensorflow_serving.apis import classification_pb2, inference_pb2, predict_pb2, prediction_log_pb2

from tests.serving.conftest import running_server
from tests.serving.models import write_all

_IMAGES = pathlib.Path(__file__).parent / "images"
_ODD = [None, True, -1, 0, 2**63, 1e400, 1e-400, "", "x", "\ud800", [], {}, [[]], [None], {"b64": "?"}, {"b64": []}]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
_SIGNATURES = ["", "predict_pixels", "predict_uint8", "features", "classify", "attack_probe", "pair", "echo_string"]
_SIGNATURES += ["echo_float32", "echo_int64", "echo_bool", "echo_half", "serving_default", "?", "__saved_model_init_op"]
# `tests/conftest.py` sets the variable to the folder that holds all temporary folders.
_TEMPORARY = os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir()
_LOCAL = (_TEMPORARY + "/", sys.prefix + "/", str(pathlib.Path(__file__).parents[2]) + "/")
_CALLS = {
    "Check": "/grpc.health.v1.Health/Check",
    **{name: f"/tensorflow.serving.PredictionService/{name}" for name in ("Predict", "Classify", "MultiInference")},
}
_SECONDS = 120  # an answer that takes longer counts as a hang, even on a busy machine


def _rest_seeds() -> list[tuple[str, dict]]:
    image = {"b64": base64.b64encode((_IMAGES / "d.jpg").read_bytes()).decode()}
    return [
        ("half_plus_two:predict", {"instances": [1.0, 2.0]}),
        ("half_plus_two:predict", {"inputs": {"x": [[1.0, 2.0]]}}),
        ("half_plus_two:classify", {"signature_name": "classify_x_to_y", "examples": [{"x": 2.0}]}),
        ("half_plus_two:regress", {"signature_name": "regress_x_to_y", "context": {"x": 1.0}, "examples": [{}]}),
        ("echo:predict", {"signature_name": "pair", "instances": [{"a": 1.0, "b": "x"}]}),
        ("echo:predict", {"signature_name": "echo_bytes", "inputs": [{"b64": "aGk="}]}),
        ("echo:predict", {"signature_name": "echo_uint8", "inputs": [1, 2]}),
        ("digits:predict", {"instances": [image]}),
        ("digits:predict", {"signature_name": "features", "instances": [[[[0.5] * 3] * 16] * 16]}),
        *(("digits:predict", {"signature_name": name, "instances": [image]}) for name in _SIGNATURES[1:6]),
        (
            "digits:predict",
            {"signature_name": "attack_probe", "inputs": {"image_bytes": [image], "label": [-1], "epsilon": [0.1]}},
        ),
    ]


def _grpc_seeds() -> list[tuple[str, bytes]]:
    predict = predict_pb2.PredictRequest()
    predict.model_spec.name = "half_plus_two"
    predict.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0, 2.0]))
    image = predict_pb2.PredictRequest()
    image.model_spec.name = "digits"
    image.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([(_IMAGES / "d.jpg").read_bytes()]))
    pixels = predict_pb2.PredictRequest()
    pixels.model_spec.name = "digits"
    pixels.model_spec.signature_name = "predict_pixels"
    pixels.inputs["images"].CopyFrom(tf.make_tensor_proto(np.zeros((1, 16, 16, 3), np.float32)))
    example = predict_pb2.PredictRequest()
    example.model_spec.name = "digits"
    example.model_spec.signature_name = "classify"
    example.inputs["inputs"].CopyFrom(image.inputs["image_bytes"])
    classify = classification_pb2.ClassificationRequest()
    classify.model_spec.name = "half_plus_two"
    classify.model_spec.signature_name = "classify_x_to_y"
    classify.input.example_list.examples.add().features.feature["x"].float_list.value.append(1.0)
    multi = inference_pb2.MultiInferenceRequest(input=classify.input)
    multi.tasks.add(method_name="tensorflow/serving/classify").model_spec.CopyFrom(classify.model_spec)
    seeds = [
        ("Predict", predict),
        ("Predict", image),
        ("Predict", pixels),
        ("Predict", example),
        ("Classify", classify),
        ("MultiInference", multi),
        ("Check", health_pb2.HealthCheckRequest(service="PredictionService")),
    ]
    return [(method, message.SerializeToString()) for method, message in seeds]


def _senseless(rng: random.Random) -> bytes:
    """Returns a well-formed PredictRequest whose parts do not fit together."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = rng.choice(["half_plus_two", "echo", "digits", "digits", "nobody", ""])
    request.model_spec.signature_name = rng.choice(_SIGNATURES)
    if rng.random() < 0.1:
        request.model_spec.version.value = rng.choice([-1, 0, 1, 123, 2**63 - 1])
    for name in rng.sample(["x", "a", "b", "images", "image_bytes", "label", "epsilon", "inputs"], rng.randint(0, 3)):
        tensor = request.inputs[name]
        tensor.dtype = rng.choice([*range(24), 101, 119])
        tensor.tensor_shape.unknown_rank = rng.random() < 0.05
        for _ in range(rng.randint(0, 4)):
            tensor.tensor_shape.dim.add(size=rng.choice([-1, 0, 1, 1, 2, 3, 16, 2**31, 2**62]))
        tensor.float_val[:] = [rng.choice([0.5, float("nan"), 1e38])] * rng.randint(0, 3)
        tensor.int64_val[:] = [rng.choice([-1, 7, 2**62])] * rng.randint(0, 2)
        tensor.int_val[:] = [rng.choice([-1, 300])] * rng.randint(0, 2)
        tensor.string_val[:] = [rng.randbytes(5)] * rng.randint(0, 2)
        tensor.tensor_content = rng.randbytes(rng.choice([0, 0, 3, 4, 64]))
    request.output_filter[:] = rng.sample(["y", "logits", "nothing", ""], rng.choice([0, 0, 0, 1, 2]))
    return request.SerializeToString()


def _damaged(rng: random.Random, content: bytes) -> bytes:
    """Returns the content with some bytes changed, removed, repeated or cut off."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        if not data:
            break
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 16)]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def _twisted(rng: random.Random, value: object, odd: object) -> object:
    """Returns the JSON value with odd values, missing keys and other lengths in some places."""
    if rng.random() < 0.15:
        return rng.choice([*_ODD, odd, odd])
    if isinstance(value, dict):
        items = [(key, _twisted(rng, item, odd)) for key, item in value.items() if rng.random() > 0.1]
        return dict(items) | ({rng.choice(["x", "b64", "signature_name", "inputs"]): 1} if rng.random() < 0.1 else {})
    if isinstance(value, list):
        items = [_twisted(rng, item, odd) for item in value[:20]]
        return items * rng.choice([1, 1, 1, 0, 2])
    return value


def unfit_for_clients(message: str) -> str:
    """Returns what is wrong with an error message (several lines, a traceback, a path of this machine), or ""."""
    if message.splitlines() not in ([message], []):
        return "more than one line"
    if "Traceback" in message:
        return "a Python traceback"
    return next((f"the path {place}" for place in _LOCAL if place in message), "")


def run(rest_url: str, grpc_target: str, *, requests: int, seed: int) -> dict:
    """Sends requests over both transports, and returns figures and the requests that got a wrong answer.

    Hypothesis makes the random choices, so that it can search for the shortest request that fails.

    Args:
        rest_url: URL of the server for REST.
        grpc_target: Address of the server for gRPC.
        requests: Number of requests over each transport.
        seed: Seed for the choices.
    """
    seen: Counter[str] = Counter()
    slowest = 0.0
    rest_seeds, grpc_seeds = _rest_seeds(), _grpc_seeds()
    generated = hypothesis.settings(
        max_examples=requests,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    choices = st.randoms(use_true_random=False)
    with httpx.Client(base_url=rest_url, timeout=_SECONDS) as client, grpc.insecure_channel(grpc_target) as channel:
        calls = {method: channel.unary_unary(path) for method, path in _CALLS.items()}

        @hypothesis.seed(seed)
        @generated
        @hypothesis.given(choices, _JSON)
        def ask_rest(rng: random.Random, odd: object) -> None:
            nonlocal slowest
            path, document = rng.choice(rest_seeds)
            if rng.random() < 0.5:
                body = json.dumps(_twisted(rng, document, odd)).encode()
            else:
                body = _damaged(rng, json.dumps(document).encode())
            if rng.random() < 0.1:
                path = _damaged(rng, path.encode()).decode("latin-1")
            start = time.monotonic()
            try:
                reply = client.post("/v1/models/" + path, content=body)
            except httpx.InvalidURL:
                seen["HTTP not sent"] += 1
                return
            slowest = max(slowest, time.monotonic() - start)
            status = reply.status_code
            seen[f"HTTP {status}"] += 1
            assert status < 500 or status == 501, f"{status} for {path} {body[:300]!r}"
            if status != 200 and reply.headers["content-type"] == "application/json" and reply.content:
                fault = unfit_for_clients(reply.json()["error"])
                assert not fault, f"{fault} in the answer to {path} {body[:300]!r}"

        @hypothesis.seed(seed)
        @generated
        @hypothesis.given(choices)
        def ask_grpc(rng: random.Random) -> None:
            nonlocal slowest
            method, message = rng.choice(grpc_seeds)
            if rng.random() < 0.6:
                method, damaged = "Predict", _senseless(rng)
            else:
                damaged = _damaged(rng, message)
            start = time.monotonic()
            try:
                calls[method](damaged, timeout=_SECONDS)
                code, details = "OK", ""
            except grpc.RpcError as error:
                code, details = error.code().name, error.details() or ""
            slowest = max(slowest, time.monotonic() - start)
            seen[f"gRPC {code}"] += 1
            # gRPC itself answers INTERNAL to bytes that are not a message.
            harmless = code not in ("UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL")
            assert harmless or "deserializing" in details, f"{code} {details} for {method} {damaged[:300]!r}"
            fault = unfit_for_clients(details)
            assert not fault, f"{fault} in the answer to {method} {damaged[:300]!r}"

        wrong = [*_failure_of(ask_rest), *_failure_of(ask_grpc)]
        alive = client.post("/v1/models/half_plus_two:predict", json={"instances": [2.0]}).json()
    if alive != {"predictions": [3.0]}:
        wrong.append(f"at the end: {alive}")
    return {"requests": seen.total(), "seen": dict(seen), "slowest_seconds": round(slowest, 2), "wrong": wrong}


def _failure_of(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except (AssertionError, httpx.HTTPError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def _count_logged(folder: pathlib.Path) -> int:
    """Returns the number of requests in the log files of a folder.

    Raises:
        tf.errors.DataLossError: A record is damaged.
        google.protobuf.message.DecodeError: A record is not a PredictionLog.
    """
    files = [str(path) for path in folder.glob("*.tfrecord")]
    records = tf.data.TFRecordDataset(files).as_numpy_iterator()
    return len([prediction_log_pb2.PredictionLog.FromString(record) for record in records])


@contextlib.contextmanager
def _own_server(logs: pathlib.Path) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        flags = write_all(pathlib.Path(folder), logs=logs)
        with running_server(**flags, enable_grpc_healthcheck_service=True) as running:
            yield running.url, running.target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as logs:
        with _own_server(pathlib.Path(logs)) as (rest_url, grpc_target):
            figures = run(rest_url, grpc_target, **vars(arguments))
        figures["logged"] = _count_logged(pathlib.Path(logs))
    print(json.dumps(figures, indent=2))
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
