"""The gRPC interface: PredictionService and ModelService from the official protos."""

import contextlib
from collections.abc import Callable
from typing import Any

import grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    input_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from robust_tf.serving.model import inference
from robust_tf.serving.model.served_model import ServedModel
from robust_tf.serving.model.status import ServingError, invalid, only_serving_errors
from robust_tf.serving.model.tensors import examples_of, to_array, to_proto
from robust_tf.serving.server.messages import fill_classification, fill_regression, log_of_messages
from robust_tf.serving.server.service import Service
from robust_tf.serving.wire.names import DEFAULT_SIGNATURE


def add_services(server: grpc.Server, service: Service, *, packed: bool = False) -> None:
    """Adds both services to a gRPC server.

    Args:
        server: Server to add them to.
        service: The models that answer.
        packed: Whether replies to Predict hold their numbers as bytes; see `to_proto`.
    """
    prediction = _PredictionService(service, packed=packed)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(prediction, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(_ModelService(service), server)


class _PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, service: Service, *, packed: bool) -> None:
        self._service = service
        self._packed = packed

    def Predict(self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext) -> Any:
        def answer(model: ServedModel, reply: predict_pb2.PredictResponse, timeout_ms: int) -> None:
            inputs = {name: to_array(name, proto) for name, proto in request.inputs.items()}
            rows = max((len(value) for value in inputs.values() if value.ndim), default=1)
            with self._service.running(request.model_spec.name, "predict", examples=rows):
                outputs = inference.predict(
                    model,
                    inputs,
                    signature_name=request.model_spec.signature_name,
                    outputs=request.output_filter,
                    timeout_ms=timeout_ms,
                )
            for name, value in outputs.items():
                reply.outputs[name].CopyFrom(to_proto(value, packed=self._packed))

        return self._infer(request, context, "predict", predict_pb2.PredictResponse(), answer)

    def Classify(self, request: classification_pb2.ClassificationRequest, context: grpc.ServicerContext) -> Any:
        def answer(model: ServedModel, reply: classification_pb2.ClassificationResponse, timeout_ms: int) -> None:
            self._classify(model, request.model_spec, request.input, reply.result, timeout_ms)

        return self._infer(request, context, "classify", classification_pb2.ClassificationResponse(), answer)

    def Regress(self, request: regression_pb2.RegressionRequest, context: grpc.ServicerContext) -> Any:
        def answer(model: ServedModel, reply: regression_pb2.RegressionResponse, timeout_ms: int) -> None:
            self._regress(model, request.model_spec, request.input, reply.result, timeout_ms)

        return self._infer(request, context, "regress", regression_pb2.RegressionResponse(), answer)

    def MultiInference(self, request: inference_pb2.MultiInferenceRequest, context: grpc.ServicerContext) -> Any:
        with _errors_to(context):
            name = _check_tasks(request.tasks)
            with self._service.counted(name, "multi_inference", "GRPC"):
                reply = inference_pb2.MultiInferenceResponse()
                with self._service.leased(request.tasks[0].model_spec) as (number, model):
                    for task in request.tasks:
                        result = reply.results.add()
                        _echo(result.model_spec, task.model_spec, number)
                        arguments = model, task.model_spec, request.input
                        if task.method_name == inference.CLASSIFY:
                            self._classify(*arguments, result.classification_result, _timeout_ms(context))
                        else:
                            self._regress(*arguments, result.regression_result, _timeout_ms(context))
                self._log("multi_inference", request.tasks[0].model_spec, number, request, reply)
                return reply

    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: grpc.ServicerContext
    ) -> Any:
        with _errors_to(context):
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            if not request.metadata_field:
                raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
            for field in request.metadata_field:
                if field != "signature_def":
                    raise invalid(f"Metadata field {field} is not supported")
            return self._service.metadata(request.model_spec)

    def _infer(
        self,
        request: Any,
        context: grpc.ServicerContext,
        method: str,
        reply: Any,
        answer: Callable[[ServedModel, Any, int], None],
    ) -> Any:
        with _errors_to(context), self._service.counted(request.model_spec.name, method, "GRPC"):
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            with self._service.leased(request.model_spec) as (number, model):
                answer(model, reply, _timeout_ms(context))
                _echo(reply.model_spec, request.model_spec, number)
            self._log(method, request.model_spec, number, request, reply)
            return reply

    def _log(self, method: str, spec: model_pb2.ModelSpec, number: int, request: Any, reply: Any) -> None:
        self._service.log(spec, number, size=request.ByteSize, make=lambda: log_of_messages(method, request, reply))

    def _classify(
        self,
        model: ServedModel,
        spec: model_pb2.ModelSpec,
        source: input_pb2.Input,
        result: classification_pb2.ClassificationResult,
        timeout_ms: int,
    ) -> None:
        examples = examples_of(source)
        with self._service.running(spec.name, "classify", examples=len(examples)):
            answer = inference.classify(model, examples, signature_name=spec.signature_name, timeout_ms=timeout_ms)
        fill_classification(result, answer)

    def _regress(
        self,
        model: ServedModel,
        spec: model_pb2.ModelSpec,
        source: input_pb2.Input,
        result: regression_pb2.RegressionResult,
        timeout_ms: int,
    ) -> None:
        examples = examples_of(source)
        with self._service.running(spec.name, "regress", examples=len(examples)):
            values = inference.regress(model, examples, signature_name=spec.signature_name, timeout_ms=timeout_ms)
        fill_regression(result, values)


