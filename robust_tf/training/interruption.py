"""Handling of Ctrl-C and SIGTERM (preemption): a training run saves its state before it stops."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECOND_SIGNAL_SECONDS = 5.0  # time to react to a second signal


class Interrupted(BaseException):
    """Raised when a signal ends the program.

    Like KeyboardInterrupt it is not an `Exception`, so that `except Exception` does not catch it.

    Args:
        signal_number: Number of the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """Exit code of the program: 130 for Ctrl-C, 143 for SIGTERM, as in shells."""
        return 128 + self.signal_number


class PendingSignal:
    """The first signal received within `signals_held_back`. It is pending until the program reacts to it."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @property
    def received(self) -> bool:
        """Whether a signal has been received."""
        return self.signal_number is not None

    def receive(self, signal_number: int, frame: FrameType | None) -> None:
        """Handles a signal: notes the first one, raises `Interrupted` at the second one."""
        if self.signal_number is not None:
            raise Interrupted(signal_number)
        self.signal_number = signal_number

    def raise_if_received(self) -> None:
        """Raises `Interrupted` if a signal has been received."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)


def _raise(signal_number: int, _frame: FrameType | None) -> None:
    raise Interrupted(signal_number)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Returns a context in which Ctrl-C and SIGTERM raise `Interrupted` at once. It works in the main thread only."""
    with _handled_by(_raise):
        yield


@contextlib.contextmanager
def signals_held_back() -> Iterator[PendingSignal]:
    """Returns a context in which the first Ctrl-C or SIGTERM is only noted, and the second one raises `Interrupted`.

    The program can finish its step and save its state. A noted signal raises `Interrupted` at the end of the context.
    """
    pending = PendingSignal()
    with _handled_by(pending.receive):
        yield pending
    pending.raise_if_received()


@contextlib.contextmanager
def signals_end_process() -> Iterator[None]:
    """Returns a context in which Ctrl-C and SIGTERM end the process at once, even while Python runs no code.

    Use it for calls into C++ that do not return and that write no files. A shell sees the same exit codes as those of
    `Interrupted`. Linux does not end process 1 of a container in this way.
    """
    with _handled_by(signal.SIG_DFL):
        yield


class Watch:
    """Ends the process after a signal if its main thread is stuck, for example in communication with a lost worker.

    Python runs signal handlers in the main thread only, and not before that thread returns from C++. A thread of this
    object learns of the signal all the same.

    Args:
        stuck: Function that returns why the main thread cannot go on, or "" if it can. It is called again and again
            after a signal. Its argument returns whether the answer is no longer needed.
    """

    def __init__(self, stuck: Callable[[Callable[[], bool]], str]) -> None:
        self._stuck = stuck
        self._ended = threading.Event()
        self._first: int | None = None

    @property
    def signal_number(self) -> int | None:
        """The first signal that was received, if any."""
        return self._first

    @contextlib.contextmanager
    def running(self) -> Iterator["Watch"]:
        """Returns the context in which signals are watched. It works in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        receiver, sender = socket.socketpair()
        sender.setblocking(False)  # Python writes the number of each signal to it, from within the C handler
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._receive, args=(receiver,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            signal.set_wakeup_fd(before)
            sender.close()
            thread.join()
            receiver.close()

    def _receive(self, receiver: socket.socket) -> None:
        while numbers := receiver.recv(1):
            if numbers[0] not in _SIGNALS:
                continue
            if self._first is None:
                self._first = numbers[0]
                threading.Thread(target=self._after_first, args=(numbers[0],), daemon=True).start()
            else:
                threading.Thread(target=self._after_second, args=(numbers[0],), daemon=True).start()

    def _after_first(self, number: int) -> None:
        while not self._ended.wait(0.5):
            if reason := self._stuck(self._ended.is_set):
                self._exit(number, reason)

    def _after_second(self, number: int) -> None:
        if not self._ended.wait(_SECOND_SIGNAL_SECONDS):
            self._exit(number, "A second signal was received.")

    def _exit(self, number: int, reason: str) -> None:
        if self._ended.is_set():
            return
        print(
            f"Interrupted. {reason} This process ends at once; the same command continues from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        # Nothing is left half written, because every file is written under another name first.
        os._exit(128 + number)


@contextlib.contextmanager
def _handled_by(handler: "signal._HANDLER") -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows only the main thread to set signal handlers
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
