"""Tests of the flags of `tensorflow_model_server`: each is known, and has its effect or a warning."""

import importlib.metadata
import itertools
import logging
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf

import robust_tf
from robust_tf import serve
from robust_tf.errors import UserError
from robust_tf.flags import flat_fields, parse_flags
from robust_tf.serving.model import warmup
from robust_tf.serving.model.status import invalid
from robust_tf.serving.server import config_files
from robust_tf.serving.server.batching import BatchedModel
from robust_tf.serving.server.check import check
from robust_tf.serving.server.flags_without_effect import FlagsWithoutEffect
from robust_tf.serving.server.model_settings import ModelSettings
from robust_tf.serving.server.serve_config import ServeConfig
from robust_tf.serving.server.server import Server
from robust_tf.serving.server.versions import ModelManager
from tests.serving.conftest import LIMIT, running_server, until
from tests.serving.models import save_half_plus_two
from tests.serving.test_grpc import Code, predict_request, refused

# The flags of tensorflow_model_server 2.19 and of its main branch in July 2026, in the order of its --help.
FLAGS = """
port grpc_socket_path rest_api_port rest_api_num_threads rest_api_timeout_in_ms rest_api_enable_cors_support
enable_batching allow_version_labels_for_unavailable_models batching_parameters_file
enable_per_model_batching_parameters model_config_file model_config_file_poll_wait_seconds model_name model_base_path
num_load_threads num_unload_threads max_num_load_retries load_retry_interval_micros file_system_poll_wait_seconds
flush_filesystem_caches tensorflow_session_parallelism tensorflow_session_config_file tensorflow_intra_op_parallelism
tensorflow_inter_op_parallelism use_alts_credentials ssl_config_file platform_config_file
per_process_gpu_memory_fraction saved_model_tags grpc_channel_arguments grpc_max_threads enable_model_warmup
num_request_iterations_for_warmup version monitoring_config_file remove_unused_fields_from_bundle_metagraph
prefer_tflite_model num_tflite_pools num_tflite_interpreters_per_pool enable_signature_method_name_check
xla_cpu_compilation_enabled xla_gpu_compilation_enabled enable_profiler thread_pool_factory_config_file mixed_precision
skip_initialize_tpu enable_grpc_healthcheck_service enable_serialization_as_tensor_content
""".split()


def served(base, **flags):
    return running_server(model_name="half_plus_two", model_base_path=str(base), **flags)


def test_all_flags_of_tensorflow_serving_are_known():
    assert set(FLAGS) <= {field.name for field in flat_fields(ServeConfig)}
    assert len(FLAGS) == 48


def test_flags_without_effect_are_accepted_with_a_warning_each(half_plus_two, caplog):
    flags = [
        "--enable_profiler",
        "--flush_filesystem_caches",
        "--num_tflite_pools=2",
        "--num_tflite_interpreters_per_pool=2",
        "--platform_config_file=/p.config",
        "--prefer_tflite_model=true",
        "--remove_unused_fields_from_bundle_metagraph=false",
        "--skip_initialize_tpu",
        "--thread_pool_factory_config_file=/t.config",
        "--use_alts_credentials",
        "--xla_cpu_compilation_enabled=false",
        "--noxla_gpu_compilation_enabled",
    ]
    config, _ = parse_flags(ServeConfig, ["serve", "--model_base_path=/m", *flags])
    caplog.set_level(logging.WARNING)
    with served(half_plus_two, without_effect=config.without_effect) as running:
        assert running.rest.post("/v1/models/half_plus_two:predict", json={"instances": [2.0]}).status_code == 200
    said = [record.getMessage() for record in caplog.records]
    named = [flag.removeprefix("--").removeprefix("no").partition("=")[0] for flag in flags]
    assert sorted(line.partition("=")[0] for line in said) == sorted(f"--{name}" for name in named)
    assert all(" has no effect: " in line for line in said)
    assert "--noxla" not in "".join(said)
    assert "--xla_gpu_compilation_enabled=false has no effect: models may always use XLA" in said


