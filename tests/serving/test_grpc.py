"""Tests of the gRPC interface with the official protos."""

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

from tests.serving.conftest import LIMIT, until

Code = grpc.StatusCode


def predict_request(name="half_plus_two", signature="", inputs=None, outputs=(), **choice):
    request = predict_pb2.PredictRequest(output_filter=outputs)
    fill(request.model_spec, name, signature, **choice)
    for key, value in ({"x": np.float32([2.0])} if inputs is None else inputs).items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return request


def fill(spec, name, signature="", *, version=None, label=""):
    spec.name, spec.signature_name = name, signature
    if version is not None:
        spec.version.value = version
    if label:
        spec.version_label = label


def with_examples(request, name, signature, *features, **choice):
    fill(request.model_spec, name, signature, **choice)
    for feature in features:
        example = request.input.example_list.examples.add()
        for key, value in feature.items():
            example.features.feature[key].float_list.value.append(value)
    return request


def refused(call, request, code, message):
    with pytest.raises(grpc.RpcError) as raised:
        call(request, timeout=LIMIT)
    assert raised.value.code() == code
    assert message in raised.value.details()


@pytest.mark.parametrize("choice", [{}, {"version": 123}, {"label": "stable"}])
@pytest.mark.parametrize("outputs", [(), ("y",)])
def test_predict_names_the_version_and_signature_it_used(server, choice, outputs):
    reply = server.predict.Predict(predict_request(outputs=outputs, **choice))
    assert list(reply.outputs) == ["y"]
    assert list(reply.outputs["y"].float_val) == [3.0]
    assert [dim.size for dim in reply.outputs["y"].tensor_shape.dim] == [1]
    spec = reply.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("half_plus_two", 123, "serving_default")


@pytest.mark.parametrize("kind", ["float32", "int32", "int64", "uint8", "bool", "string", "half"])
def test_all_types_are_returned_unchanged(server, kind):
    values = {
        "string": np.array([[b"a", b"\xff"]], object),
        "half": np.array([[0.5, -2.0]], np.float16),
    }.get(kind)
    if values is None:
        values = np.array([[0, 1]]).astype(kind)
    reply = server.predict.Predict(predict_request("echo", f"echo_{kind}", {"x": values}))
    received = tf.make_ndarray(reply.outputs["y"])
    assert received.dtype == values.dtype
    np.testing.assert_array_equal(received, values)


def test_single_value_fills_the_shape(server):
    request = predict_request("echo", "echo_float32", {"x": np.zeros((2, 3), np.float32)})
    request.inputs["x"].ClearField("tensor_content")
    request.inputs["x"].float_val[:] = [7.0]
    reply = server.predict.Predict(request)
    np.testing.assert_array_equal(tf.make_ndarray(reply.outputs["y"]), np.full((2, 3), 7.0))


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (predict_request("foo"), Code.NOT_FOUND, "Servable not found for request: Latest(foo)"),
        (predict_request(version=99), Code.NOT_FOUND, "Specific(half_plus_two, 99)"),
        (predict_request(label="x"), Code.INVALID_ARGUMENT, "Unrecognized servable version label: x"),
        (predict_pb2.PredictRequest(), Code.INVALID_ARGUMENT, "Missing ModelSpec"),
        (predict_request(""), Code.INVALID_ARGUMENT, "ModelSpec has no name specified."),
        (predict_request(signature="z"), Code.FAILED_PRECONDITION, 'Serving signature key "z" not found.'),
        (predict_request(outputs=["z"]), Code.INVALID_ARGUMENT, "output tensor alias not found in signature: z"),
        (predict_request(outputs=["y", "y"]), Code.INVALID_ARGUMENT, "duplicate output tensor alias: y"),
        (
            predict_request(inputs={"a": np.float32(1), "b": np.float32(1)}),
            Code.INVALID_ARGUMENT,
            "2!=1 len({a,b}) != len({x}). Sent extra: {a,b}. Missing but required: {x}.",
        ),
        (predict_request(inputs={"z": np.float32(1)}), Code.INVALID_ARGUMENT, "Signature input alias: x(feed name:"),
        (predict_request(inputs={}), Code.INVALID_ARGUMENT, "0!=1"),
        (
            predict_request(inputs={"x": np.array([b"a"], object)}),
            Code.INVALID_ARGUMENT,
            "to be float but string is provided",
        ),
        (
            predict_request("digits", "", {"image_bytes": np.array([b"no image"], object)}),
            Code.INVALID_ARGUMENT,
            "Unknown image file format",
        ),
    ],
)
def test_bad_predict_requests_get_code_and_message(server, request_, code, message):
    refused(server.predict.Predict, request_, code, message)


