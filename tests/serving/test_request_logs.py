"""Tests of request logging: what is written, that the files work as warm-up requests, and that no request suffers."""

import os
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import classification_pb2, inference_pb2, prediction_log_pb2, regression_pb2

from robust_tf.errors import UserError
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.model.warmup import WARMUP_FILE, predict_log, replay_warmup
from robust_tf.serving.server import request_logs
from robust_tf.serving.server.config_files import models_to_serve
from robust_tf.serving.server.metrics import Metrics
from robust_tf.serving.server.request_logs import LogEntry, RequestLogs
from robust_tf.serving.server.serve_config import ServeConfig
from tests.serving.conftest import running_server, until
from tests.serving.models import logging_entry, model_entry
from tests.serving.test_grpc import fill, predict_request, with_examples

RECORD_WRITER = tf.io.TFRecordWriter


def config_file(folder, base, more):
    path = folder / "models.config"
    path.write_text("model_config_list {" + model_entry("half_plus_two", base, more) + "}")
    return str(path)


def files(folder):
    return sorted(folder.glob("*.tfrecord"))


def records(folder):
    found = []
    for path in files(folder):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            found.append(prediction_log_pb2.PredictionLog.FromString(record))
    return found


def ask_rest(running, method, body):
    reply = running.rest.post(f"/v1/models/half_plus_two:{method}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_requests_of_both_interfaces_are_logged(half_plus_two, tmp_path):
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text("prometheus_config { enable: true }")
    flags = {
        "model_config_file": config_file(tmp_path, half_plus_two, logging_entry(tmp_path / "log")),
        "monitoring_config_file": str(monitoring),
    }
    with running_server(**flags) as running:
        ask_rest(running, "predict", {"instances": [2.0, 4.0]})
        ask_rest(running, "classify", {"signature_name": "classify_x_to_y", "examples": [{"x": 2.0}]})
        ask_rest(running, "regress", {"signature_name": "regress_x_to_y", "examples": [{"x": 2.0}, {"x": 4.0}]})
        running.predict.Predict(predict_request())
        request = with_examples(
            classification_pb2.ClassificationRequest(), "half_plus_two", "classify_x_to_y", {"x": 2.0}
        )
        running.predict.Classify(request)
        request = with_examples(regression_pb2.RegressionRequest(), "half_plus_two", "regress_x_to_y", {"x": 2.0})
        running.predict.Regress(request)
        request = multi_inference_request()
        running.predict.MultiInference(request)
        running.rest.post("/v1/models/half_plus_two:predict", json={"instances": ["no number"]})  # is not logged
        until(lambda: 'request_log_count{model_name="half_plus_two",status_code="OK"} 7' in metrics_of(running))
        logs = records(tmp_path)  # readable while the server runs
    kinds = ["predict", "classify", "regress", "predict", "classify", "regress", "multi_inference"]
    assert [log.WhichOneof("log_type") for log in logs] == [f"{kind}_log" for kind in kinds]
    for log, signature in zip(logs, ["serving_default", "classify_x_to_y", "regress_x_to_y"] * 2, strict=False):
        spec = log.log_metadata.model_spec
        assert (spec.name, spec.version.value, spec.signature_name) == ("half_plus_two", 123, signature)
        assert list(log.log_metadata.saved_model_tags) == ["serve"]
        assert log.log_metadata.sampling_config.sampling_rate == 1.0
        assert abs(log.log_metadata.timestamp_secs - time.time()) < 600
    predicted = logs[0].predict_log
    np.testing.assert_array_equal(tf.make_ndarray(predicted.request.inputs["x"]), np.float32([2.0, 4.0]))
    np.testing.assert_array_equal(tf.make_ndarray(predicted.response.outputs["y"]), np.float32([3.0, 4.0]))
    assert predicted.request.model_spec.signature_name == "serving_default"
    assert [c.classes[0].score for c in logs[1].classify_log.response.result.classifications] == [3.0]
    assert [r.value for r in logs[2].regress_log.response.result.regressions] == [3.0, 4.0]
    assert list(logs[3].predict_log.response.outputs["y"].float_val) == [3.0]
    assert logs[6].multi_inference_log.response.results[0].regression_result.regressions[0].value == 3.0

    shutil.copytree(half_plus_two / "00000123", tmp_path / "1")
    (tmp_path / "1" / WARMUP_FILE).parent.mkdir()
    (file,) = files(tmp_path)
    shutil.copy(file, tmp_path / "1" / WARMUP_FILE)
    model = LoadedModel(tmp_path / "1")
    assert replay_warmup(model) == 7
    model.close()


def multi_inference_request():
    request = inference_pb2.MultiInferenceRequest()
    task = request.tasks.add(method_name="tensorflow/serving/regress")
    fill(task.model_spec, "half_plus_two", "regress_x_to_y")
    request.input.example_list.examples.add().features.feature["x"].float_list.value.append(2.0)
    return request


def metrics_of(running):
    return running.rest.get("/monitoring/prometheus/metrics").text


@pytest.mark.parametrize(("rate", "expected"), [(0.0, (0, 0)), (0.5, (1, 199))])
def test_a_sample_of_the_requests_is_logged(half_plus_two, tmp_path, rate, expected):
    file = config_file(tmp_path, half_plus_two, logging_entry(tmp_path / "log", rate))
    with running_server(model_config_file=file) as running:
        for _ in range(200):
            running.predict.Predict(predict_request())
    low, high = expected
    assert low <= len(records(tmp_path)) <= high


def test_logging_follows_the_config_file(half_plus_two, tmp_path):
    file = config_file(tmp_path, half_plus_two, "")
    with running_server(model_config_file=file, model_config_file_poll_wait_seconds=0.05) as running:
        running.predict.Predict(predict_request())
        assert files(tmp_path) == []
        config_file(tmp_path, half_plus_two, logging_entry(tmp_path / "log"))

        def logged():
            running.predict.Predict(predict_request())
            return files(tmp_path)

        until(logged)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (logging_entry("/tmp/l", kind='type: "kafka"'), "Received: 'kafka'. Valid: tfrecord."),
        (logging_entry("log"), "filename_prefix with an absolute path. Received: 'log'"),
        (
            logging_entry("/missing/log"),
            "exists and is writable for this user. Received: filename_prefix '/missing/log'",
        ),
        (logging_entry("gs://b/log"), "filename_prefix of model half_plus_two: gs://b/log"),
        (logging_entry("/tmp/l", 1.5), "with a number from 0 to 1. Received: 1.5"),
        (
            'logging_config { log_collector_config { filename_prefix: "/tmp/l" } }',
            "needs sampling_config { sampling_rate",
        ),
        ("logging_config { sampling_config { attributes: 1 } }", "not supported. Received: attributes"),
    ],
)
def test_bad_logging_config_is_refused(half_plus_two, tmp_path, config, message):
    config = ServeConfig(model_config_file=config_file(tmp_path, half_plus_two, config))
    with pytest.raises(UserError) as raised:
        models_to_serve(config)
    assert message in str(raised.value)


