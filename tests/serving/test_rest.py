"""Tests of the REST interface with the cases of TensorFlow Serving's own tests, and with more of its behavior."""

import gzip
import json
import re

import numpy as np
import pytest

from tests.serving.conftest import running_server

PREDICT = "/v1/models/half_plus_two:predict"


def ask(server, path, body, **options):
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return server.rest.post(path, content=content, **options)


def echo(server, signature, body):
    return ask(server, "/v1/models/echo:predict", body | {"signature_name": signature})


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("", {"instances": [2.0, 3.0, 4.0]}, {"predictions": [3.0, 3.5, 4.0]}),
        ("", {"inputs": [2.0, 3.0, 4.0]}, {"outputs": [3.0, 3.5, 4.0]}),
        ("", {"inputs": {"x": [2.0]}}, {"outputs": [3.0]}),
        ("", {"instances": [{"x": 2.0}, {"x": 3.0}]}, {"predictions": [3.0, 3.5]}),
        ("", {"instances": [[1.0, 2.0], [3.0, 4.0]]}, {"predictions": [[2.5, 3.0], [3.5, 4.0]]}),
        ("/versions/123", {"instances": [1.0, 2.0]}, {"predictions": [2.5, 3.0]}),
        ("/versions/00123", {"instances": [1.0]}, {"predictions": [2.5]}),
        ("/labels/stable", {"instances": [1.0, 2.0]}, {"predictions": [2.5, 3.0]}),
        ("", {"signature_name": "serving_default", "instances": [3.0, 4.0]}, {"predictions": [3.5, 4.0]}),
        ("", {"signature_name": "serving_default", "inputs": [3.0, 4.0]}, {"outputs": [3.5, 4.0]}),
        ("", {"inputs": 3.0, "unknown": [[]]}, {"outputs": 3.5}),
    ],
)
def test_predict_answers_in_the_form_of_the_request(server, path, body, expected):
    reply = ask(server, f"/v1/models/half_plus_two{path}:predict", body)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == expected


@pytest.mark.parametrize(
    ("method", "body", "expected"),
    [
        ("classify", {"signature_name": "classify_x_to_y", "examples": [{"x": 2.0}]}, [[["", 3.0]]]),
        ("classify", {"signature_name": "classify_x_to_y", "examples": [{"x": 20.0}]}, [[["", 12.0]]]),
        ("classify", {"signature_name": "classes_only", "examples": [{}]}, [[["cat", 0.0], ["cat", 0.0]]]),
        ("regress", {"signature_name": "regress_x_to_y", "examples": [{"x": 2.0}]}, [3.0]),
        ("regress", {"signature_name": "regress_x_to_y", "examples": [{"x": [80.0]}]}, [42.0]),
        (
            "regress",
            {"signature_name": "regress_x2_to_y3", "context": {"x2": 4.0}, "examples": [{"x": 1.0}, {"x2": 2.0}]},
            [5.0, 4.0],
        ),
    ],
)
def test_classify_and_regress_return_results(server, method, body, expected):
    for path in ("", "/versions/123", "/labels/stable"):
        reply = ask(server, f"/v1/models/half_plus_two{path}:{method}", body)
        assert (reply.status_code, reply.json()) == (200, {"results": expected})


