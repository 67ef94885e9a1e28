"""The client over gRPC. It needs the official protos, which import TensorFlow."""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from robust_tf.serving.client.base import Client, ServerError, Signature, TensorInfo, trust_authority
from robust_tf.serving.client.retries import Retries, seconds_after
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE, INIT_SIGNATURE

_NO_LIMIT = -1  # by default, gRPC refuses replies over 4 MB
_TOO_LARGE = re.compile("larger than|too large")  # wording of gRPC and of the proxy in serving/nginx
_NOT_REACHED = (
    "failed to connect",
    "DNS resolution failed",
    "name resolution",
)  # wording of gRPC when no server answers


class GrpcClient(Client):
    """A `Client` that speaks gRPC.

    Args:
        target: Address of the server, "host:port" or "unix:path".
        model_name: Name of the model.
        version: Number of the version. None uses the latest.
        label: Label of the version. Give a version or a label, not both.
        timeout_seconds: Longest time that a request may take, in seconds.
        secure: Whether to use TLS.
        token: Token to send with each call as "authorization: Bearer ...", or "". It is sent over TLS only.
        ca_file: PEM file of the authority that signed the server's certificate, or "" for the authorities
            that gRPC trusts.
        retries: Repeats the requests that a busy server refuses.
    """

    def __init__(
        self,
        target: str,
        *,
        model_name: str,
        version: int | None,
        label: str,
        timeout_seconds: float,
        secure: bool,
        token: str,
        ca_file: str,
        retries: Retries,
    ) -> None:
        super().__init__()
        self._retries = retries
        options = [("grpc.max_receive_message_length", _NO_LIMIT), ("grpc.max_send_message_length", _NO_LIMIT)]
        if secure:
            self._channel = grpc.secure_channel(target, _credentials(token, ca_file), options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._timeout_seconds = timeout_seconds
        self._spec = model_pb2.ModelSpec(name=model_name)
        if version is not None:
            self._spec.version.value = version
        if label:
            self._spec.version_label = label

    def predict(self, inputs: Mapping[str, Any], *, signature_name: str = DEFAULT_SIGNATURE) -> dict[str, np.ndarray]:
        """Runs a signature of the model; see `Client.predict`."""
        request = predict_pb2.PredictRequest(model_spec=self._spec)
        request.model_spec.signature_name = signature_name
        signature = self.signatures.get(signature_name)
        types = signature.inputs if signature else {}  # the server will refuse a signature it doesn't know
        for name, value in inputs.items():
            dtype = types_pb2.DataType.Value(types[name].dtype) if name in types else None
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value, dtype=dtype))
        reply = self._retries(lambda: self._call(self._prediction.Predict, request))
        return {name: tf.make_ndarray(proto) for name, proto in reply.outputs.items()}

    def available(self) -> bool:
        """Returns whether the server is up and a version of the model answers requests."""
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=self._spec)
        try:
            reply = self._call(self._models.GetModelStatus, request)
        except ServerError as error:
            if error.code in ("NOT_FOUND", "UNAVAILABLE"):
                return False
            raise
        available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        return any(entry.state == available for entry in reply.model_version_status)

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def _read_signatures(self) -> dict[str, Signature]:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=self._spec, metadata_field=["signature_def"]
        )
        reply = self._retries(lambda: self._call(self._prediction.GetModelMetadata, request))
        signatures = get_model_metadata_pb2.SignatureDefMap()
        reply.metadata["signature_def"].Unpack(signatures)
        return {
            name: Signature(_tensor_infos(definition.inputs), _tensor_infos(definition.outputs))
            for name, definition in signatures.signature_def.items()
            if name != INIT_SIGNATURE
        }

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_seconds)
        except grpc.RpcError as error:
            raise _server_error(error) from error


def _server_error(error: Any) -> ServerError:
    code, details = error.code().name, error.details() or ""
    if code == "RESOURCE_EXHAUSTED" and _TOO_LARGE.search(details) and "too many" not in details:
        code = "INVALID_ARGUMENT"  # the same as over REST; a retry would not make the request smaller
    reached = code != "UNAVAILABLE" or not any(words in details for words in _NOT_REACHED)
    headers = {key: value for key, value in [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]}
    return ServerError(code, details, reached=reached, retry_after=seconds_after(headers.get("retry-after")))


def _credentials(token: str, ca_file: str) -> grpc.ChannelCredentials:
    authority = None
    if ca_file:
        trust_authority(
            ca_file
        )  # raises an error that names the file; gRPC would only say that no server can be reached
        authority = pathlib.Path(ca_file).read_bytes()
    credentials = grpc.ssl_channel_credentials(authority)
    if not token:
        return credentials
    return grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))


def _tensor_infos(tensors: Mapping[str, Any]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(
            types_pb2.DataType.Name(tensor.dtype),
            None
            if tensor.tensor_shape.unknown_rank
            else tuple(None if dim.size < 0 else dim.size for dim in tensor.tensor_shape.dim),
        )
        for name, tensor in tensors.items()
    }
