"""Tests of changing versions, configuration, labels, batching and shutdown."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import model_management_pb2, predict_pb2, prediction_service_pb2_grpc

from robust_tf.errors import UserError
from robust_tf.serving.model import folders
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.server.config_files import Batching, read_batching, read_tls
from robust_tf.serving.server.model_settings import ModelSettings
from robust_tf.serving.server.serve_config import ServeConfig
from robust_tf.serving.server.server import Server
from robust_tf.serving.server.versions import ModelManager
from tests.serving.conftest import LIMIT, Gate, accepts_connections, free_port, running_server, until
from tests.serving.models import model_entry, save_gate, save_half_plus_two

FAST = {"file_system_poll_wait_seconds": 0.1}


def answer(running, name="m", path=""):
    reply = running.rest.post(f"/v1/models/{name}{path}:predict", json={"instances": [2.0]})
    return reply.json().get("predictions", reply.status_code)


def states(running, name="m"):
    reply = running.rest.get(f"/v1/models/{name}")
    entries = reply.json().get("model_version_status", [])
    return {int(entry["version"]): entry["state"] for entry in entries}


def ask_grpc(channel, strings=()):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    for name, value in {"x": np.float32([2.0]), **dict(strings)}.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    reply = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=LIMIT)
    return list(reply.outputs["y"].float_val)


@pytest.fixture
def base(tmp_path):
    save_half_plus_two(tmp_path / "m" / "1")
    return tmp_path / "m"


def add_version(base, number, addend):
    save_half_plus_two(base / f".new-{number}", addend=addend)
    (base / f".new-{number}").rename(base / str(number))


def test_versions_come_and_go(base):
    with running_server(model_name="m", model_base_path=str(base), **FAST) as running:
        assert answer(running) == [3.0]
        add_version(base, 20170111173521, 10.0)
        until(lambda: answer(running) == [11.0])
        until(lambda: states(running) == {20170111173521: "AVAILABLE", 1: "END"})
        assert answer(running, path="/versions/1") == 404
        (base / "20170111173521").rename(base / "20170111173521.denied")
        until(lambda: answer(running) == [3.0])
        (base / "1").rename(base / "1.denied")
        until(lambda: answer(running) == 404)
        assert running.rest.get("/healthz").status_code == 503


def test_request_keeps_its_version_loaded(tmp_path):
    save_gate(tmp_path / "m" / "1")
    gate = Gate(tmp_path)
    with running_server(model_name="m", model_base_path=str(tmp_path / "m"), **FAST) as running:
        with ThreadPoolExecutor(1) as threads:
            body = {"inputs": {"x": [1.0], **gate.inputs}}
            held = threads.submit(running.rest.post, "/v1/models/m:predict", json=body)
            gate.wait_until_entered()
            try:
                (tmp_path / "m" / "1").rename(tmp_path / "m" / "1.withdrawn")
                until(lambda: states(running) == {1: "UNLOADING"})
                assert answer(running) == 404
                assert not held.done()
            finally:
                gate.open()
            assert held.result().json() == {"outputs": [1.0]}
        until(lambda: states(running) == {1: "END"})


def test_version_that_replaces_another_during_a_scan_leaves_no_gap(tmp_path, monkeypatch):
    """The folder's listing shows only the old version, which is gone by the time its entry is examined."""
    save_half_plus_two(tmp_path / "1")
    manager = ModelManager(LoadedModel, poll_seconds=0)
    manager.configure([ModelSettings(name="m", base_path=tmp_path)])

    def slow_look(base):
        monkeypatch.undo()
        seen = folders.version_folders(base)
        save_half_plus_two(tmp_path / "2")
        shutil.move(tmp_path / "1", tmp_path / "1.withdrawn")
        return seen

    monkeypatch.setattr(folders, "version_folders", slow_look)
    unloaded = []
    close_unused = manager._close_unused

    def note_and_close(leaving):
        unloaded.append(manager.ready())
        close_unused(leaving)

    manager._close_unused = note_and_close  # without monkeypatch, because `slow_look` undoes its patches
    manager._update()
    assert [number for number, state, _ in manager.states("m") if state == "AVAILABLE"] == [2]
    assert unloaded == [True]  # when version 1 was unloaded, version 2 was already available
    manager.stop()