def test_status_lists_the_versions_and_ignores_labels(server):
    expected = {
        "model_version_status": [
            {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    }
    for path in ("", "/versions/123", "/labels/stable", "/labels/anything"):
        reply = server.rest.get(f"/v1/models/half_plus_two{path}")
        assert (reply.status_code, reply.json()) == (200, expected)


def test_metadata_holds_the_signatures(server):
    for path in ("", "/versions/123", "/labels/stable"):
        document = server.rest.get(f"/v1/models/half_plus_two{path}/metadata").json()
        assert document["model_spec"] == {"name": "half_plus_two", "signature_name": "", "version": "123"}
        signatures = document["metadata"]["signature_def"]["signature_def"]
        assert set(signatures) >= {"serving_default", "classify_x_to_y", "__saved_model_init_op"}
        assert signatures["serving_default"]["inputs"]["x"] == {
            "dtype": "DT_FLOAT",
            "tensor_shape": {"dim": [], "unknown_rank": True},
            "name": "serving_default_x:0",
        }
        assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"
        assert signatures["serving_default"]["defaults"] == {}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/models/foo:predict", {"instances": [1]}, 404, "Servable not found for request: Latest(foo)"),
        ("/v1/models/foo/versions/50:predict", {"instances": [1]}, 404, "Specific(foo, 50)"),
        ("/v1/models/half_plus_two/versions/99:predict", {"instances": [1]}, 404, "Specific(half_plus_two, 99)"),
        (
            "/v1/models/half_plus_two/labels/x:predict",
            {"instances": [1]},
            400,
            "Unrecognized servable version label: x",
        ),
        ("/v1/models/foo:predict", "{", 400, "JSON Parse error"),
        (PREDICT, "", 400, "JSON Parse error: The document is empty"),
        (PREDICT, "instances = [1, 2]", 400, "JSON Parse error: Invalid value. at offset: 0"),
        (PREDICT, b'{"instances": "\xff"}', 400, "JSON Parse error"),
        *(
            (path, f"{{{entry}}}", 400, "JSON Parse error: The surrogate pair in string is invalid.")
            for path in (PREDICT, "/v1/models/half_plus_two:classify")
            for entry in (r'"signature_name": "\ud800"', r'"instances": ["x\udc00"]', r'"\ud800": 1')
        ),
        (PREDICT, [1], 400, "Is not object"),
        (PREDICT, {}, 400, "Missing 'inputs' or 'instances' key"),
        (PREDICT, {"inputs": [1], "instances": [1]}, 400, "expecting only one of 'inputs' or 'instances'"),
        (PREDICT, {"instances": 1}, 400, "Expecting 'instances' to be an list/array"),
        (PREDICT, {"instances": []}, 400, "No values in 'instances' array"),
        (PREDICT, {"signature_name": 100}, 400, "'signature_name' key must be a string value."),
        (PREDICT, {"signature_name": "x", "instances": [1]}, 400, 'Serving signature name: "x" not found'),
        (PREDICT, {"signature_name": "__saved_model_init_op", "instances": [1]}, 400, "not found in signature def"),
        (PREDICT, {"instances": ["x", "y"]}, 400, '"x" Type: String is not of expected type: float'),
        (PREDICT, {"instances": [True]}, 400, "Type: True is not of expected type: float"),
        (PREDICT, {"instances": [None]}, 400, "Type: Null is not of expected type: float"),
        (PREDICT, {"instances": [[1, 2], ["a", "b"]]}, 400, "is not of expected type: float"),
        (PREDICT, {"instances": [{"b64": "aGk="}]}, 400, "Type: Object is not of expected type: float"),
        (PREDICT, {"instances": [[1, 2], [3, 4], [5, 6, 7]]}, 400, "Expecting tensor size: 2 but got: 3"),
        (PREDICT, {"instances": [[1, 2], [3, 4], [[5, 6]]]}, 400, "Expecting shape [2] but got: [1,2]"),
        (PREDICT, {"instances": [1, [1]]}, 400, "Expecting shape [] but got: [1]"),
        (PREDICT, {"inputs": {"y": [1]}}, 400, "Missing named input: x in 'inputs' object."),
        (PREDICT, {"instances": [{"foo": 1}]}, 400, "Failed to process element: 0 key: foo of 'instances' list"),
        (PREDICT, {"instances": [{"x": 1}, {}]}, 400, "keys must be equal to: x"),
        (
            "/v1/models/half_plus_two:classify",
            {"signature_name": "x", "examples": [{}]},
            400,
            "No signature was found with the name: x",
        ),
        ("/v1/models/half_plus_two:classify", {"examples": [{"x": 2.0}]}, 400, "No classification inputs found"),
        ("/v1/models/half_plus_two:regress", {"examples": [{"x": 2.0}]}, 400, "No regression inputs found"),
        ("/v1/models/half_plus_two:classify", {}, 400, "'examples' is expected"),
        ("/v1/models/half_plus_two:classify", {"examples": []}, 400, "empty array"),
        (
            "/v1/models/half_plus_two:classify",
            {"signature_name": "classify_x_to_y", "examples": [{"x": [1, 2.5]}]},
            400,
            "Unexpected element type in feature: x expecting type: int64",
        ),
        (
            "/v1/models/half_plus_two:classify",
            {"signature_name": "classify_x_to_y", "examples": [{"y": 2.0}]},
            400,
            "Feature: x (data type: float) is required but could not be found.",
        ),
        ("/v1/models/half_plus_two:predict?x=1", {"instances": [1]}, 400, "Malformed request: POST"),
        ("/v1/models/half_plus_two:explain", {"instances": [1]}, 400, "Malformed request: POST"),
        ("/v1/models/half%5Fplus%5Ftwo/versions/124:predict", {"instances": [1]}, 404, "Specific(half_plus_two, 124)"),
    ],
)
def test_bad_requests_get_status_and_message(server, path, body, status, message):
    reply = ask(server, path, body)
    assert reply.status_code == status
    assert message in reply.json()["error"]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([[1.0]], "Example must be JSON object but got JSON Array"),
        ([None], "Example must be JSON object but got JSON Null"),
        ([{"x": None}], "Feature: x has element with unexpected JSON type: Null"),
        ([{"x": [[1.0]]}], "Feature: x has element with unexpected JSON type: Array"),
        ([{"x": {"a": 1}}], "Feature: x has element with unexpected JSON type: Object"),
        ([{"x": 1.0}, {"x": [True, 1.5]}], "Unexpected element type in feature: x expecting type: int64"),
        ([{"x": [1.5, "a"]}], "Unexpected element type in feature: x expecting type: float"),
        ([{"x": ["a", 2**63]}], "Unexpected element type in feature: x expecting type: bytes"),
        ([{"x": 2**63}], "Feature: x has uint64_t element. Only int64_t is supported"),
        ([{"x": {"b64": "!"}}], "Unable to base64 decode"),
        ({"x": 1.0}, "Expecting 'examples' value to be an list/array"),
    ],
)
@pytest.mark.parametrize("method", ["classify", "regress"])
def test_bad_examples_are_refused_in_the_words_of_tensorflow_serving(server, method, examples, message):
    reply = ask(server, f"/v1/models/half_plus_two:{method}", {"examples": examples})
    assert reply.status_code == 400
    assert message in reply.json()["error"]


