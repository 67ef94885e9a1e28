"""Workers wait for each other: they say for whom, obey signals, give up in time, and take nothing else for a worker."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from robust_tf.errors import UserError
from robust_tf.training import rendezvous
from robust_tf.training.interruption import Interrupted, signals_raise
from robust_tf.training.rendezvous import ask, lost_workers, wait_for_workers
from tests.training.workers import free_ports, wait_until

# The first bytes that TensorFlow 2.21 sends to whoever connects: a SETTINGS frame of HTTP/2.
TENSORFLOW = bytes.fromhex("000018040000000000000400400000000500400000")


@contextlib.contextmanager
def server(says: bytes, *, port: int = 0) -> Iterator[str]:
    """Another program at an address: it sends something to whoever connects, or nothing, and keeps the connection."""
    kept = []
    with socket.create_server(("127.0.0.1", port)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    kept.append(connection)
                    connection.sendall(says)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in kept:
        connection.close()


def free_addresses(count: int) -> list[str]:
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(rendezvous, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "_PORT_SECONDS", 0.3)


def test_a_single_worker_does_not_wait():
    wait_for_workers(["no address"], worker=0, timeout=0.1)


def test_workers_find_each_other_whichever_comes_first_and_leave_their_ports():
    addresses = free_addresses(3)
    done = []

    def work(worker: int) -> None:
        wait_for_workers(addresses, worker=worker, timeout=60)
        done.append(worker)
        # The real worker's port is TensorFlow's from now on.
        with server(TENSORFLOW, port=int(addresses[worker].rpartition(":")[2])):
            while len(done) < 3:
                time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in (2, 0, 1)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
        assert thread is threads[-1] or not done
    for thread in threads:
        thread.join(60)
    assert sorted(done) == [0, 1, 2]


def test_a_worker_that_has_left_already_counts():
    with server(TENSORFLOW) as other:
        wait_for_workers([other, *free_addresses(1)], worker=1, timeout=5)


def test_lines_say_for_whom_it_waits_and_how_long(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_FIRST_LINE_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "_LINE_SECONDS", 0.3)
    addresses = free_addresses(2)
    with pytest.raises(
        UserError, match=rf"no worker 1 \({addresses[1]}: connection refused\) within --worker_timeout=1 "
    ):
        wait_for_workers(addresses, worker=0, timeout=1)
    lines = capsys.readouterr().err.splitlines()
    start = (
        f"Waiting for worker 1 ({addresses[1]}: connection refused), 0 s so far; gives up after 1 s (--worker_timeout)."
    )
    assert lines[0] == start
    assert 3 <= len(lines) <= 4  # after 0.1, 0.3, 0.6 and 0.9 s
    assert lines[-1].startswith("Waiting for worker 1") and "1 s so far" in lines[-1]


def test_without_a_timeout_it_never_gives_up(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_FIRST_LINE_SECONDS", 0.1)
    addresses = free_addresses(2)
    with server(TENSORFLOW) as other, signals_raise(), pytest.raises(Interrupted):
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        wait_for_workers([addresses[0], other, addresses[1]], worker=0, timeout=0)
    assert f"Waiting for worker 2 ({addresses[1]}: connection refused)" in (err := capsys.readouterr().err)
    assert "never gives up (--worker_timeout=0)" in err and "worker 1" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_obeyed_even_while_the_name_of_a_host_is_looked_up(monkeypatch, number):
    look_up, ended = socket.getaddrinfo, threading.Event()

    def slow(host, *args, **kwargs):
        if host == "host1":
            ended.wait(30)
        return look_up("127.0.0.1" if host == "host1" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    start = time.monotonic()
    try:
        with signals_raise(), pytest.raises(Interrupted) as caught:
            wait_for_workers([*free_addresses(1), "host1:2222"], worker=0, timeout=60)
    finally:
        ended.set()
    assert caught.value.exit_code == 128 + number
    assert time.monotonic() - start < 5


def test_a_worker_that_goes_away_again_is_waited_for(monkeypatch):
    addresses = free_addresses(3)
    ports = [int(address.rpartition(":")[2]) for address in addresses]
    seen: list[bool] = []  # whether worker 1 was there, each time that it was asked
    ended = threading.Event()

    def remembered(address: str, *, worker: int, num_workers: int) -> rendezvous.Answer:
        answer = ask(address, worker=worker, num_workers=num_workers)
        if worker == 1:
            seen.append(answer.present)
        return answer

    def come_and_go() -> None:
        with server(b"robust_tf worker 1 of 3\n", port=ports[1]):
            wait_until(lambda: any(seen), seconds=30)
        gone = len(seen)
        wait_until(lambda: len(seen) > gone + 1, seconds=30)
        with server(b"robust_tf worker 2 of 3\n", port=ports[2]):
            ended.wait(30)

    monkeypatch.setattr(rendezvous, "ask", remembered)
    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"no worker 1 \([^)]*\) within"):
            wait_for_workers(addresses, worker=0, timeout=5)
    finally:
        ended.set()
        thread.join()
    assert any(seen)  # worker 1 was there for a while


@pytest.mark.parametrize(
    ("says", "detail"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "another program answers there"),
        (bytes(40), "another program answers there"),
        (b"robust_tf worker 0 of 2\n", "it says that it is worker 0 of 2"),  # the same TF_CONFIG on two machines
        (b"robust_tf worker 1 of 3\n", "it says that it is worker 1 of 3"),
        (b"", "no answer"),  # for example a program that waits for a request, or a stopped worker
    ],
)
def test_another_program_is_not_taken_for_a_worker(says, detail):
    with server(says) as other, pytest.raises(UserError, match=rf"no worker 1 \({other}: {detail}\) within"):
        wait_for_workers([*free_addresses(1), other], worker=0, timeout=1)


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 70])
def test_unknown_hosts_are_named(monkeypatch, host):
    look_up = socket.getaddrinfo

    def offline(name, *args, **kwargs):
        if name == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(name, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(UserError, match=rf"worker 1 \({host}:2222: the name of the host is not known\)"):
        wait_for_workers([*free_addresses(1), f"{host}:2222"], worker=0, timeout=0.5)


def test_a_port_that_is_taken_is_refused():
    message = "cannot listen on port .* Received: {} .Another program listens there"
    with server(b"") as taken, pytest.raises(UserError, match=message.format(taken)):
        wait_for_workers([taken, *free_addresses(1)], worker=0, timeout=60)


def test_a_port_that_becomes_free_is_taken(monkeypatch):
    monkeypatch.setattr(rendezvous, "_PORT_SECONDS", 30)
    with server(TENSORFLOW) as other, socket.create_server(("127.0.0.1", 0)) as earlier_run:
        threading.Timer(0.3, earlier_run.close).start()
        wait_for_workers([f"127.0.0.1:{earlier_run.getsockname()[1]}", other], worker=0, timeout=30)


@pytest.mark.parametrize("address", ["host1", "host1:grpc", ":2222"])
def test_addresses_without_a_port_are_refused(address):
    with pytest.raises(UserError, match=f"Received: '{address}'"):
        wait_for_workers([*free_addresses(1), address], worker=0, timeout=5)


def test_answers():
    with server(TENSORFLOW) as running, server(b"robust_tf worker 1 of 2\n") as waiting, server(b"") as silent:
        states = [ask(address, worker=1, num_workers=2).state for address in (running, waiting, silent)]
    assert states == ["running", "waiting", "absent"]


def test_only_workers_that_communicate_are_not_lost():
    """A worker that waits at the rendezvous has been restarted, so it will not answer in the old communication."""
    (gone,) = free_addresses(1)
    with server(TENSORFLOW) as running, server(b"robust_tf worker 3 of 4\n") as waiting:
        addresses = ["127.0.0.1:1", running, gone, waiting]
        lost = lost_workers(addresses, worker=0, seconds=0.3)
        assert lost == f"worker 2 ({gone}), worker 3 ({waiting})"
        start = time.monotonic()
        assert lost_workers(addresses[:2], worker=0, seconds=30) == ""
        lost_workers(addresses, worker=0, seconds=30, ended=lambda: True)
        assert time.monotonic() - start < 10


def test_a_worker_that_answers_again_is_not_lost():
    ports = free_ports(1)
    opened = threading.Event()

    def come_back() -> None:
        time.sleep(0.3)
        with server(TENSORFLOW, port=ports[0]):
            opened.wait(30)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        assert lost_workers(["127.0.0.1:1", f"127.0.0.1:{ports[0]}"], worker=0, seconds=20) == ""
    finally:
        opened.set()
        thread.join()
