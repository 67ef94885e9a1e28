"""The meeting of the processes of a job: each waits until all the others have started, and can be stopped meanwhile.

TensorFlow's own waiting takes place in C++ while it holds Python's lock, so that no line is printed and no signal is
handled. Therefore the processes meet here first. While a worker waits, it listens on its own address, which TensorFlow
will use later, and greets whoever connects. It leaves as soon as every other worker has greeted it, or has already left
and answers as TensorFlow does.
"""

import contextlib
import dataclasses
import errno
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from robust_tf.errors import UserError

State = Literal["waiting", "running", "absent", "other"]

_POLL_SECONDS = 0.2  # between two attempts to reach a worker
_ANSWER_SECONDS = 2.0  # for a connection, and again for the first bytes
_FIRST_LINE_SECONDS = 5.0  # workers that start together print nothing
_LINE_SECONDS = 30.0
_PORT_SECONDS = 10.0  # a process that is just ending may still hold the port
_LOST_SECONDS = 10.0  # a worker that does not answer for so long is lost


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found at the address of a worker.

    Attributes:
        state: "waiting" for a worker that waits for the others, "running" for one in which TensorFlow communicates,
            "absent" if nothing answers, "other" if something else does.
        detail: Explanation for the user if the state is "absent" or "other".
    """

    state: State
    detail: str = ""

    @property
    def present(self) -> bool:
        """Whether the worker is there."""
        return self.state in ("waiting", "running")


def wait_for_workers(addresses: Sequence[str], *, worker: int, timeout: float) -> None:
    """Waits until all workers of a job have started. Prints a line on stderr for whom it waits every 30 seconds.

    Signals are handled while it waits.

    Args:
        addresses: Address of each worker, such as "host0:2222".
        worker: Number of this worker, counted from 0.
        timeout: Seconds after which it gives up. 0 means never.

    Raises:
        UserError: A worker is still missing after `timeout`, or the port of this worker is taken.

    Example:
        >>> wait_for_workers(["localhost:2222"], worker=0, timeout=60)
    """
    others = [number for number in range(len(addresses)) if number != worker]
    if not others:
        return
    for address in addresses:
        _host_and_port(address)
    with _listening(addresses[worker], _greeting(worker, len(addresses))):
        start = time.monotonic()
        answers = {number: Answer("absent", "no answer yet") for number in others}
        changed, stop = threading.Event(), threading.Event()

        def look_for(number: int) -> None:
            while not stop.is_set():
                before = answers[number]
                answers[number] = ask(addresses[number], worker=number, num_workers=len(addresses))
                if answers[number].present != before.present:
                    changed.set()
                stop.wait(_POLL_SECONDS)

        # In threads, because no signal is handled while the main thread looks up the name of a host.
        for number in others:
            threading.Thread(target=look_for, args=(number,), daemon=True).start()
        ends, next_line = start + timeout if timeout else math.inf, start + _FIRST_LINE_SECONDS
        try:
            # Even a worker that was there is asked again, because it may be lost while this one waits for others.
            while not all(answer.present for answer in answers.values()):
                now = time.monotonic()
                if now >= ends:
                    raise UserError(_given_up(addresses, answers, timeout))
                if now >= next_line:
                    _say(_waiting(addresses, answers, now - start, timeout))
                    next_line = start + (now - start) // _LINE_SECONDS * _LINE_SECONDS + _LINE_SECONDS
                changed.wait(min(next_line, ends) - now)
                changed.clear()
        finally:
            stop.set()
    _say(f"Worker {worker}: all {len(addresses)} workers are there.")


def ask(address: str, *, worker: int, num_workers: int) -> Answer:
    """Returns what is found at the address of a worker. This takes at most a few seconds.

    Args:
        address: Address of the worker, such as "host1:2222".
        worker: Number of the worker that should be there.
        num_workers: Number of workers of the job.

    Example:
        >>> ask("nowhere.invalid:2222", worker=1, num_workers=2).state
        'absent'
    """
    try:
        with socket.create_connection(_host_and_port(address), timeout=_ANSWER_SECONDS) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            received = connection.recv(100)
    except (socket.gaierror, UnicodeError):  # the latter for a name that no host can have
        return Answer("absent", "the name of the host is not known")
    except TimeoutError:
        return Answer("absent", "no answer")
    except OSError as error:
        return Answer("absent", (error.strerror or str(error)).lower())
    if received == _greeting(worker, num_workers):
        return Answer("waiting")
    # A gRPC server, which TensorFlow runs, begins with a frame of type 4, the settings of HTTP/2 (RFC 9113, 3.4).
    if len(received) >= 9 and received[3] == 4 and received[5:9] == bytes(4):
        return Answer("running")
    if not received:
        return Answer("absent", "the connection was closed")
    if received.startswith(b"robust_tf "):
        return Answer("other", f"it says that it is {received[10:].decode(errors='replace').strip()}")
    return Answer("other", "another program answers there")


def lost_workers(
    addresses: Sequence[str], *, worker: int, seconds: float = _LOST_SECONDS, ended: Callable[[], bool] = lambda: False
) -> str:
    """Returns the names of the workers that do not communicate for some seconds, or "" if there are none.

    Args:
        addresses: Address of each worker.
        worker: Number of this worker.
        seconds: Time during which a worker has to be silent to be lost.
        ended: Function that returns whether the answer is no longer needed. The function then returns early.

    Example:
        >>> lost_workers(["localhost:2222"], worker=0)
        ''
    """
    silent = [number for number in range(len(addresses)) if number != worker]
    ends = time.monotonic() + seconds
    while silent and not ended():
        silent = [
            number
            for number in silent
            if ask(addresses[number], worker=number, num_workers=len(addresses)).state != "running"
        ]
        if time.monotonic() >= ends:
            break
        time.sleep(_POLL_SECONDS)
    return ", ".join(f"worker {number} ({addresses[number]})" for number in silent)


def _greeting(worker: int, num_workers: int) -> bytes:
    return f"robust_tf worker {worker} of {num_workers}\n".encode()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f'TF_CONFIG needs addresses with a port, such as "host0:2222". Received: {address!r}.')
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def _listening(address: str, greeting: bytes) -> Iterator[None]:
    """Returns a context in which the greeting is sent to whoever connects to the port of an address."""
    listener = _listener(address)
    ended = threading.Event()

    def greet() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(greeting)
            except OSError:  # nobody has connected for a moment, or the connection is gone already
                continue

    thread = threading.Thread(target=greet, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        listener.close()  # TensorFlow takes the port next


def _listener(address: str) -> socket.socket:
    _, port = _host_and_port(address)
    both = socket.has_dualstack_ipv6()
    ends = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            # As TensorFlow does, on all interfaces: a container may not have the address by which others know it.
            listener = socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=128
            )
            listener.settimeout(_POLL_SECONDS)
            return listener
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            if not taken or time.monotonic() >= ends:
                reason = "Another program listens there" if taken else error.strerror or str(error)
                raise UserError(
                    f"This worker cannot listen on port {port}, which TF_CONFIG gives it. Received: {address} "
                    f"({reason}). End the other program, for example an earlier run of this job, or choose another "
                    "port in the TF_CONFIG of all workers."
                ) from error
        time.sleep(_POLL_SECONDS)


def _missing(addresses: Sequence[str], answers: dict[int, Answer]) -> str:
    return ", ".join(
        f"worker {number} ({addresses[number]}: {answer.detail})"
        for number, answer in answers.items()
        if not answer.present
    )


def _waiting(addresses: Sequence[str], answers: dict[int, Answer], seconds: float, timeout: float) -> str:
    limit = f"gives up after {timeout:g} s (--worker_timeout)" if timeout else "never gives up (--worker_timeout=0)"
    return f"Waiting for {_missing(addresses, answers)}, {seconds:.0f} s so far; {limit}."


def _given_up(addresses: Sequence[str], answers: dict[int, Answer], timeout: float) -> str:
    return (
        f"Not all of the {len(addresses)} workers have started. Received: no {_missing(addresses, answers)} within "
        f"--worker_timeout={timeout:g} seconds. Start the same command on every machine in TF_CONFIG; the job "
        "continues from its last checkpoint. --worker_timeout=0 waits for ever."
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