def test_context_must_be_an_object(server):
    reply = ask(server, "/v1/models/half_plus_two:classify", {"context": [], "examples": [{}]})
    assert (reply.status_code, reply.json()["error"]) == (400, "Example must be JSON object but got JSON Array")


@pytest.mark.parametrize("number", ["18446744073709551616", "1" + 400 * "0", "NaN"])
def test_integer_beyond_64_bits_is_a_decimal_number(embedded, number):
    body = f'{{"signature_name": "classify_x_to_y", "examples": [{{"x": [1.5, {number}]}}]}}'
    reply = ask(embedded, "/v1/models/half_plus_two:classify", body)
    assert "Number of float values != expected.  Values size: 2" in reply.json()["error"]


@pytest.mark.parametrize(
    ("signature", "instances", "message"),
    [
        ("pair", [{"a": 1, "b": "x"}, 3], "Expecting object but got list at item 1 of input list"),
        ("pair", [{"a": 1, "b": "x"}, {"a": 1}], """of 'instances' list. JSON object: {"a":1} keys must be equal"""),
        ("pair", [{"a": 1, "b": "x"}, {"a": "y", "b": "x"}], "element: 1 key: a of 'instances' list. Error: INVALID"),
        ("pair", [{"a": 1, "b": {"c": 1}}], "not formatted correctly for base64 data"),
        ("echo_float32", [1, 2, {"x": 3}], "Expecting value/list but got object at item 2 of input list"),
        ("echo_string", ["a", {"b64": 1}], "Expecting value/list but got object at item 1 of input list"),
        ("echo_float32", [[1], [2], ["a"]], "Failed to process element: 2 of 'instances' list. Error: INVALID"),
        ("echo_float32", [[[1, 2], [3]]], "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
        ("echo_float32", [[1, [2]]], "Encountered list at unexpected level: 1 expected < 1"),
        ("echo_float32", [[[1], 2]], "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
    ],
)
def test_bad_rows_are_named_in_the_words_of_tensorflow_serving(server, signature, instances, message):
    reply = echo(server, signature, {"instances": instances})
    assert reply.status_code == 400
    assert message in reply.json()["error"]


def test_ragged_columns_are_refused_in_the_words_of_tensorflow_serving(server):
    reply = echo(server, "echo_float32", {"inputs": [[1, 2], [3, 4], [5, 6, 7]]})
    expected = "Encountered list at unexpected size: 3 at level: 1 expected size: 2"
    assert (reply.status_code, reply.json()["error"]) == (400, expected)


def test_names_are_unescaped_after_matching(server):
    assert ask(server, "/V1/MODELS/half%5Fplus_two:PREDICT", {"instances": [2.0]}).json() == {"predictions": [3.0]}


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/models", 400, "Missing model name"),
        ("GET", "/v1/models/foo", 404, "Could not find any versions of model foo"),
        ("GET", "/v1/models/half_plus_two/versions/99", 404, "Could not find version 99 of model half_plus_two"),
        ("GET", "/v1/models/foo/metadata", 404, "Latest(foo)"),
        ("GET", "/v1/models/half_plus_two/labels/x/metadata", 400, "Unrecognized servable version label: x"),
        ("GET", "/v1/models/half_plus_two?x", 404, "Could not find any versions of model half_plus_two?x"),
        (
            "GET",
            "/v1/models/half_plus_two/metadata?x",
            400,
            "Malformed request: GET /v1/models/half_plus_two/metadata?x",
        ),
        ("GET", PREDICT, 400, "Malformed request: GET"),
        ("PUT", PREDICT, 400, "Malformed request: PUT"),
        ("DELETE", "/v1/models/half_plus_two", 400, "Malformed request: DELETE"),
    ],
)
def test_other_methods_and_paths_get_status_and_message(server, method, path, status, message):
    reply = server.rest.request(method, path)
    assert reply.status_code == status
    assert message in reply.json()["error"]


