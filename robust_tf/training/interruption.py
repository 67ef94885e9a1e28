"""Ctrl-C and SIGTERM (pre-emption): training saves first, and ends then."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal has ended the work; like KeyboardInterrupt no `Exception`, so that nothing takes it for an error.

    Attributes:
        signal_number: which one.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, as shells have it."""
        return 128 + self.signal_number


class PendingSignal:
    """The first signal that has come within `signals_held_back`, until someone makes an end of the work."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @property
    def received(self) -> bool:
        return self.signal_number is not None

    def receive(self, signal_number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise Interrupted(signal_number)  # asked twice: at once, then
        self.signal_number = signal_number

    def raise_if_received(self) -> None:
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)


def _raise(signal_number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal_number)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM raise `Interrupted` wherever the program is. Outside the main thread: no effect."""
    with _handled_by(_raise):
        yield


@contextlib.contextmanager
def signals_held_back() -> Iterator[PendingSignal]:
    """Within it, the first Ctrl-C or SIGTERM is only noted, so that a step can end and be saved; the second raises."""
    pending = PendingSignal()
    with _handled_by(pending.receive):
        yield pending
    pending.raise_if_received()


@contextlib.contextmanager
def _handled_by(handler: "signal._HANDLER") -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread set handlers
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