def test_flags_that_ask_for_what_the_server_does_anyway_cause_no_warning(half_plus_two, tmp_path):
    flags = [
        "--noenable_profiler",
        "--use_alts_credentials=false",
        "--platform_config_file=",
        "--xla_cpu_compilation_enabled",
    ]
    config, _ = parse_flags(ServeConfig, ["serve", f"--model_base_path={half_plus_two}", *flags])
    assert config.warnings() == []
    assert FlagsWithoutEffect().warnings() == []


def test_flags_that_exclude_each_other_cause_a_warning(half_plus_two, tmp_path, server_flags):
    flags = {"model_base_path": str(half_plus_two), "model_config_file": server_flags["model_config_file"]}
    config = ServeConfig(**flags, enable_per_model_batching_parameters=True)
    first, second = config.warnings()
    assert first.startswith(f"--model_base_path={half_plus_two} has no effect: --model_config_file=")
    assert second == "--enable_per_model_batching_parameters=true has no effect without --enable_batching"
    assert [line for line in check(config).lines if line.startswith("note: --")] == [
        f"note: {first}",
        f"note: {second}",
    ]
    assert [model.name for model in config_files.models_to_serve(config)] == ["half_plus_two", "echo", "digits"]


def test_version_is_printed(capsys):
    assert serve.main(["serve", "--version"]) == 0
    expected = (robust_tf.__version__, importlib.metadata.version("tensorflow"))
    assert capsys.readouterr().out == "robust_tf server: {}\nTensorFlow Library: {}\n".format(*expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"grpc_channel_arguments": "grpc.a=1,grpc.b"}, "Received: 'grpc.b' in 'grpc.a=1,grpc.b'"),
        ({"max_num_load_retries": -1}, "--max_num_load_retries must be at least 0. Received: -1"),
        ({"num_load_threads": -2}, "--num_load_threads must be at least 0. Received: -2"),
        ({"per_process_gpu_memory_fraction": 1.5}, "must be from 0 to 1. Received: 1.5"),
        ({"mixed_precision": "float16"}, "must be bfloat16. Received: 'float16'"),
        (
            {
                "tensorflow_session_parallelism": 1,
                "tensorflow_intra_op_parallelism": 2,
                "tensorflow_inter_op_parallelism": 3,
            },
            "Received: --tensorflow_session_parallelism=1 --tensorflow_intra_op_parallelism=2 --tensorflow_inter_op",
        ),
    ],
)
def test_bad_values_are_refused(flags, message):
    with pytest.raises(UserError) as raised:
        ServeConfig(model_base_path="/m", **flags)
    assert message in str(raised.value)


def test_channel_arguments_reach_grpc(half_plus_two):
    text = "grpc.max_receive_message_length=100,grpc.primary_user_agent=a b,grpc.big=99999999999"
    config = ServeConfig(model_base_path="/m", grpc_channel_arguments=text)
    assert config.channel_arguments() == {
        "grpc.max_receive_message_length": 100,
        "grpc.primary_user_agent": "a b",
        "grpc.big": "99999999999",
    }
    with served(half_plus_two, grpc_channel_arguments=text) as running:
        assert running.predict.Predict(predict_request()).outputs["y"].float_val == [3.0]
        refused(
            running.predict.Predict,
            predict_request(inputs={"x": np.zeros(100, np.float32)}),
            Code.RESOURCE_EXHAUSTED,
            "",
        )


def test_session_settings_come_from_the_file_and_the_flags(tmp_path, half_plus_two):
    file = tmp_path / "session.config"
    file.write_text("intra_op_parallelism_threads: 3 allow_soft_placement: true")
    flags = {"model_base_path": "/m", "tensorflow_session_config_file": str(file)}
    settings = config_files.session_settings(ServeConfig(**flags))
    assert (settings.intra_op_parallelism_threads, settings.allow_soft_placement) == (3, True)
    flags |= {
        "tensorflow_session_parallelism": 1,
        "per_process_gpu_memory_fraction": 0.25,
        "mixed_precision": "bfloat16",
    }
    settings = config_files.session_settings(ServeConfig(**flags))
    assert (settings.intra_op_parallelism_threads, settings.inter_op_parallelism_threads) == (1, 1)
    assert settings.gpu_options.per_process_gpu_memory_fraction == 0.25
    assert settings.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 == 1  # on
    settings = config_files.session_settings(ServeConfig(**flags, tensorflow_inter_op_parallelism=2))
    assert (settings.intra_op_parallelism_threads, settings.inter_op_parallelism_threads) == (0, 2)
    del flags["model_base_path"]
    with served(half_plus_two, **flags) as running:
        assert running.server._session_settings.gpu_options.per_process_gpu_memory_fraction == 0.25
        assert running.predict.Predict(predict_request()).outputs["y"].float_val == [3.0]
    file.write_text("intra_op_parallelism_threads: many")
    with pytest.raises(UserError, match="Error parsing text-format tensorflow.ConfigProto"):
        Server(ServeConfig(model_base_path="/m", tensorflow_session_config_file=str(file)))


