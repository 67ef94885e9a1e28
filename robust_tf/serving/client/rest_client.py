"""The client over REST, which needs no TensorFlow."""

import base64
import itertools
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np

from robust_tf.errors import UserError
from robust_tf.serving.client.base import Client, ServerError, Signature, TensorInfo, trust_authority
from robust_tf.serving.client.retries import Retries, seconds_after
from robust_tf.serving.wire.json_arrays import dump_json
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE, INIT_SIGNATURE

_ARRAY_TYPES = {"DT_FLOAT": np.float32, "DT_DOUBLE": np.float64, "DT_INT64": np.int64, "DT_INT32": np.int32}


class RestClient(Client):
    """A `Client` that speaks REST.

    Args:
        server: Address of the server, "http://host:port" or "https://host:port".
        model_name: Name of the model, or "" for the only model of a `robust_tf.serve`.
        version: Number of the version. None uses the latest.
        label: Label of the version. Give a version or a label, not both.
        timeout_seconds: Longest time that a request may take, in seconds.
        token: Token to send as "Authorization: Bearer ...", or "".
        ca_file: PEM file of the authority that signed the server's certificate, or "" for the authorities that this
            machine trusts.
        retries: Repeats the requests that a busy server refuses.
    """

    def __init__(
        self,
        server: str,
        *,
        model_name: str,
        version: int | None,
        label: str,
        timeout_seconds: float,
        token: str,
        ca_file: str,
        retries: Retries,
    ) -> None:
        super().__init__()
        self._retries = retries
        self._http = httpx.Client(
            base_url=server.rstrip("/"),
            timeout=timeout_seconds,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=trust_authority(ca_file) if ca_file else True,
        )
        try:
            self._path = "/v1/models/" + _quote(model_name or _only_model(self._http, retries))
        except (ServerError, UserError):
            self.close()
            raise
        if version is not None:
            self._path += f"/versions/{version}"
        if label:
            self._path += f"/labels/{_quote(label)}"

    def predict(self, inputs: Mapping[str, Any], *, signature_name: str = DEFAULT_SIGNATURE) -> dict[str, np.ndarray]:
        """Runs a signature of the model; see `Client.predict`."""
        body = {
            "signature_name": signature_name,
            "inputs": {name: _to_json(value) for name, value in inputs.items()},
        }
        content = dump_json(body)
        reply = self._retries(lambda: _ask(self._http, "POST", f"{self._path}:predict", content))
        outputs = self.signatures[signature_name].outputs
        values = reply["outputs"]
        if len(outputs) == 1:
            values = {next(iter(outputs)): values}
        return {name: _from_json(values[name], info.dtype) for name, info in outputs.items()}

    def available(self) -> bool:
        """Returns whether the server is up and a version of the model answers requests."""
        try:
            entries = _ask(self._http, "GET", self._path)["model_version_status"]
        except ServerError as error:
            if error.code in ("NOT_FOUND", "UNAVAILABLE"):
                return False
            raise
        return any(entry["state"] == "AVAILABLE" for entry in entries)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _read_signatures(self) -> dict[str, Signature]:
        metadata = self._retries(lambda: _ask(self._http, "GET", f"{self._path}/metadata"))["metadata"]
        return {
            name: Signature(_tensor_infos(definition["inputs"]), _tensor_infos(definition["outputs"]))
            for name, definition in metadata["signature_def"]["signature_def"].items()
            if name != INIT_SIGNATURE
        }


def _ask(http: httpx.Client, method: str, path: str, body: bytes = b"") -> Any:
    """Returns the JSON document in the server's reply, or raises `ServerError` for an error."""
    try:
        reply = http.request(method, path, content=body, headers={"Content-Type": "application/json"})
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServerError("UNAVAILABLE", f"Cannot reach {http.base_url}: {error}", reached=False) from error
    except httpx.TimeoutException as error:
        raise ServerError("DEADLINE_EXCEEDED", f"No answer from {http.base_url} in time") from error
    except httpx.HTTPError as error:  # the server may have run the request already, so it is not sent again
        raise ServerError("UNKNOWN", f"The connection to {http.base_url} broke: {error}") from error
    try:
        document = json.loads(reply.content)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        document = {"error": f"HTTP {reply.status_code} without JSON from {http.base_url}{path}"}
    if reply.status_code != 200 or "error" in document:
        code = _CODES.get(reply.status_code, "UNKNOWN")
        message = str(document.get("error", f"HTTP {reply.status_code}"))
        raise ServerError(code, message, retry_after=seconds_after(reply.headers.get("Retry-After")))
    return document


_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",  # a proxy whose server is restarting
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def _only_model(http: httpx.Client, retries: Retries) -> str:
    try:
        names = retries(lambda: _ask(http, "GET", "/healthz")).get("models", [])
    except ServerError as error:
        if error.code in ("UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"):
            raise
        names = []  # not a `robust_tf.serve`
    if len(names) != 1:
        known = f" It has: {', '.join(names)}." if names else ""
        raise UserError(f"This server needs the name of a model. Received: model_name=''.{known}")
    return str(names[0])


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        if value.ndim and (value.dtype.kind in "iub" or value.dtype in (np.float32, np.float64)):
            return np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        return _to_json(value.tolist())
    return value


def _from_json(value: Any, dtype: str) -> np.ndarray:
    if dtype != "DT_STRING":
        return np.array(value, _ARRAY_TYPES.get(dtype))
    decode = np.frompyfunc(_to_bytes, 1, 1)
    array: np.ndarray = decode(_object_array(value))
    return array


def _object_array(value: Any) -> np.ndarray:
    """Returns nested lists of strings as an array of objects. NumPy alone would make an array of fixed-width text."""
    shape = []
    inner = value
    while isinstance(inner, list):
        shape.append(len(inner))
        inner = inner[0] if inner else None
    flat = [value]
    for _ in shape:
        flat = list(itertools.chain.from_iterable(flat))
    array = np.empty(len(flat), object)
    array[:] = flat
    return array.reshape(shape)


def _to_bytes(value: str | dict[str, str]) -> bytes:
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else value.encode("utf-8")


def _tensor_infos(tensors: Mapping[str, Any]) -> dict[str, TensorInfo]:
    infos = {}
    for name, tensor in tensors.items():
        shape = tensor["tensor_shape"]
        sizes = tuple(int(dim["size"]) for dim in shape.get("dim", []))
        free = tuple(None if size < 0 else size for size in sizes)
        infos[name] = TensorInfo(tensor["dtype"], None if shape.get("unknown_rank") else free)
    return infos


def _quote(name: str) -> str:
    return urllib.parse.quote(name, safe="")