@pytest.mark.parametrize("number", ["9223372036854775808", 5000 * "9"])
def test_version_beyond_int64_is_refused_without_a_message(server, number):
    for reply in (
        server.rest.get(f"/v1/models/half_plus_two/versions/{number}"),
        server.rest.get(f"/v1/models/half_plus_two/versions/{number}/metadata"),
        ask(server, f"/v1/models/half_plus_two/versions/{number}:predict", {"instances": [1.0]}),
    ):
        assert (reply.status_code, reply.content) == (400, b"")


def test_paths_outside_the_api_are_not_found(server):
    for path in ("/statuspage", "/index", "/v2/models"):
        assert server.rest.get(path).status_code == 404
    assert server.rest.options(PREDICT, headers={"Origin": "https://example.org"}).status_code == 200
    assert server.rest.options(PREDICT).status_code == 400


def test_health_lists_the_models(embedded):
    assert embedded.rest.get("/healthz").json() == {"ready": True, "models": ["digits", "echo", "half_plus_two"]}


def test_gzip_bodies_are_accepted(server):
    headers = {"Content-Encoding": "gzip"}
    good = ask(server, PREDICT, gzip.compress(b'{"instances": [2.0]}'), headers=headers)
    assert good.json() == {"predictions": [3.0]}
    bad = ask(server, PREDICT, b"not gzip", headers=headers)
    assert (bad.status_code, "The document is empty" in bad.json()["error"]) == (400, True)


