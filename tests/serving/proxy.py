"""Runs nginx with the configuration in serving/, except for ports, hosts and folders."""

import contextlib
import dataclasses
import pathlib
import re
import secrets
import shutil
import ssl
import subprocess
from collections.abc import Iterator, Sequence

import httpx
import pytest

from tests.serving.conftest import LIMIT, accepts_connections, free_port, until

SERVING = pathlib.Path(__file__).parents[2] / "serving"
# Created as README.md says.
TOKENS = {name: secrets.token_hex(32) for name in ("laptop", "busy", "strange_case")}


def bearer(name: str) -> dict[str, str]:
    """Returns the header that carries the token of a client."""
    return {"Authorization": f"Bearer {TOKENS[name]}"}


@dataclasses.dataclass
class Proxy:
    """A running nginx: a REST client for it, its gRPC address and its certificate."""

    client: httpx.Client
    target: str
    certificate: pathlib.Path


def tool(name: str) -> str:
    """Returns the path of a program, or skips the test if it is not installed."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"needs {name} (Debian: nginx, prometheus, openssl, util-linux)")
    return path


@contextlib.contextmanager
def running_nginx(folder: pathlib.Path, *replaced: Sequence[str]) -> Iterator[Proxy]:
    """Runs nginx with the shipped configuration.

    Args:
        folder: Where to write its files.
        *replaced: Pairs of an old text in the configuration and its replacement.
    """
    nginx, openssl = tool("nginx"), tool("openssl")
    key, certificate = folder / "server.key", folder / "server.crt"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    (folder / "tokens.map").write_text("".join(f'"Bearer {token}" {name};\n' for name, token in TOKENS.items()))
    rest, grpc_port = free_port(), free_port()
    text = (SERVING / "nginx" / "nginx.conf").read_text()
    for old, new in [
        ("/tmp", str(folder)),  # first, because the other folders may lie in it
        ("/etc/nginx/tokens.map", str(folder / "tokens.map")),
        ("/etc/nginx/tls", str(folder)),
        ("listen 8443", f"listen 127.0.0.1:{rest}"),
        ("listen 8444", f"listen 127.0.0.1:{grpc_port}"),
        ("/dev/stdout", str(folder / "access.log")),
        ("/dev/stderr", str(folder / "error.log")),
        *replaced,
    ]:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    command = [nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    check = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"])
    context = ssl.create_default_context(cafile=str(certificate))
    try:
        with httpx.Client(base_url=f"https://localhost:{rest}", verify=context, timeout=LIMIT) as client:
            until(lambda: accepts_connections(rest) and accepts_connections(grpc_port))
            yield Proxy(client, f"localhost:{grpc_port}", certificate)
    finally:
        process.terminate()
        process.wait(10)


def readme_blocks(section: str) -> list[str]:
    """Returns the shell blocks in a section of serving/README.md."""
    text = (SERVING / "README.md").read_text()
    part = re.search(rf"^##+ {re.escape(section)}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert part, section
    return re.findall(r"```sh\n(.*?)```", part[1], re.DOTALL)