def test_version_is_loaded_only_when_it_is_copied_completely(base):
    add_version(base, 2, 10.0)
    whole = base.parent / "whole"
    (base / "2").rename(whole)
    with running_server(model_name="m", model_base_path=str(base), **FAST) as running:
        (base / "2" / "variables").mkdir(parents=True)
        (base / "2" / "saved_model.pb").write_bytes((whole / "saved_model.pb").read_bytes()[:100])
        until(lambda: states(running).get(2) == "END")
        assert answer(running) == [3.0]
        shutil.copytree(whole, base / "2", dirs_exist_ok=True)
        until(lambda: answer(running) == [11.0])


def test_server_follows_changes_of_models_policies_and_labels(base, tmp_path):
    for number, addend in [(2, 10.0), (3, 20.0)]:
        add_version(base, number, addend)
    path = tmp_path / "models.config"

    def configure(more, name="m"):
        (tmp_path / "new.config").write_text("model_config_list {" + model_entry(name, base, more) + "}")
        (tmp_path / "new.config").rename(path)  # the server never reads half a file

    configure('model_version_policy { specific { versions: 1 versions: 2 } } version_labels { key: "a" value: 1 }')
    flags = {"model_config_file": str(path), "model_config_file_poll_wait_seconds": 0.1, **FAST}
    with running_server(**flags) as running:
        assert states(running) == {1: "AVAILABLE", 2: "AVAILABLE"}
        assert (answer(running), answer(running, path="/labels/a")) == ([11.0], [3.0])
        configure('model_version_policy { all {} } version_labels { key: "a" value: 3 }')
        until(lambda: answer(running, path="/labels/a") == [21.0])
        assert answer(running, path="/versions/1") == [3.0]
        configure('model_version_policy { latest { num_versions: 2 } } version_labels { key: "a" value: 7 }')
        until(lambda: states(running)[1] == "END")
        assert answer(running, path="/labels/a") == [21.0]  # a label never moves to a version that isn't there
        path.write_text("")  # as if somebody were just writing it: nothing changes
        configure('version_labels { key: "b" value: 4 }')
        add_version(base, 4, 30.0)
        until(lambda: answer(running, path="/labels/b") == [31.0])  # the server tries again until the version is there
        configure("", name="other")
        until(lambda: answer(running, "other") == [31.0])
        assert answer(running, "m") == 404


def test_grpc_reloads_the_configuration(base, half_plus_two):
    with running_server(model_name="m", model_base_path=str(base), **FAST) as running:
        request = model_management_pb2.ReloadConfigRequest()
        models = request.config.model_config_list.config
        models.add(name="n", base_path=str(half_plus_two), model_platform="tensorflow")
        models[0].version_labels["old"] = 5
        status = running.models.HandleReloadConfigRequest(request).status
        assert status.error_code == 9
        assert "version 5 of model n, which is not currently available for inference" in status.error_message
        models[0].version_labels["old"] = 123
        assert running.models.HandleReloadConfigRequest(request).status.error_code == 0
        assert (answer(running, "n", "/labels/old"), answer(running, "m")) == ([3.0], 404)
        models[0].base_path = str(base)  # the same name with another folder
        models[0].version_labels["old"] = 1
        assert running.models.HandleReloadConfigRequest(request).status.error_code == 0
        assert states(running, "n") == {1: "AVAILABLE"}


def test_labels_before_their_versions_need_a_flag(base, tmp_path):
    path = tmp_path / "models.config"
    path.write_text("model_config_list {" + model_entry("m", base, 'version_labels { key: "a" value: 9 }') + "}")
    with (
        pytest.raises(UserError, match="version 9 of model m, which is not currently available"),
        running_server(model_config_file=str(path)),
    ):
        pass
    allowed = {"allow_version_labels_for_unavailable_models": True}
    with running_server(model_config_file=str(path), **allowed) as running:
        assert answer(running, path="/labels/a") == 404


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_config_list { nonsense }", "Error parsing text-format tensorflow.serving.ModelServerConfig"),
        (model_entry("m", "/a").join(["model_config_list {", model_entry("m", "/b") + "}"]), "model m multiple times"),
        ("model_config_list {" + model_entry("m", "a/b") + "}", "absolute path or URI; got base_path()=a/b"),
        ('model_config_list { config { name: "m" base_path: "/a" model_platform: "torch" } }', "Received: 'torch'"),
        ('model_config_list { config { base_path: "/a" } }', "Received: base_path: '/a'"),
        ("", "Received: an empty file"),
        ("model_config_list {" + model_entry("m", "/a", "model_version_policy { specific {} }") + "}", "no version"),
    ],
)
def test_bad_model_config_is_refused(tmp_path, text, message):
    path = tmp_path / "models.config"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        Server(ServeConfig(model_config_file=str(path)))
    assert message in str(raised.value)