def test_small_body_that_unpacks_to_a_large_one_is_refused(embedded):
    headers = {"Content-Encoding": "gzip"}
    bomb = ask(embedded, PREDICT, gzip.compress(bytes(101 * 2**20), 1), headers=headers)
    assert (bomb.status_code, "104857600 bytes" in bomb.json()["error"]) == (413, True)


def test_body_over_the_limit_is_refused(embedded):
    reply = ask(embedded, PREDICT, bytes(100 * 2**20 + 1))
    assert (reply.status_code, "104857600 bytes" in reply.json()["error"]) == (413, True)


def test_deep_nesting_is_an_error_rather_than_a_crash(embedded):
    deep = 500_000 * "["
    for body in (f'{{"ignored": {deep}', f'{{"signature_name": {deep}', f'{{"instances": {deep}'):
        assert ask(embedded, PREDICT, body).status_code == 400
    assert ask(embedded, PREDICT, {"instances": [2.0]}).status_code == 200


@pytest.mark.parametrize(
    ("signature", "body", "expected"),
    [
        ("echo_int32", {"instances": [[1, 2], [3, 4], [5, 6]]}, {"predictions": [[1, 2], [3, 4], [5, 6]]}),
        ("echo_float32", {"inputs": [1, 2.0, 3, 5.003]}, {"outputs": [1.0, 2.0, 3.0, 5.003]}),
        ("echo_int64", {"inputs": [2**53 + 1, -5]}, {"outputs": [2**53 + 1, -5]}),
        ("echo_bool", {"inputs": [True, False]}, {"outputs": [True, False]}),
        ("echo_string", {"instances": ["a", {"b64": "aGVsbG8="}]}, {"predictions": ["a", "hello"]}),
        ("echo_string", {"instances": [[{"b64": "aGk="}], [{"b64": "aG8"}]]}, {"predictions": [["hi"], ["ho"]]}),
        ("echo_string", {"inputs": {"x": [[{"b64": "aGk="}, "é"]]}}, {"outputs": [["hi", "é"]]}),
        ("echo_string", {"inputs": {"b64": "aGk="}}, {"outputs": "hi"}),
        ("echo_bytes", {"inputs": ["hi", {"b64": "/w=="}]}, {"outputs": [{"b64": "aGk="}, {"b64": "/w=="}]}),
        ("echo_float32", {"inputs": [[], []]}, {"outputs": [[], []]}),
        ("pair", {"inputs": {"a": [1.5], "b": "x"}}, {"outputs": {"a": [1.5], "b": "x"}}),
        (
            "pair",
            {"instances": [{"a": 1.5, "b": "x"}, {"b": "y", "a": 2.5}]},
            {"predictions": [{"a": 1.5, "b": "x"}, {"a": 2.5, "b": "y"}]},
        ),
    ],
)
def test_json_values_are_returned_unchanged(server, signature, body, expected):
    reply = echo(server, signature, body)
    assert (reply.status_code, reply.json()) == (200, expected)


@pytest.mark.parametrize(
    ("signature", "body", "status", "message"),
    [
        ("echo_int32", {"inputs": [1.0]}, 400, "is not of expected type: int32"),
        ("echo_string", {"inputs": [{"b64": "a-_="}]}, 400, "Unable to base64 decode"),
        ("echo_string", {"inputs": [{"b64": 5}]}, 400, "not formatted correctly for base64 data"),
        ("echo_string", {"inputs": [{"c64": "aGk="}]}, 400, "not formatted correctly for base64 data"),
        ("echo_string", {"inputs": [3]}, 400, "3 Type: Number is not of expected type: string"),
        ("echo_half", {"inputs": [1.0]}, 501, "Conversion of JSON Value: [1.0] to type: half"),
        ("echo_half", {"instances": [1.0]}, 400, "UNIMPLEMENTED: Conversion of JSON Value"),
        ("pair", {"inputs": [1]}, 400, "expecting an object as multiple input tensors required"),
        ("pair", {"instances": [1]}, 400, "expecting list of objects"),
        ("pair", {"instances": [{"a": 1, "b": "x"}, {"a": 1}]}, 400, "Failed to process element: 1"),
        ("pair", {"instances": [{"a": 1, "b": "x"}, 5]}, 400, "Expecting object but got list at item 1"),
    ],
)
def test_bad_json_values_are_refused(server, signature, body, status, message):
    reply = echo(server, signature, body)
    assert reply.status_code == status
    assert message in reply.json()["error"]


