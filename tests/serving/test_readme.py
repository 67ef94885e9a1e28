"""Runs the commands of serving/README.md as they are written, up to those that need a daemon or a cluster."""

import json
import os
import pathlib
import re
import shutil
import stat
import subprocess

import pytest

from robust_tf.flags import parse_flags
from robust_tf.predict import PredictConfig
from robust_tf.serving.server.config_files import model_settings, read_model_config
from robust_tf.serving.server.serve_config import ServeConfig
from tests.serving.conftest import LIMIT
from tests.serving.proxy import SERVING, bearer, readme_blocks, running_nginx, tool

IMAGE = pathlib.Path(__file__).parent / "images" / "d.jpg"
SECTIONS = ["The embedded server", "Docker", "Compose", "Kubernetes"]


def shell(commands, folder, **environment):
    environment = os.environ | environment
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def documents(text):
    """Returns the JSON documents that curl printed one after another."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def curl_block(section):
    (block,) = [block for block in readme_blocks(section) if "curl" in block]
    return block


def test_requests_to_the_embedded_server_succeed(embedded, tmp_path):
    shutil.copy(IMAGE, tmp_path / "cat.jpg")
    here = curl_block(SECTIONS[0]).replace("http://localhost:8501", embedded.url).replace("pets", "digits")
    answers = documents(shell(here, tmp_path))
    assert [next(iter(answer)) for answer in answers] == [
        "model_version_status",
        "model_spec",
        "predictions",
        "outputs",
    ]


def test_requests_to_compose_succeed(embedded, tmp_path):
    (tmp_path / "nginx").mkdir()
    shutil.copy(IMAGE, tmp_path / "cat.jpg")
    upstreams = [
        ("tensorflow-serving:8501", f"127.0.0.1:{embedded.rest_port}"),
        ("tensorflow-serving:8500", embedded.target),
    ]
    with running_nginx(tmp_path / "nginx", *upstreams) as proxy:
        url = str(proxy.client.base_url).rstrip("/")
        here = curl_block("Compose").replace("https://localhost:8443", url).replace("pets", "digits")
        here = here.replace("nginx/tls/server.crt", str(proxy.certificate))
        (tmp_path / "serving").mkdir()
        answers = documents(shell(here, tmp_path / "serving", TOKEN=bearer("laptop")["Authorization"].split()[1]))
    assert [next(iter(answer)) for answer in answers] == ["model_version_status", "predictions"]


@pytest.fixture(params=["022", "077"])
def prepared(request, tmp_path):
    """Runs the first block of the section on Compose in a copy of serving/, with stand-ins for docker and sudo."""
    tool("openssl")
    tmp_path.chmod(0o755)
    shutil.copytree(SERVING, tmp_path / "serving", ignore=shutil.ignore_patterns("tls", "tokens.map", ".env"))
    (tmp_path / "export").mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, does in [("docker", f'echo "$@" >> {tmp_path}/docker.log'), ("sudo", '"$@"')]:
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    if os.geteuid() != 0:
        pytest.skip("needs root, to give the key to nginx's user")
    commands = readme_blocks("Compose")[0] + 'echo "$TOKEN"'
    printed = shell(f"umask {request.param}\n{commands}", tmp_path, PATH=f"{programs}:{os.environ['PATH']}")
    return tmp_path, printed.split()[-1]


def test_nginx_starts_with_the_files_that_readme_creates(prepared):
    """Runs nginx as user 101, as the unprivileged image does."""
    folder, token = prepared
    assert re.fullmatch("[0-9a-f]{64}", token)
    made = folder / "serving" / "nginx"
    for secret in (made / "tls" / "server.key", made / "tokens.map"):
        assert (secret.stat().st_uid, stat.S_IMODE(secret.stat().st_mode)) == (101, 0o600)
    assert stat.S_IMODE((folder / "serving" / ".env").stat().st_mode) == 0o600
    assert (folder / "docker.log").read_text() == "compose up --detach\n"
    # In the container, every user can enter the folders. Here, user 101 must be let into those of pytest.
    writable = folder / "tmp"
    writable.mkdir()
    shutil.chown(writable, 101, 101)
    for parent in folder.parents:
        if not parent.stat().st_mode & stat.S_IXOTH and parent.owner() == "root":
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    config = made / "nginx.conf"
    text = config.read_text()
    for old, new in [
        ("/tmp", str(writable)),
        ("/etc/nginx", str(made)),
        ("/dev/stdout", str(writable / "access.log")),
        ("/dev/stderr", str(writable / "error.log")),
    ]:
        text = text.replace(old, new)
    config.write_text(text)
    as_nginx = [tool("setpriv"), "--reuid=101", "--regid=101", "--clear-groups"]
    check = [*as_nginx, tool("nginx"), "-t", "-c", str(config), "-p", str(writable), "-e", str(writable / "error.log")]
    run = subprocess.run(check, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert run.returncode == 0, run.stderr
    # .env holds the settings that compose.yaml asks for.
    compose = [tool("docker-compose"), "config", "--quiet"]
    subprocess.run(compose, cwd=folder / "serving", timeout=LIMIT, check=True)


def test_commands_for_docker_and_kubernetes_are_valid(tmp_path):
    (docker,) = readme_blocks("Docker")
    words = subprocess.run(
        ["bash", "-c", 'docker() { printf "%s\\n" "$@"; }\n' + docker], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    image = next(word for word in words if word.startswith("tensorflow/serving:"))
    flags = [word for word in words[words.index(image) + 1 :] if word]
    config, rest = parse_flags(ServeConfig, ["serve", *flags], "")
    assert (config.port, config.rest_api_port, config.model_name, rest) == (8500, 8501, "pets", [])
    apply, *others = readme_blocks("Kubernetes")[0].splitlines()
    assert apply == "kubectl apply -k serving"
    assert all(line.startswith("kubectl -n robust-tf ") for line in others)
    run = subprocess.run([tool("kubectl"), "kustomize", str(SERVING)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_programs_accept_the_flags_in_the_readme():
    """Checks the names of the flags only. Other tests run the programs."""
    lines = [
        line
        for section in [*SECTIONS, "Release a new version"]
        for block in readme_blocks(section)
        for line in block.replace("\\\n", "").splitlines()
    ]
    for name, config_class in [("predict", PredictConfig), ("serve", ServeConfig)]:
        asked = [line for line in lines if f"robust_tf.{name} " in line]
        assert asked
        known = set(config_class.__dataclass_fields__) | {"check"}  # type: ignore[attr-defined]
        assert {flag for line in asked for flag in re.findall(r"--(\w+)", line)} <= known


def test_policies_of_a_release_keep_the_labeled_versions(tmp_path):
    """Writes the policies of the README's steps into the shipped models.config."""
    text = (SERVING / "config" / "models.config").read_text()
    readme = (SERVING / "README.md").read_text()
    steps = re.findall(r"^\d\. .*?`(specific \{[\d\w: ]+\})`", readme, re.MULTILINE)
    assert steps == ["specific { versions: 1 versions: 2 }", "specific { versions: 2 }"]
    first, last = [1, 2], [2]
    for step, versions, stable in [(steps[0], first, 1), (steps[0], first, 2), (steps[1], last, 2)]:
        changed = text.replace("specific { versions: 1 }", step).replace("value: 1", f"value: {stable}")
        (tmp_path / "models.config").write_text(changed)
        (pets,) = model_settings(read_model_config(tmp_path / "models.config"))
        assert sorted(pets.specific) == versions
        assert set(pets.labels.values()) <= set(pets.specific)