@pytest.mark.parametrize("kind", ["float32", "int64", "uint8", "bool", "half", "string"])
def test_replies_may_hold_packed_bytes(echo, kind):
    value = (
        np.array([[b"a", b"\xff"]], object)
        if kind == "string"
        else np.array([[0, 1]]).astype({"half": "f2"}.get(kind, kind))
    )
    with running_server(
        model_name="echo", model_base_path=str(echo), enable_serialization_as_tensor_content=True
    ) as running:
        reply = running.predict.Predict(predict_request("echo", f"echo_{kind}", {"x": value})).outputs["y"]
    assert bool(reply.tensor_content) == (kind != "string")
    np.testing.assert_array_equal(tf.make_ndarray(reply), value)


def test_method_names_are_checked_on_request(half_plus_two):
    with served(half_plus_two, enable_signature_method_name_check=True) as running:
        assert running.predict.Predict(predict_request()).outputs["y"].float_val == [3.0]
        reply = running.rest.post(
            "/v1/models/half_plus_two:classify", json={"signature_name": "classify_x_to_y", "examples": [{"x": 1.0}]}
        )
    assert reply.status_code == 400
    assert reply.json()["error"].startswith(
        "Expected classification signature method_name to be tensorflow/serving/classify. Was: "
        "tensorflow/serving/predict."
    )


@pytest.mark.parametrize(("flags", "runs"), [({}, 1), ({"num_request_iterations_for_warmup": 3}, 3)])
def test_warm_up_requests_are_repeated(half_plus_two, tmp_path, monkeypatch, flags, runs):
    save_half_plus_two(tmp_path / "1")
    log = warmup.predict_log("m", "serving_default", {"x": np.float32([1.0])})
    multi = warmup.prediction_log_pb2.PredictionLog()
    request = multi.multi_inference_log.request
    task = request.tasks.add(method_name="tensorflow/serving/regress")
    task.model_spec.signature_name = "regress_x_to_y"
    request.input.example_list.examples.add().features.feature["x"].float_list.value.append(2.0)
    warmup.write_warmup(tmp_path / "1", [log, multi])
    ran = []
    for name in ("predict", "regress"):
        function = getattr(warmup.inference, name)
        monkeypatch.setattr(warmup.inference, name, lambda *a, f=function, n=name, **k: (ran.append(n), f(*a, **k))[1])
    with served(tmp_path, **flags):
        assert ran == runs * ["predict"] + runs * ["regress"]


# -- loading again, and in parallel


class FakeModel:
    """A model of which only loading and closing count."""

    def __init__(self, path):
        self.path = path
        self.closed_in = None

    def close(self):
        self.closed_in = threading.current_thread().name


def fake_version(base, number):
    (base / str(number)).mkdir(parents=True)
    (base / str(number) / "saved_model.pb").touch()


class FailingLoad:
    """A `load` that fails a number of times, and keeps the time of each call."""

    def __init__(self, failures):
        self.failures = failures
        self.times = []

    def __call__(self, path):
        self.times.append(time.monotonic())
        if len(self.times) <= self.failures:
            raise invalid("the disk is away")
        return FakeModel(path)


def manager_of(load, **options):
    return ModelManager(load, warm_up=0, **options)