@pytest.mark.parametrize(("kind", "value"), [("int32", 2**31), ("uint8", 300), ("uint8", -1)])
def test_integers_never_wrap_around(embedded, kind, value):
    reply = echo(embedded, f"echo_{kind}", {"inputs": [value]})
    assert (reply.status_code, f"outside the range of type: {kind}" in reply.json()["error"]) == (400, True)


def test_float32_is_exact_and_may_be_infinite(server):
    rng = np.random.default_rng(0)
    values = rng.normal(size=200).astype(np.float32) * 10.0 ** rng.integers(-30, 30, 200).astype(np.float32)
    # Infinity makes the server use another JSON writer. Both must return the same float32.
    for extra in ([], [np.nan, np.inf, -np.inf]):
        sent = [*map(float, values), *extra]
        body = json.dumps({"signature_name": "echo_float32", "instances": sent})
        received = json.loads(ask(server, "/v1/models/echo:predict", body).content)["predictions"]
        np.testing.assert_array_equal(np.array(received, np.float32), np.array(sent, np.float32))
    limits = echo(server, "echo_float32", {"inputs": [1.7976931348623157e308, -1.7976931348623157e308, 2.2e-308]})
    assert json.loads(limits.content)["outputs"] == [np.inf, -np.inf, 0.0]


def test_bytes_after_the_document_are_ignored(server):
    for rest in (b" X", b"\xff\x00", b'{"instances": [3.0]}'):
        assert ask(server, PREDICT, b'{"instances": [2.0]}' + rest).json() == {"predictions": [3.0]}


def test_metrics_have_the_names_and_buckets_of_tensorflow_serving(embedded):
    ask(embedded, PREDICT, {"instances": [2.0, 4.0]})
    ask(embedded, "/v1/models/nobody-knows:predict", {"instances": [2.0]})
    text = embedded.rest.get("/monitoring/prometheus/metrics").text
    assert "# TYPE :tensorflow:serving:request_count counter" in text
    assert ':tensorflow:serving:request_count{model_name="half_plus_two",status="OK"}' in text
    assert ':tensorflow:serving:request_count{model_name="unknown",status="NOT_FOUND"}' in text
    assert "nobody-knows" not in text
    examples = re.findall(r':tensorflow:serving:request_example_counts_bucket\{model="half_plus_two",le="(.+)"\}', text)
    assert examples == [*(str(2**exponent) for exponent in range(15)), "+Inf"]
    (path,) = re.findall(r':model_warmup_latency_count\{model_path="(.+)",status="OK"\} 1', text)
    assert path.endswith("/digits/1")  # the only model with warm-up requests
    buckets = [
        int(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(':tensorflow:serving:request_latency_bucket{model_name="half_plus_two",API="predict"')
        and 'entrypoint="REST"' in line
    ]
    assert len(buckets) == 34
    assert buckets == sorted(buckets)
    assert buckets[-1] >= 1


def test_long_run_times_out(echo):
    flags = {"model_name": "echo", "model_base_path": str(echo), "rest_api_timeout_in_ms": 1}
    with running_server(**flags) as running:
        reply = running.rest.post("/v1/models/echo:predict", json={"signature_name": "endless", "inputs": [1.0]})
    assert reply.status_code == 504