def test_version_that_cannot_be_loaded_stops_the_start(base):
    (base / "1" / "saved_model.pb").write_bytes(b"broken")
    with (
        pytest.raises(UserError, match=r"1 servable\(s\) did not become available: m version 1"),
        running_server(model_name="m", model_base_path=str(base)),
    ):
        pass


def test_version_with_a_bad_warm_up_is_refused(base, tmp_path):
    (base / "1" / "assets.extra").mkdir()
    (base / "1" / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"no records at all, not a single one")
    with (
        pytest.raises(UserError, match="Cannot read the warm-up file"),
        running_server(model_name="m", model_base_path=str(base)),
    ):
        pass
    with running_server(model_name="m", model_base_path=str(base), enable_model_warmup=False) as running:
        assert answer(running) == [3.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--model_base_path or --model_config_file is needed"),
        (
            {"model_base_path": "/m", "batching_parameters_file": "b.config"},
            "--batching_parameters_file=b.config alone",
        ),
        ({"model_base_path": "/m", "port": 0, "rest_api_port": 0}, "--port=0 --rest_api_port=0"),
        ({"model_base_path": "/m", "port": 70000}, "70000"),
        ({"model_base_path": "/m", "max_request_bytes": 0}, "--max_request_bytes must be at least 1. Received: 0"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UserError) as raised:
        ServeConfig(**flags)
    assert message in str(raised.value)


def test_message_names_the_taken_port(base):
    with running_server(model_name="m", model_base_path=str(base)) as running:
        taken = running.rest_port
        with (
            pytest.raises(UserError, match=f"--rest_api_port={taken}"),
            running_server(model_name="m", model_base_path=str(base), rest_api_port=taken),
        ):
            pass
        taken = int(running.target.rsplit(":", 1)[1])
        with (
            pytest.raises(UserError, match=f"--port={taken}"),
            running_server(model_name="m", model_base_path=str(base), port=taken),
        ):
            pass


def test_grpc_answers_on_a_unix_socket(base, tmp_path):
    socket_path = tmp_path / "s.sock"
    with (
        running_server(model_name="m", model_base_path=str(base), grpc_socket_path=str(socket_path)),
        grpc.insecure_channel(f"unix:{socket_path}") as channel,
    ):
        assert ask_grpc(channel) == [3.0]


# -- batching


def test_batching_file_is_read(tmp_path):
    path = tmp_path / "batching.config"
    path.write_text(
        "max_batch_size { value: 8 } batch_timeout_micros { value: 500 } max_enqueued_batches { value: 3 }\n"
        "num_batch_threads { value: 2 } allowed_batch_sizes: 4 allowed_batch_sizes: 8"
    )
    assert read_batching(path) == Batching(
        max_batch_size=8,
        batch_timeout_micros=500,
        max_enqueued_batches=3,
        num_batch_threads=2,
        allowed_batch_sizes=(4, 8),
    )
    large = "max_batch_size { value: 8 } enable_large_batch_splitting { value: true } "
    path.write_text(large + "max_execution_batch_size { value: 3 } pad_variable_length_inputs: false")
    assert read_batching(path).execution_sizes() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size { value: 8 } allowed_batch_sizes: 4", "[4] with max_batch_size=8"),
        ("max_batch_size { value: 0 }", "max_batch_size to be at least 1. Received: 0"),
        ("max_execution_batch_size { value: 4 }", "needs enable_large_batch_splitting"),
        ("enable_large_batch_splitting { value: true } max_execution_batch_size { value: 2000 }", "2000 with"),
        (
            "enable_large_batch_splitting { value: true } max_execution_batch_size { value: 4 } allowed_batch_sizes: 8",
            "[8] with max_execution_batch_size=4",
        ),
        ("pad_variable_length_inputs: true", "is not supported"),
    ],
)
def test_bad_batching_file_is_refused(tmp_path, text, message):
    path = tmp_path / "batching.config"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_batching(path)
    assert message in str(raised.value)


