"""Handling of Ctrl-C and SIGTERM (preemption): a training run saves its state before it stops."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