def test_models_need_different_files(half_plus_two, tmp_path):
    entries = [model_entry(name, half_plus_two, logging_entry(tmp_path / "log")) for name in ("a", "b")]
    (tmp_path / "models.config").write_text("model_config_list {" + "".join(entries) + "}")
    with pytest.raises(UserError, match="own filename_prefix for request logging. Received: '.*/log' more than once"):
        models_to_serve(ServeConfig(model_config_file=str(tmp_path / "models.config")))


def entry(prefix, *, size=1, make=None):
    log = predict_log("m", "", {"x": np.zeros(100, np.float32)})
    return LogEntry(str(prefix), "m", size, make or (lambda: log))


def test_a_file_holds_no_more_records_than_a_warm_up_file(tmp_path, monkeypatch):
    monkeypatch.setattr(request_logs, "MAX_RECORDS", 3)
    logs = RequestLogs(Metrics())
    for _ in range(7):
        logs.put(entry(tmp_path / "log"))
    logs.close()
    lengths = [len(list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())) for path in files(tmp_path)]
    assert lengths == [3, 3, 1]


class FullDisk:
    """Stands in for the writer of TFRecords. When the disk is full, it writes half of a record and then fails."""

    full = False

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.writer = RECORD_WRITER(path)

    def write(self, record):
        if FullDisk.full:
            with self.path.open("ab") as file:
                file.write(b"half of a record")
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")
        self.writer.write(record)

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