def test_large_request_may_be_split(half_plus_two, monkeypatch, tmp_path):
    path = tmp_path / "batching.config"
    path.write_text(
        "max_batch_size { value: 8 } enable_large_batch_splitting { value: true } max_execution_batch_size { value: 3 }"
    )
    sizes = []
    run = LoadedModel.run

    def counting(self, signature_name, inputs, *args, **kwargs):
        sizes.append(len(inputs["x"]))
        return run(self, signature_name, inputs, *args, **kwargs)

    monkeypatch.setattr(LoadedModel, "run", counting)
    flags = {"enable_batching": True, "batching_parameters_file": str(path)}
    with running_server(model_name="m", model_base_path=str(half_plus_two), **flags) as running:
        reply = running.rest.post("/v1/models/m:predict", json={"instances": [2.0 * n for n in range(8)]})
        assert reply.json() == {"predictions": [2.0 + n for n in range(8)]}
        assert sorted(sizes) == [2, 3, 3]
        assert running.rest.post("/v1/models/m:predict", json={"instances": 9 * [1.0]}).status_code == 400


def test_batch_that_runs_too_long_times_out(echo):
    flags = {"enable_batching": True, "rest_api_timeout_in_ms": 500}
    with running_server(model_name="m", model_base_path=str(echo), **flags) as running:
        reply = running.rest.post("/v1/models/m:predict", json={"signature_name": "endless", "instances": [1.0]})
    assert reply.status_code == 504


def test_requests_share_batches_and_get_their_own_answers(exported, monkeypatch, tmp_path):
    sizes = []
    run = LoadedModel.run

    def counting(self, signature_name, inputs, *args, **kwargs):
        sizes.append(len(next(iter(inputs.values()))))
        return run(self, signature_name, inputs, *args, **kwargs)

    path = tmp_path / "batching.config"
    path.write_text(
        f"max_batch_size {{ value: 4 }} batch_timeout_micros {{ value: {LIMIT * 1_000_000} }} "
        "max_enqueued_batches { value: 100 }"
    )
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    # With this timeout, only full batches run, however slow the machine is. A warm-up request would wait for others.
    flags = {"enable_batching": True, "batching_parameters_file": str(path), "enable_model_warmup": False}
    with running_server(model_name="digits", model_base_path=str(exported.parent), **flags) as running:
        monkeypatch.setattr(LoadedModel, "run", counting)

        def ask(index):
            body = {"signature_name": "predict_uint8", "instances": images[index : index + 1].tolist()}
            return running.rest.post("/v1/models/digits:predict", json=body).json()["predictions"][0]["logits"]

        with ThreadPoolExecutor(16) as threads:
            together = np.array(list(threads.map(ask, range(16))))
        assert sizes == [4, 4, 4, 4]
        expected = run(LoadedModel(exported), "predict_uint8", {"images": images})["logits"]
        np.testing.assert_allclose(together, expected, atol=1e-4)

        too_many = {"signature_name": "predict_uint8", "instances": images[:5].tolist()}
        reply = running.rest.post("/v1/models/digits:predict", json=too_many)
        assert reply.status_code == 400
        assert "Task size 5 is larger than maximum input batch size 4" in reply.json()["error"]

        # Broken images in batches with good ones: only the broken ones fail.
        def ask_bytes(index):
            good = {"b64": _png(images[index])}
            body = {"instances": [{"b64": "bm8gaW1hZ2U="} if index % 8 == 0 else good]}
            return running.rest.post("/v1/models/digits:predict", json=body).status_code

        with ThreadPoolExecutor(16) as threads:
            codes = list(threads.map(ask_bytes, range(16)))
        assert codes == [400 if index % 8 == 0 else 200 for index in range(16)]


def _png(image):
    import base64

    import tensorflow as tf

    return base64.b64encode(tf.io.encode_png(image).numpy()).decode()


def test_scalars_cannot_be_batched(half_plus_two):
    with running_server(model_name="m", model_base_path=str(half_plus_two), enable_batching=True) as running:
        assert answer(running) == [3.0]
        reply = running.rest.post("/v1/models/m:predict", json={"inputs": 2.0})
        assert (reply.status_code, "at least one dimension" in reply.json()["error"]) == (400, True)
        reply = running.rest.post("/v1/models/m:predict", json={"inputs": [[], []]})
        assert reply.json() == {"outputs": [[], []]}
        reply = running.rest.post("/v1/models/m:predict", json={"inputs": []})
        assert reply.json() == {"outputs": []}