def test_shapes_are_compared_with_the_signature(embedded):
    request = predict_request("digits", "predict_pixels", {"images": np.zeros((16, 16, 3), np.float32)})
    refused(embedded.predict.Predict, request, Code.INVALID_ARGUMENT, "expected [?,16,16,3], received [16, 16, 3]")


def test_tensors_that_contradict_themselves_are_refused(embedded):
    surplus = predict_request()
    surplus.inputs["x"].float_val[:] = [1.0, 2.0, 3.0]
    refused(embedded.predict.Predict, surplus, Code.INVALID_ARGUMENT, "tensor parsing error: x")
    huge = predict_request()
    huge.inputs["x"].tensor_shape.dim[0].size = 10**15
    refused(embedded.predict.Predict, huge, Code.INVALID_ARGUMENT, "too large for its")
    negative = predict_request()
    negative.inputs["x"].tensor_shape.dim[0].size = -5
    refused(embedded.predict.Predict, negative, Code.INVALID_ARGUMENT, "the shape must be known")
    unknown = predict_request()
    unknown.inputs["x"].dtype = 0
    refused(embedded.predict.Predict, unknown, Code.INVALID_ARGUMENT, "tensor parsing error: x")


def test_long_messages_are_cut(server):
    with pytest.raises(grpc.RpcError) as raised:
        server.predict.Predict(predict_request(5000 * "n"))
    assert raised.value.details().endswith("...TRUNCATED")
    assert len(raised.value.details()) == 1024 + len("...TRUNCATED")


def test_classify_returns_classes_for_each_example(server):
    request = with_examples(
        classification_pb2.ClassificationRequest(), "half_plus_two", "classify_x_to_y", {"x": 2.0}, {"x": 20.0}
    )
    reply = server.predict.Classify(request)
    assert [[c.score for c in row.classes] for row in reply.result.classifications] == [[3.0], [12.0]]
    assert reply.model_spec.version.value == 123
    both = classification_pb2.ClassificationRequest()
    with_examples(both, "half_plus_two", "classes_only", {})
    assert [c.label for c in server.predict.Classify(both).result.classifications[0].classes] == ["cat", "cat"]


def test_regress_returns_a_number_for_each_example(server):
    request = with_examples(regression_pb2.RegressionRequest(), "half_plus_two", "regress_x_to_y", {"x": 2.0})
    assert [r.value for r in server.predict.Regress(request).result.regressions] == [3.0]
    shared = regression_pb2.RegressionRequest()
    fill(shared.model_spec, "half_plus_two", "regress_x2_to_y3")
    listed = shared.input.example_list_with_context
    listed.context.features.feature["x2"].float_list.value.append(4.0)
    listed.examples.add()
    listed.examples.add().features.feature["x2"].float_list.value.append(2.0)
    assert [r.value for r in server.predict.Regress(shared).result.regressions] == [5.0, 4.0]


@pytest.mark.parametrize(
    ("signature", "examples", "message"),
    [
        ("x", [{"x": 1.0}], "No signature was found with the name: x"),
        ("serving_default", [{"x": 1.0}], "No classification inputs found in SignatureDef"),
        ("regress_x_to_y", [{"x": 1.0}], "Expected classification outputs"),
        ("classify_x_to_y", [], "Input is empty."),
        ("classify_x_to_y", [{"y": 1.0}], "Feature: x (data type: float) is required"),
    ],
)
def test_bad_classify_requests_get_code_and_message(server, signature, examples, message):
    request = with_examples(classification_pb2.ClassificationRequest(), "half_plus_two", signature, *examples)
    refused(server.predict.Classify, request, Code.INVALID_ARGUMENT, message)


