"""The REST interface: an ASGI application with the paths and bodies of TensorFlow Serving."""

import asyncio
import json
import re
import urllib.parse
import zlib
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2  # noqa: F401  # the first registers its messages

from robust_tf.serving.model import inference
from robust_tf.serving.model.folders import MAX_VERSION
from robust_tf.serving.model.inference import Classification
from robust_tf.serving.model.status import ServingError, invalid, only_serving_errors
from robust_tf.serving.server import rest_replies, rest_requests
from robust_tf.serving.server.messages import log_of_examples, log_of_predict
from robust_tf.serving.server.page import page
from robust_tf.serving.server.service import Service
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE

_CHOICE = r"(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_INFER = re.compile(
    rf"/v1/models/(?P<name>[^/:]+){_CHOICE}:(?P<method>classify|regress|predict)", re.IGNORECASE | re.ASCII
)
_READ = re.compile(rf"/v1/models(?:/(?P<name>[^/:]+))?{_CHOICE}(?P<metadata>/metadata)?", re.IGNORECASE | re.ASCII)

_JSON = "application/json"
_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Allow-Headers": "Content-Type, Authorization",
}


class RestApp:
    """The application that uvicorn runs.

    Args:
        service: The models.
        workers: Pool of threads in which the models run.
        timeout_ms: Longest time of one run of a model in milliseconds.
        max_body_bytes: Largest size of a body, both as sent and uncompressed. A larger one is refused with 413.
        metrics_path: Path that Prometheus reads, or None.
        cors: Whether to allow requests from web pages of other origins.
    """

    def __init__(
        self,
        service: Service,
        *,
        workers: Executor,
        timeout_ms: int,
        max_body_bytes: int,
        metrics_path: str | None,
        cors: bool,
    ) -> None:
        self._service = service
        self._workers = workers
        self._timeout_ms = timeout_ms
        self._max_body_bytes = max_body_bytes
        self._metrics_path = metrics_path
        self._cors = _CORS if cors else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except ClientDisconnect:
            return
        except _TooLarge:
            response = Response(
                rest_replies.error_reply(f"The request is larger than {self._max_body_bytes} bytes"),
                413,
                {"Connection": "close"},
                _JSON,
            )
        response.headers.update(self._cors)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        # The raw path and query, because TensorFlow Serving matches names before it unescapes them.
        path = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
        if request.scope["query_string"]:
            path += "?" + request.scope["query_string"].decode("latin-1")
        if request.method == "OPTIONS":
            allowed = request.headers.get("origin", "").startswith(("http://", "https://"))
            return Response(status_code=200 if allowed else 400, media_type=_JSON)
        if request.method == "GET" and path == self._metrics_path:
            return Response(self._service.metrics.render(), media_type="text/plain")
        if request.method == "GET" and path == "/healthz":
            return self._health()
        if request.method == "GET" and path == "/":
            return page()
        if not path.lower().startswith("/v1/"):
            return Response("<html><body><h1>404 Not Found</h1></body></html>", 404, media_type="text/html")
        body = await self._body(request) if request.method == "POST" else b""
        packed = request.headers.get("content-encoding", "").lower() == "gzip"
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, self._answer_model, request.method, path, body, packed)

    def _health(self) -> Response:
        manager = self._service.manager
        ready = manager.ready()
        content = json.dumps({"ready": ready, "models": manager.names()})
        return Response(content, 200 if ready else 503, media_type=_JSON)

    async def _body(self, request: Request) -> bytes:
        limit = self._max_body_bytes
        if int(request.headers.get("content-length", 0)) > limit:
            raise _TooLarge
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise _TooLarge
        return bytes(body)

    def _unpacked(self, body: bytes) -> bytes:
        """Uncompresses a gzip body. A damaged body counts as empty, as in TensorFlow Serving."""
        decoder = zlib.decompressobj(wbits=31)
        try:
            unpacked = decoder.decompress(body, self._max_body_bytes + 1)
        except zlib.error:
            return b""
        if len(unpacked) > self._max_body_bytes:
            raise _TooLarge
        return unpacked if decoder.eof else b""

    def _answer_model(self, method: str, path: str, body: bytes, packed: bool) -> Response:
        """Answers a request below /v1/. This runs in a thread of `workers`."""
        if packed:
            body = self._unpacked(body)
        try:
            with only_serving_errors():
                content, status = self._dispatch(method, path, body), 200
        except ServingError as error:
            content = rest_replies.error_reply(error.message) if error.message else b""
            status = error.http_status
        return Response(content, status, media_type=_JSON)

    def _dispatch(self, method: str, path: str, body: bytes) -> bytes:
        if method == "POST" and (match := _INFER.fullmatch(path)):
            infer = {"predict": self._predict, "classify": self._classify, "regress": self._regress}
            verb, spec = match["method"].lower(), _spec(match)
            with self._service.counted(spec.name, verb, "REST"):
                return infer[verb](spec, body)
        if method == "GET" and (match := _READ.fullmatch(path)):
            if not match["name"]:
                raise invalid("Missing model name in request.")
            return self._metadata(_spec(match)) if match["metadata"] else self._status(_spec(match))
        raise invalid(f"Malformed request: {method} {path}")

    def _predict(self, spec: model_pb2.ModelSpec, body: bytes) -> bytes:
        document = rest_requests.parse_body(body)
        signature_name = rest_requests.signature_name_of(document) or DEFAULT_SIGNATURE
        spec.signature_name = signature_name
        with self._service.leased(spec) as (number, model):
            definition = model.signature(signature_name)
            if definition is None:
                raise invalid(f'Serving signature name: "{signature_name}" not found in signature def')
            request = rest_requests.parse_predict(document, definition)
            rows = max((len(value) for value in request.inputs.values() if value.ndim), default=1)
            with self._service.running(spec.name, "predict", examples=rows):
                outputs = inference.predict(
                    model, request.inputs, signature_name=signature_name, timeout_ms=self._timeout_ms
                )
        reply = rest_replies.predict_reply(outputs, by_row=request.by_row)
        self._service.log(
            spec, number, size=lambda: len(body), make=lambda: log_of_predict(spec, request.inputs, outputs)
        )
        return reply

    def _classify(self, spec: model_pb2.ModelSpec, body: bytes) -> bytes:
        document = rest_requests.parse_body(body)
        signature_name = spec.signature_name = rest_requests.signature_name_of(document)
        examples = rest_requests.parse_examples(document)
        with (
            self._service.leased(spec) as (number, model),
            self._service.running(spec.name, "classify", examples=len(examples)),
        ):
            result = inference.classify(model, examples, signature_name=signature_name, timeout_ms=self._timeout_ms)
        self._log_examples(spec, number, body, examples, result)
        return rest_replies.classify_reply(result)

    def _regress(self, spec: model_pb2.ModelSpec, body: bytes) -> bytes:
        document = rest_requests.parse_body(body)
        signature_name = spec.signature_name = rest_requests.signature_name_of(document)
        examples = rest_requests.parse_examples(document)
        with (
            self._service.leased(spec) as (number, model),
            self._service.running(spec.name, "regress", examples=len(examples)),
        ):
            values = inference.regress(model, examples, signature_name=signature_name, timeout_ms=self._timeout_ms)
        self._log_examples(spec, number, body, examples, values)
        return rest_replies.regress_reply(values)

    def _log_examples(
        self,
        spec: model_pb2.ModelSpec,
        number: int,
        body: bytes,
        examples: Sequence[bytes],
        result: Classification | np.ndarray,
    ) -> None:
        self._service.log(spec, number, size=lambda: len(body), make=lambda: log_of_examples(spec, examples, result))

    def _status(self, spec: model_pb2.ModelSpec) -> bytes:
        return _proto_json(self._service.status(spec))

    def _metadata(self, spec: model_pb2.ModelSpec) -> bytes:
        reply = self._service.metadata(spec)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        reply.metadata["signature_def"].Unpack(signatures)
        del reply.metadata["signature_def"]
        document = json.loads(_proto_json(reply))
        document["metadata"] = {"signature_def": json.loads(_proto_json(signatures))}
        return json.dumps(document, indent=1).encode()


class _TooLarge(Exception):
    pass


def _spec(match: re.Match[str]) -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=urllib.parse.unquote(match["name"] or "", errors="replace"))
    if match["version"]:
        digits = match["version"].lstrip("0") or "0"
        if len(digits) > 19 or int(digits) > MAX_VERSION:
            raise invalid("")  # TensorFlow Serving sends no message either
        spec.version.value = int(digits)
    if match["label"]:
        spec.version_label = urllib.parse.unquote(match["label"], errors="replace")
    return spec


def _proto_json(message: Message) -> bytes:
    text: str = json_format.MessageToJson(
        message, always_print_fields_with_no_presence=True, preserving_proto_field_name=True, indent=1
    )
    return text.encode()