def test_tls_file_needs_keys_and_certificates(tmp_path):
    path = tmp_path / "ssl.config"
    path.write_text('server_key: "k"')
    with pytest.raises(UserError, match="ssl.config without them"):
        read_tls(path)
    path.write_text('server_key: "k" server_cert: "c" client_verify: true')
    with pytest.raises(UserError, match="client_verify needs a custom_ca"):
        read_tls(path)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_server_answers_on_an_ipv6_address(base):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("needs IPv6 on the loopback")
    with running_server(model_name="m", model_base_path=str(base), bind_address="::1") as running:
        target = running.target.replace("127.0.0.1", "[::1]")
        with grpc.insecure_channel(target) as channel:
            assert ask_grpc(channel) == [3.0]
        url = running.url.replace("127.0.0.1", "[::1]")
        assert httpx.get(f"{url}/healthz", timeout=LIMIT).status_code == 200


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_grpc_answers_over_tls_only(base, tmp_path):
    key, certificate = tmp_path / "server.key", tmp_path / "server.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    path = tmp_path / "ssl.config"
    parts = {"server_key": key.read_text(), "server_cert": certificate.read_text()}
    path.write_text("\n".join(f"{name}: {json.dumps(text)}" for name, text in parts.items()))
    with running_server(model_name="m", model_base_path=str(base), ssl_config_file=str(path)) as running:
        target = running.target.replace("127.0.0.1", "localhost")
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(target, credentials) as channel:
            assert ask_grpc(channel) == [3.0]
        with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as raised:
            ask_grpc(channel)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE


def test_pages_of_other_origins_are_allowed_by_a_flag(base):
    for allowed in (False, True):
        flags = {"rest_api_enable_cors_support": allowed}
        with running_server(model_name="m", model_base_path=str(base), **flags) as running:
            headers = running.rest.get("/v1/models/m").headers
            assert headers.get("access-control-allow-origin") == ("*" if allowed else None)


# -- the program


def test_accepted_requests_finish_after_sigterm(tmp_path):
    save_gate(tmp_path / "m" / "1")
    rest_port, port = free_port(), free_port()
    command = [sys.executable, "-m", "robust_tf.serve", f"--port={port}", f"--rest_api_port={rest_port}"]
    command += ["--model_name=m", f"--model_base_path={tmp_path / 'm'}"]
    # Each held request occupies one of TensorFlow's threads, of which there are as many as cores by default.
    command += ["--tensorflow_inter_op_parallelism=8"]
    command += [f"--rest_api_timeout_in_ms={LIMIT * 1000}", f"--shutdown_grace_seconds={LIMIT}"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, stderr=log, stdout=subprocess.PIPE, text=True)
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    client = httpx.Client(base_url=f"http://127.0.0.1:{rest_port}", timeout=LIMIT)
    gates = [Gate(tmp_path) for _ in range(4)]
    try:
        assert process.stdout.readline() == f"Ready: http://127.0.0.1:{rest_port}/ grpc://127.0.0.1:{port}\n"
        assert client.get("/healthz").status_code == 200
        with ThreadPoolExecutor(4) as threads:
            held = [
                *(
                    threads.submit(client.post, "/v1/models/m:predict", json={"inputs": {"x": [2.0], **gate.inputs}})
                    for gate in gates[:2]
                ),
                *(threads.submit(ask_grpc, channel, gate.inputs) for gate in gates[2:]),
            ]
            try:
                for gate in gates:
                    gate.wait_until_entered()
                process.send_signal(signal.SIGTERM)
                until(lambda: not accepts_connections(rest_port) and not accepts_connections(port))
                assert not any(reply.done() for reply in held)
                for gate in gates:
                    gate.open()
            except BaseException:
                process.kill()  # otherwise the threads would wait for their answers forever
                raise
            assert [reply.result().json() for reply in held[:2]] == [{"outputs": [2.0]}] * 2
            assert [reply.result() for reply in held[2:]] == [[2.0]] * 2
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        client.close()
        channel.close()
        log.close()


def test_requests_that_outlast_the_grace_period_are_cancelled(echo):
    running = running_server(model_name="echo", model_base_path=str(echo), shutdown_grace_seconds=1)
    with ThreadPoolExecutor(1) as threads:
        with running as server:
            request = predict_pb2.PredictRequest()
            request.model_spec.name, request.model_spec.signature_name = "echo", "endless"
            request.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0]))
            held = threads.submit(server.predict.Predict, request)
            (version,) = server.server._manager._versions["echo"].values()
            until(lambda: version.in_flight == 1)
            server.server.stop()
            with pytest.raises(grpc.RpcError):
                held.result()
        until(lambda: version.in_flight == 0)


def test_mistyped_flag_of_the_program_is_named(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "robust_tf.serve", "--model_base_pth=/m"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert result.returncode == 2
    assert "model_base_pth" in result.stderr
    assert "model_base_path" in result.stderr