class _ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    def GetModelStatus(self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.ServicerContext) -> Any:
        with _errors_to(context):
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            return self._service.status(request.model_spec)

    def HandleReloadConfigRequest(
        self, request: model_management_pb2.ReloadConfigRequest, context: grpc.ServicerContext
    ) -> Any:
        reply = model_management_pb2.ReloadConfigResponse()
        try:
            with only_serving_errors():
                if request.config.WhichOneof("config") is None:
                    raise invalid("ReloadConfigRequest does not contain a config.")
                self._service.reload(request.config)
        except ServingError as error:  # the call itself succeeds, and the reply carries the status
            reply.status.error_code = error.number
            reply.status.error_message = error.message
        return reply


@contextlib.contextmanager
def _errors_to(context: grpc.ServicerContext) -> Any:
    try:
        with only_serving_errors():
            yield
    except ServingError as error:
        context.abort(grpc.StatusCode[error.code], error.message)


def _timeout_ms(context: grpc.ServicerContext) -> int:
    """Returns the time until the caller's deadline, or 0 if there is none."""
    remaining = context.time_remaining()
    # If the caller sets no deadline, gRPC reports one in the far future. No run takes a day.
    return 0 if remaining is None or remaining > 86_400 else max(1, int(remaining * 1000))


def _echo(reply: model_pb2.ModelSpec, request: model_pb2.ModelSpec, number: int) -> None:
    reply.name = request.name
    reply.version.value = number
    reply.signature_name = request.signature_name or DEFAULT_SIGNATURE


def _check_tasks(tasks: Any) -> str:
    """Checks the tasks of a MultiInference request, and returns the name of the model, which they must share."""
    if not tasks:
        raise invalid("Inference request must contain at least one task.")
    seen = set()
    for task in tasks:
        if not task.model_spec.name:
            raise invalid("Found ModelSpec with an empty model name.")
        if task.model_spec.name != tasks[0].model_spec.name:
            raise invalid(
                f"All ModelSpecs in a MultiInferenceRequest must access the same model name. Received: "
                f"{task.model_spec.name}, {tasks[0].model_spec.name}."
            )
        if task.method_name not in (inference.CLASSIFY, inference.REGRESS):
            raise ServingError("UNIMPLEMENTED", f"Unsupported signature method_name: {task.method_name}")
        signature = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if signature in seen:
            raise invalid(f"Duplicate evaluation of signature: {signature}")
        seen.add(signature)
    return str(tasks[0].model_spec.name)
