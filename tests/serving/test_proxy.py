"""Tests of nginx with the shipped configuration, in front of the embedded server or a server that records requests."""

import contextlib
import http.server
import socket
import threading
from concurrent import futures

import grpc
import pytest
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from tests.serving.conftest import LIMIT, free_port, until
from tests.serving.proxy import TOKENS, bearer, running_nginx

PREDICT = "/v1/models/half_plus_two:predict"
# A rate so low that requests beyond the burst are refused even on a slow machine.
SLOWLY = ("rate=50r/s", "rate=1r/m")


@pytest.fixture(scope="module")
def proxy(embedded, tmp_path_factory):
    upstreams = [
        ("tensorflow-serving:8501", f"127.0.0.1:{embedded.rest_port}"),
        ("tensorflow-serving:8500", embedded.target),
    ]
    with running_nginx(tmp_path_factory.mktemp("nginx"), *upstreams) as running:
        yield running


@pytest.fixture
def limited(tmp_path):
    """A proxy without a server behind it, which passes a burst of requests and then hardly any."""
    nobody = f"127.0.0.1:{free_port()}"
    replaced = [("tensorflow-serving:8501", nobody), ("tensorflow-serving:8500", nobody), SLOWLY]
    with running_nginx(tmp_path, *replaced) as running:
        yield running


def statuses(proxy, headers, count=110):
    return [proxy.client.get("/v1/models/m", headers=each).status_code for each in [headers] * count]


def predict_request(values=(2.0,)):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "half_plus_two"
    request.inputs["x"].dtype = 1
    request.inputs["x"].float_val.extend(values)
    request.inputs["x"].tensor_shape.dim.add(size=len(values))
    return request


@contextlib.contextmanager
def channel_to(proxy):
    credentials = grpc.ssl_channel_credentials(proxy.certificate.read_bytes())
    options = [("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(proxy.target, credentials, options) as channel:
        yield channel


def failure(call, *arguments, token="laptop"):
    metadata = [("authorization", f"Bearer {TOKENS.get(token, token)}")] if token else []
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, metadata=metadata, timeout=LIMIT)
    return raised.value.code(), raised.value.details()


def test_valid_requests_pass(proxy):
    reply = proxy.client.post(PREDICT, json={"instances": [2.0]}, headers=bearer("laptop"))
    assert (reply.status_code, reply.json()) == (200, {"predictions": [3.0]})
    for path in ("", "/versions/123", "/labels/stable/metadata"):
        assert proxy.client.get(f"/v1/models/half_plus_two{path}", headers=bearer("laptop")).status_code == 200
    # Errors of the model server pass unchanged.
    refused = proxy.client.post(PREDICT, json={"instances": []}, headers=bearer("laptop"))
    assert refused.status_code == 400
    assert refused.json()["error"].endswith("No values in 'instances' array")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "message"),
    [
        ("POST", PREDICT, {}, 401, "A valid token is needed"),
        ("POST", PREDICT, {"Authorization": "Bearer replace-this-token"}, 401, "A valid token is needed"),
        ("POST", PREDICT, {"Authorization": "laptop"}, 401, "A valid token is needed"),
        (
            "POST",
            PREDICT,
            bearer("laptop") | {"Content-Encoding": "gzip"},
            415,
            "Compressed requests are not accepted",
        ),
        ("DELETE", PREDICT, bearer("laptop"), 403, "Only GET and POST are allowed"),
        ("GET", "/monitoring/prometheus/metrics", bearer("laptop"), 404, "There is nothing at this address"),
        ("GET", "/", bearer("laptop"), 404, "There is nothing at this address"),
        ("GET", "/authorized", bearer("laptop"), 404, "There is nothing at this address"),
        ("GET", "/v1/models/a/b", bearer("laptop"), 404, "There is nothing at this address"),
        ("GET", "/v1/models/m", {"X-Long": "x" * 20_000}, 400, "The request is not valid"),
    ],
)
def test_other_requests_are_refused_in_json(proxy, method, path, headers, status, message):
    reply = proxy.client.request(method, path, headers=headers, content=b"{}")
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    assert reply.json() == {"error": message}


def test_size_of_requests_is_limited(proxy):
    large = proxy.client.post(PREDICT, content=bytes(48 * 2**20 + 1), headers=bearer("laptop"))
    assert (large.status_code, large.json()) == (413, {"error": "The request is too large"})


def test_each_client_has_one_rate_however_it_writes_its_header(limited):
    assert set(statuses(limited, bearer("busy"), 101)) == {
        503
    }  # the burst passes, but there is no server behind the proxy
    token = TOKENS["busy"]
    for written in (f"Bearer {token}", f"bEArer {token}", f"BEARER {token.upper()}"):
        reply = limited.client.get("/v1/models/m", headers={"Authorization": written})
        assert (reply.status_code, reply.json()) == (429, {"error": "Too many requests"})
    away = limited.client.get("/v1/models/m", headers=bearer("laptop"))
    assert (away.status_code, away.json()) == (503, {"error": "The model server is away"})


