"""Tests of the start of the server: its ports, what it says while it waits, and the flags of TensorFlow Serving."""

import contextlib
import logging
import pathlib
import socket
import threading

import httpx
import pytest
import yaml

from robust_tf.errors import UserError
from robust_tf.flags import parse_flags
from robust_tf.serving.model.session import LoadedModel
from robust_tf.serving.server import versions
from robust_tf.serving.server.serve_config import ServeConfig
from robust_tf.serving.server.server import Server
from tests.serving.conftest import LIMIT, free_port, running_server, until
from tests.serving.models import model_entry, save_half_plus_two

SERVING = pathlib.Path(__file__).parents[2] / "serving"


@contextlib.contextmanager
def starting(**flags):
    """Starts a server in a thread, as it may wait forever, and yields the server and a list of its errors."""
    server, errors = Server(ServeConfig(**{"port": 0, "rest_api_port": free_port(), **flags})), []

    def start():
        try:
            server.start()
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    try:
        yield server, errors
    finally:
        server.ask_to_stop()
        thread.join(LIMIT)
        server.stop()


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LoadedModel, "__init__", refuse)


@pytest.mark.parametrize("flag_name", ["port", "rest_api_port"])
def test_taken_port_is_reported_before_a_model_is_loaded(half_plus_two, nothing_is_loaded, flag_name):
    with socket.create_server(("127.0.0.1", free_port())) as other:
        taken = other.getsockname()[1]
        flags = {"port": free_port(), "rest_api_port": free_port(), flag_name: taken}
        with pytest.raises(UserError, match=f"--{flag_name}={taken} on 127.0.0.1.* Choose another one, for example"):
            Server(ServeConfig(model_base_path=str(half_plus_two), **flags))
    # The server has released the other port.
    for port in (flags["port"], flags["rest_api_port"]):
        socket.create_server(("127.0.0.1", port)).close()


def test_grpc_and_rest_need_different_ports():
    with pytest.raises(UserError, match="need different ports. Received: --port=8501 --rest_api_port=8501"):
        ServeConfig(model_base_path="/m", port=8501, rest_api_port=8501)


def test_port_opens_when_the_model_is_loaded(tmp_path):
    port = free_port()
    flags = {"model_name": "m", "model_base_path": str(tmp_path), "file_system_poll_wait_seconds": 0.05}
    with starting(rest_api_port=port, **flags) as (server, errors):
        until(lambda: server._manager._warned)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        save_half_plus_two(tmp_path / ".new")
        (tmp_path / ".new").rename(tmp_path / "1")
        until(lambda: errors or _healthy(port))
        assert errors == []


def _healthy(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=LIMIT).status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("m", "'v1' holds a SavedModel, but a version is a folder whose name is a number"),
        ("missing", "This folder does not exist, only"),
    ],
)
def test_waiting_server_says_why(tmp_path, caplog, monkeypatch, name, said):
    (tmp_path / "m" / "v1").mkdir(parents=True)
    (tmp_path / "m" / "v1" / "saved_model.pb").touch()
    base = tmp_path / name
    flags = {"model_name": "pets", "model_base_path": str(base), "file_system_poll_wait_seconds": 0.01}
    looks = []
    complete = versions.complete_versions
    monkeypatch.setattr(versions, "complete_versions", lambda path: (looks.append(path), complete(path))[1])

    def warnings():
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    with starting(**flags) as (_, errors):
        until(lambda: len(looks) > 20 or errors)
        assert errors == []
        (warning,) = warnings()  # once at the start, not at each look
        assert warning.startswith(f"No version of model pets to serve under {base}. ")
        assert said in warning
        monkeypatch.setattr(versions, "_SECONDS_BETWEEN_WARNINGS", 0.0)
        until(lambda: len(warnings()) > 2)
        assert set(warnings()) == {warning}


@pytest.mark.parametrize("name", ["m/1", "m/v1", "file.keras"])
@pytest.mark.parametrize("by_config_file", [False, True])
def test_server_gives_up_where_no_version_can_appear(tmp_path, name, by_config_file):
    for version in ("1", "v1"):
        (tmp_path / "m" / version).mkdir(parents=True)
        (tmp_path / "m" / version / "saved_model.pb").touch()
    (tmp_path / "file.keras").touch()
    flags = {"model_base_path": str(tmp_path / name)}
    if by_config_file:
        text = "model_config_list {" + model_entry("default", tmp_path / name) + "}"
        (tmp_path / "models.config").write_text(text)
        flags = {"model_config_file": str(tmp_path / "models.config")}
    with starting(**flags) as (_, errors):
        until(lambda: errors)
    assert errors[0].startswith("Model default has no version to serve, and none can appear. Received: ")
    assert str(tmp_path / name) in errors[0]
    assert "\n" not in errors[0]


def test_remote_path_in_the_config_file_is_refused(tmp_path):
    text = "model_config_list {" + model_entry("pets", "gs://bucket/pets") + "}"
    (tmp_path / "models.config").write_text(text)
    with pytest.raises(UserError, match="base_path of model pets: gs://bucket/pets. Copy the model"):
        Server(ServeConfig(model_config_file=str(tmp_path / "models.config")))


def test_policy_that_asks_for_missing_versions_is_explained(half_plus_two, tmp_path, caplog):
    entry = model_entry("m", half_plus_two, "model_version_policy { specific { versions: 7 } }")
    (tmp_path / "models.config").write_text("model_config_list {" + entry + "}")
    with starting(model_config_file=str(tmp_path / "models.config")):
        until(lambda: caplog.records)
    assert "} asks for versions that are not there. Received: versions 123." in caplog.text


def test_label_that_will_lose_its_version_is_a_warning(half_plus_two, tmp_path, caplog):
    path = tmp_path / "models.config"

    def configure(more):
        (tmp_path / "new").write_text("model_config_list {" + model_entry("m", half_plus_two, more) + "}")
        (tmp_path / "new").rename(path)

    configure('model_version_policy { specific { versions: 123 } } version_labels { key: "a" value: 123 }')
    with running_server(model_config_file=str(path), model_config_file_poll_wait_seconds=0.05):
        assert "label" not in caplog.text
        configure('model_version_policy { latest { num_versions: 1 } } version_labels { key: "a" value: 123 }')
        said = (
            "Model m: label a points to version 123, which the policy latest {num_versions: 1} will unload at the next "
            "export. Keep it with model_version_policy { specific { versions: 123 } }."
        )
        until(lambda: said in caplog.text)


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes/deployment.yaml"])
def test_command_lines_of_the_deployment_are_accepted(name):
    document = yaml.safe_load((SERVING / name).read_text())
    if "services" in document:
        flags = document["services"]["tensorflow-serving"]["command"]
    else:
        flags = document["spec"]["template"]["spec"]["containers"][0]["args"]
    config, rest = parse_flags(ServeConfig, ["serve", *flags])
    assert rest == []
    assert config.enable_batching