def test_full_disk_fails_no_request_and_is_reported_once(half_plus_two, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tf.io, "TFRecordWriter", FullDisk)
    monkeypatch.setattr(request_logs, "_SECONDS_AFTER_FAILURE", 0.0)
    monkeypatch.setattr(FullDisk, "full", False)
    file = config_file(tmp_path, half_plus_two, logging_entry(tmp_path / "log"))

    def ask(times):
        for _ in range(times):
            assert running.predict.Predict(predict_request()).outputs["y"].float_val == [3.0]
        until(lambda: running.server._logs._waiting_bytes == 0)

    def warnings():
        return [record.getMessage() for record in caplog.records if "cannot be logged" in record.getMessage()]

    with running_server(model_config_file=file) as running:
        ask(3)
        FullDisk.full = True
        ask(5)
        (warning,) = warnings()
        assert (
            f"Requests to model half_plus_two are answered, but cannot be logged to {tmp_path}/log-*.tfrecord"
            in warning
        )
        assert "No space left on device" in warning
        FullDisk.full = False
        ask(2)
        FullDisk.full = True
        ask(1)
        assert len(warnings()) == 2  # the disk is full again
    assert len(records(tmp_path)) == 5  # whole records, although others were written in part


def test_folder_that_vanishes_fails_no_request(half_plus_two, tmp_path, caplog):
    (tmp_path / "logs").mkdir()
    file = config_file(tmp_path, half_plus_two, logging_entry(tmp_path / "logs" / "log"))
    with running_server(model_config_file=file) as running:
        (tmp_path / "logs").rmdir()
        for _ in range(3):
            assert running.predict.Predict(predict_request()).outputs["y"].float_val == [3.0]
        until(lambda: running.server._logs._waiting_bytes == 0)
    assert caplog.text.count("cannot be logged") == 1


def test_slow_disk_delays_no_request(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(request_logs, "_MAX_WAITING_BYTES", 100)
    disk = threading.Event()
    metrics = Metrics()
    logs = RequestLogs(metrics)

    def slow():
        disk.wait()
        return prediction_log_pb2.PredictionLog()

    start = time.monotonic()
    for _ in range(10):
        logs.put(entry(tmp_path / "log", size=40, make=slow))
    logs.put(entry(tmp_path / "log2", size=1000))
    assert time.monotonic() - start < 5
    assert caplog.text.count("they come faster than they can be written") == 2
    disk.set()
    logs.close()
    assert len(records(tmp_path)) == 2
    assert metrics._logged == {("m", "OK"): 2, ("m", "RESOURCE_EXHAUSTED"): 9}
    logs.put(entry(tmp_path / "log"))  # after the end, nothing happens
    assert len(records(tmp_path)) == 2


def test_request_larger_than_the_limit_is_logged_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(request_logs, "_MAX_WAITING_BYTES", 100)
    logs = RequestLogs(Metrics())
    logs.put(entry(tmp_path / "log", size=1000))
    logs.close()
    assert len(records(tmp_path)) == 1


def test_folder_must_be_writable(half_plus_two, tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir(mode=0o555)
    # Root may write everywhere, so this is what the system says to other users.
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))
    config = ServeConfig(model_config_file=config_file(tmp_path, half_plus_two, logging_entry(tmp_path / "logs" / "l")))
    with pytest.raises(UserError, match="is writable for this user"):
        models_to_serve(config)
