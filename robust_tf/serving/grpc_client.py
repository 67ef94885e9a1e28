"""The client over gRPC: needs the official protos, which import TensorFlow."""

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

from robust_tf.serving.client import Client, ServerError, Signature, TensorInfo, retried

_NO_LIMIT = -1  # gRPC refuses replies over 4 MB otherwise


class GrpcClient(Client):
    """`Client` over gRPC.

    Args:
        target: "host:port" or "unix:path".
        model_name: the model.
        version: this version; the latest when None.
        label: the version with this label instead.
        timeout_seconds: deadline of each request.
    """

    def __init__(
        self, target: str, *, model_name: str, version: int | None, label: str, timeout_seconds: float
    ) -> None:
        super().__init__()
        options = [("grpc.max_receive_message_length", _NO_LIMIT), ("grpc.max_send_message_length", _NO_LIMIT)]
        self._channel = grpc.insecure_channel(target, options)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._timeout_seconds = timeout_seconds
        self._spec = model_pb2.ModelSpec(name=model_name)
        if version is not None:
            self._spec.version.value = version
        if label:
            self._spec.version_label = label

    def predict(self, inputs: Mapping[str, Any], *, signature_name: str = "serving_default") -> dict[str, np.ndarray]:
        request = predict_pb2.PredictRequest(model_spec=self._spec)
        request.model_spec.signature_name = signature_name
        signature = self.signatures.get(signature_name)
        types = signature.inputs if signature else {}  # the server refuses what it doesn't know
        for name, value in inputs.items():
            dtype = types_pb2.DataType.Value(types[name].dtype) if name in types else None
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value, dtype=dtype))
        reply = retried(lambda: self._call(self._prediction.Predict, request))
        return {name: tf.make_ndarray(proto) for name, proto in reply.outputs.items()}

    def available(self) -> bool:
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
        self._channel.close()

    def _read_signatures(self) -> dict[str, Signature]:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=self._spec, metadata_field=["signature_def"]
        )
        reply = retried(lambda: self._call(self._prediction.GetModelMetadata, request))
        signatures = get_model_metadata_pb2.SignatureDefMap()
        reply.metadata["signature_def"].Unpack(signatures)
        return {
            name: Signature(_tensor_infos(definition.inputs), _tensor_infos(definition.outputs))
            for name, definition in signatures.signature_def.items()
            if name != "__saved_model_init_op"
        }

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_seconds)
        except grpc.RpcError as error:
            raise ServerError(error.code().name, error.details()) from error


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