def test_multi_inference_runs_several_signatures(server):
    request = inference_pb2.MultiInferenceRequest()
    for signature, method in [("classify_x_to_y", "classify"), ("regress_x_to_y2", "regress")]:
        task = request.tasks.add(method_name=f"tensorflow/serving/{method}")
        fill(task.model_spec, "half_plus_two", signature)
    request.input.example_list.examples.add().features.feature["x"].float_list.value.append(2.0)
    results = server.predict.MultiInference(request).results
    assert results[0].classification_result.classifications[0].classes[0].score == 3.0
    assert results[1].regression_result.regressions[0].value == 4.0
    assert results[1].model_spec.signature_name == "regress_x_to_y2"
    request.tasks[1].model_spec.signature_name = "classify_x_to_y"
    refused(server.predict.MultiInference, request, Code.INVALID_ARGUMENT, "Duplicate evaluation of signature")
    request.tasks[1].model_spec.name = "echo"
    refused(server.predict.MultiInference, request, Code.INVALID_ARGUMENT, "must access the same model name")
    request.tasks[0].method_name = "other"
    refused(server.predict.MultiInference, request, Code.UNIMPLEMENTED, "other")
    del request.tasks[:]
    refused(server.predict.MultiInference, request, Code.INVALID_ARGUMENT, "at least one task")


def test_status_lists_the_versions(server):
    request = get_model_status_pb2.GetModelStatusRequest()
    refused(server.models.GetModelStatus, request, Code.INVALID_ARGUMENT, "Missing ModelSpec")
    request.model_spec.name = "half_plus_two"
    (entry,) = server.models.GetModelStatus(request).model_version_status
    assert (entry.version, entry.state, entry.status.error_code) == (123, 30, 0)
    request.model_spec.version.value = 99
    refused(server.models.GetModelStatus, request, Code.NOT_FOUND, "Could not find version 99 of model half_plus_two")
    request.model_spec.name = "foo"
    refused(server.models.GetModelStatus, request, Code.NOT_FOUND, "Could not find any versions of model foo")


def test_metadata_holds_the_signatures(server):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    refused(server.predict.GetModelMetadata, request, Code.INVALID_ARGUMENT, "Missing ModelSpec")
    request.model_spec.name = "half_plus_two"
    reply = server.predict.GetModelMetadata(request)
    assert (reply.model_spec.name, reply.model_spec.version.value) == ("half_plus_two", 123)
    assert list(reply.metadata) == ["signature_def"]
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert reply.metadata["signature_def"].Unpack(signatures)
    assert "serving_default" in signatures.signature_def
    request.metadata_field[:] = ["x"]
    refused(server.predict.GetModelMetadata, request, Code.INVALID_ARGUMENT, "Metadata field x is not supported")
    request.metadata_field[:] = []
    refused(server.predict.GetModelMetadata, request, Code.INVALID_ARGUMENT, "at least one metadata_field")
    request.metadata_field[:] = ["signature_def"]
    request.model_spec.name = "foo"
    refused(server.predict.GetModelMetadata, request, Code.NOT_FOUND, "Latest(foo)")


def test_error_of_a_reload_is_in_the_reply(server):
    request = model_management_pb2.ReloadConfigRequest()
    assert server.models.HandleReloadConfigRequest(request).status.error_code == 3
    request.config.model_config_list.config.add(name="m", base_path="relative", model_platform="tensorflow")
    status = server.models.HandleReloadConfigRequest(request).status
    assert (status.error_code, "got base_path()=relative" in status.error_message) == (3, True)


def test_deadline_of_the_caller_ends_the_run(server):
    request = predict_request("echo", "endless")
    with pytest.raises(grpc.RpcError) as raised:
        server.predict.Predict(request, timeout=2)
    assert raised.value.code() == Code.DEADLINE_EXCEEDED
    # The client raised this on its own. The server counts the request when the run has ended.
    ended = ':tensorflow:serving:request_count{model_name="echo",status="DEADLINE_EXCEEDED"}'
    until(lambda: ended in server.rest.get("/monitoring/prometheus/metrics").text)