@pytest.mark.parametrize("poll_seconds", [0, 0.02, 600])
def test_version_is_loaded_again_after_a_failure(tmp_path, caplog, poll_seconds):
    fake_version(tmp_path, 1)
    load = FailingLoad(2)
    manager = manager_of(load, poll_seconds=poll_seconds, load_retries=2, retry_seconds=0.3)
    manager.configure([ModelSettings(name="m", base_path=tmp_path)])
    assert manager.states("m") == [(1, "LOADING", None)]
    assert manager.failures() == []
    assert 0 < manager.seconds_to_retry() <= 0.3
    manager.start_polling()
    until(manager.ready)
    manager.stop()
    assert len(load.times) == 3
    assert all(later - earlier >= 0.3 for earlier, later in itertools.pairwise(load.times))
    assert "Model m version 1 cannot be loaded (try 1 of 3), next try in 0.3 s: INVALID_ARGUMENT: the" in caplog.text


def test_version_is_given_up_after_the_last_try(tmp_path):
    fake_version(tmp_path, 1)
    load = FailingLoad(100)
    manager = manager_of(load, poll_seconds=0.01, load_retries=2, retry_seconds=-1)
    manager.configure([ModelSettings(name="m", base_path=tmp_path)])
    manager.start_polling()
    until(lambda: manager.failures())
    time.sleep(0.1)
    assert len(load.times) == 3
    (tmp_path / "1" / "new").touch()  # when the files change, all tries start again
    until(lambda: len(load.times) == 6)
    manager.stop()


def test_version_that_is_withdrawn_is_not_tried_again(tmp_path):
    fake_version(tmp_path, 1)
    load = FailingLoad(100)
    manager = manager_of(load, poll_seconds=0.01, load_retries=5, retry_seconds=0.1)
    manager.configure([ModelSettings(name="m", base_path=tmp_path)])
    (tmp_path / "1").rename(tmp_path / "1.withdrawn")
    manager.start_polling()
    until(lambda: manager.states("m")[0][1] == "END")
    time.sleep(0.2)
    manager.stop()
    assert len(load.times) == 1


@pytest.mark.parametrize("poll_seconds", [0.0, 600.0])
def test_server_starts_once_its_model_can_be_loaded(half_plus_two, monkeypatch, poll_seconds):
    real, calls = Server._load, []

    def load(self, path):
        calls.append(path)
        if len(calls) < 3:
            raise invalid("the disk is away")
        return real(self, path)

    monkeypatch.setattr(Server, "_load", load)
    flags = {"max_num_load_retries": 5, "load_retry_interval_micros": 10_000}
    with served(half_plus_two, file_system_poll_wait_seconds=poll_seconds, **flags) as running:
        assert running.predict.Predict(predict_request()).outputs["y"].float_val == [3.0]
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(UserError, match="did not become available"), served(half_plus_two, max_num_load_retries=0):
        pass


@pytest.mark.parametrize("load_threads", [0, 2])
def test_versions_are_loaded_at_the_same_time(tmp_path, load_threads):
    for name in ("a", "b"):
        fake_version(tmp_path / name, 1)
    loading, most = [], []

    def load(path):
        loading.append(path)
        time.sleep(0.2)
        most.append(len(loading))
        loading.remove(path)
        return FakeModel(path)

    manager = manager_of(load, load_threads=load_threads)
    manager.configure([ModelSettings(name=name, base_path=tmp_path / name) for name in ("a", "b")])
    assert manager.ready()
    assert max(most) == max(1, load_threads)
    manager.stop()


@pytest.mark.parametrize(("unload_threads", "name"), [(0, "MainThread"), (1, "unloader_0")])
def test_threads_free_unloaded_versions(tmp_path, unload_threads, name):
    fake_version(tmp_path, 1)
    manager = manager_of(FakeModel, unload_threads=unload_threads)
    manager.configure([ModelSettings(name="m", base_path=tmp_path)])
    with manager.lease("m") as (_, model):
        manager.configure([])
        assert model.closed_in is None
    manager.stop()
    assert model.closed_in == name


# -- health


def health_stub(running, channel):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    return health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse


@pytest.mark.parametrize("service", ["", "ModelService", "PredictionService"])
def test_health_service_checks_and_watches(half_plus_two, service):
    pytest.importorskip("grpc_health")
    with (
        served(half_plus_two, enable_grpc_healthcheck_service=True) as running,
        grpc.insecure_channel(running.target) as channel,
    ):
        stub, request, response = health_stub(running, channel)
        assert stub.Check(request(service=service), timeout=LIMIT).status == response.SERVING
        watch = stub.Watch(request(service=service), timeout=LIMIT)
        assert next(watch).status == response.SERVING
        start = time.monotonic()
        running.server.stop()
        assert [reply.status for reply in watch] == [response.NOT_SERVING]
        assert time.monotonic() - start < 10  # an open stream does not hold the server up


def test_health_service_does_not_know_other_names(half_plus_two):
    pytest.importorskip("grpc_health")
    with (
        served(half_plus_two, enable_grpc_healthcheck_service=True) as running,
        grpc.insecure_channel(running.target) as channel,
    ):
        stub, request, response = health_stub(running, channel)
        refused(stub.Check, request(service="half_plus_two"), Code.NOT_FOUND, "")
        watch = stub.Watch(request(service="half_plus_two"), timeout=LIMIT)
        assert next(watch).status == response.SERVICE_UNKNOWN
        watch.cancel()


def test_health_service_is_off_by_default(half_plus_two):
    pytest.importorskip("grpc_health")
    with served(half_plus_two) as running, grpc.insecure_channel(running.target) as channel:
        stub, request, _ = health_stub(running, channel)
        refused(stub.Check, request(), Code.UNIMPLEMENTED, "")


def test_health_service_names_its_package(half_plus_two, monkeypatch):
    monkeypatch.setitem(sys.modules, "grpc_health.v1", None)
    monkeypatch.delitem(sys.modules, "robust_tf.serving.server.health", raising=False)
    with (
        pytest.raises(
            UserError, match=r"--enable_grpc_healthcheck_service needs another package: pip install 'robust_tf"
        ),
        served(half_plus_two, enable_grpc_healthcheck_service=True),
    ):
        pass


# -- batching of single models


def test_versions_bring_their_own_batching(tmp_path, half_plus_two):
    for number in (1, 2):
        save_half_plus_two(tmp_path / "m" / str(number))
    (tmp_path / "m" / "1" / "batching_params.pbtxt").write_text(
        "max_batch_size { value: 4 } num_batch_threads { value: 7 }"
    )
    (tmp_path / "models.config").write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{tmp_path / "m"}" model_platform: "tensorflow" '
        "model_version_policy { all {} } } }"
    )
    (tmp_path / "batching.config").write_text("max_batch_size { value: 2 } num_batch_threads { value: 3 }")
    flags = {
        "model_config_file": str(tmp_path / "models.config"),
        "enable_batching": True,
        "batching_parameters_file": str(tmp_path / "batching.config"),
    }

    def status(running, version, rows):
        path = f"/v1/models/m/versions/{version}:predict"
        return running.rest.post(path, json={"instances": rows * [1.0]}).status_code

    with running_server(**flags) as running:
        assert [status(running, version, 3) for version in (1, 2)] == [400, 400]
    with running_server(**flags, enable_per_model_batching_parameters=True) as running:
        assert [status(running, 1, rows) for rows in (4, 5)] == [200, 400]
        assert status(running, 2, 100) == 200  # not batched
        with running.server._manager.lease("m", version=1) as (_, model):
            assert isinstance(model, BatchedModel)
            assert model._batching.num_batch_threads == 3  # threads are a matter of the server


def test_bad_batching_of_a_version_is_refused(tmp_path):
    save_half_plus_two(tmp_path / "1")
    (tmp_path / "1" / "batching_params.pbtxt").write_text("max_batch_size { value: 0 }")
    flags = {"enable_batching": True, "enable_per_model_batching_parameters": True}
    report = check(ServeConfig(model_base_path=str(tmp_path), **flags))
    assert report.failed
    assert "max_batch_size to be at least 1. Received: 0" in report.lines[-1]
    with pytest.raises(UserError, match="max_batch_size to be at least 1. Received: 0"), served(tmp_path, **flags):
        pass
    with served(tmp_path, enable_batching=True):
        pass