def test_wrong_tokens_are_limited_by_address(limited):
    seen = [
        limited.client.get("/v1/models/m", headers={"Authorization": f"Bearer {i}"}).status_code for i in range(110)
    ]
    assert (set(seen[:101]), set(seen[102:])) == ({401}, {429})
    assert set(statuses(limited, bearer("laptop"), 5)) == {
        503
    }  # a client with a valid token at the same address is not affected


def test_grpc_passes_except_for_the_model_service(proxy):
    with channel_to(proxy) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        metadata = [("authorization", f"Bearer {TOKENS['laptop']}")]
        reply = stub.Predict(predict_request(), metadata=metadata, timeout=LIMIT)
        assert list(reply.outputs["y"].float_val) == [3.0]
        unauthenticated = (grpc.StatusCode.UNAUTHENTICATED, "A valid token is needed")
        assert failure(stub.Predict, predict_request(), token=None) == unauthenticated
        assert failure(stub.Predict, predict_request(), token="wrong") == unauthenticated
        status = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus
        assert failure(status, get_model_status_pb2.GetModelStatusRequest())[0] == grpc.StatusCode.UNIMPLEMENTED


def test_large_grpc_request_is_resource_exhausted(proxy):
    with channel_to(proxy) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        request = predict_pb2.PredictRequest()
        request.inputs["x"].tensor_content = bytes(48 * 2**20 + 1)
        # The client recognizes by these words that a retry is pointless.
        assert failure(stub.Predict, request) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "The request is too large")


def test_grpc_has_a_rate_and_reports_an_absent_server(limited):
    with channel_to(limited) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        codes = [failure(stub.Predict, predict_request())[0] for _ in range(105)]
    assert set(codes[:101]) == {grpc.StatusCode.UNAVAILABLE}
    assert set(codes[102:]) == {grpc.StatusCode.RESOURCE_EXHAUSTED}


@contextlib.contextmanager
def recording_server(address, port, seen):
    """Runs an HTTP server that answers with its address and records the headers of requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", str(len(address)))
            self.end_headers()
            self.wfile.write(address.encode())

        def log_message(self, *arguments):
            """Logs nothing."""

    with http.server.ThreadingHTTPServer((address, port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


@contextlib.contextmanager
def name_server(answer):
    """Runs a DNS server that always answers with the address in `answer`, and yields its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve():
            with contextlib.suppress(OSError):  # the socket was closed because the test is over
                while True:
                    query, client = server.recvfrom(512)
                    if not query:
                        return
                    address = socket.inet_aton(answer["address"])
                    record = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x01\x00\x04" + address
                    server.sendto(query[:2] + b"\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00" + query[12:] + record, client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        yield port
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stop:
            stop.sendto(b"", ("127.0.0.1", port))
        thread.join(LIMIT)


def test_server_may_move_to_another_address(tmp_path):
    port, answer = free_port(), {"address": "127.0.0.2"}
    with (
        recording_server("127.0.0.2", port, []),
        recording_server("127.0.0.3", port, []),
        name_server(answer) as names,
        running_nginx(
            tmp_path,
            ("resolver 127.0.0.11 valid=10s", f"resolver 127.0.0.1:{names} valid=1s"),
            ("tensorflow-serving:8501", f"tensorflow-serving:{port}"),
        ) as proxy,
    ):

        def who():
            return proxy.client.get("/v1/models/m", headers=bearer("laptop")).text

        assert who() == "127.0.0.2"
        answer["address"] = "127.0.0.3"
        until(lambda: who() == "127.0.0.3")


def test_tokens_do_not_reach_the_server(tmp_path):
    seen_rest, seen_grpc, port = [], [], free_port()

    class Recorder(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            seen_grpc.append(dict(context.invocation_metadata()))
            return predict_pb2.PredictResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Recorder(), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    replaced = [
        ("tensorflow-serving:8501", f"127.0.0.1:{port}"),
        ("tensorflow-serving:8500", f"127.0.0.1:{grpc_port}"),
    ]
    with recording_server("127.0.0.1", port, seen_rest), running_nginx(tmp_path, *replaced) as proxy:
        assert proxy.client.get("/v1/models/m", headers=bearer("laptop")).status_code == 200
        with channel_to(proxy) as channel:
            metadata = [("authorization", f"Bearer {TOKENS['laptop']}")]
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            stub.Predict(predict_request(), metadata=metadata, timeout=LIMIT)
    server.stop(0)
    (rest,), (over_grpc,) = seen_rest, seen_grpc
    assert "authorization" not in {name.lower() for name in rest} | set(over_grpc)
