"""Repeating requests that a busy server has refused."""

import email.utils
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from robust_tf.serving.client.base import ServerError

RETRY_SECONDS = 120.0

_LOG = logging.getLogger(__name__)
_TRIES_TO_REACH = 4  # if no server has ever answered, the address may be wrong, and the user should be told soon
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_SECONDS_BETWEEN_WARNINGS = 5.0  # several threads may be waiting at the same time

Answer = TypeVar("Answer")


class Retries:
    """Repeats requests that the server refuses because it is busy, after growing pauses with jitter.

    One instance may be used from several threads.

    Args:
        seconds: Longest time in seconds from the first refusal of a request to its last try. 0 means a single try.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._reached = False
        self._last_warning = -_SECONDS_BETWEEN_WARNINGS

    def __call__(self, ask: Callable[[], Answer]) -> Answer:
        """Calls `ask` until it succeeds, and returns its result.

        Raises:
            ServerError: `ask` raised an error that another try would not fix, or no time is left for another try.
        """
        started = 0.0
        for attempt in itertools.count(1):
            try:
                answer = ask()
            except ServerError as error:
                started = started or time.monotonic()
                pause = self._pause(error, attempt, left=self._seconds - (time.monotonic() - started))
            else:
                self._reached = True
                return answer
            time.sleep(pause)
        raise AssertionError  # itertools.count never ends

    def _pause(self, error: ServerError, attempt: int, *, left: float) -> float:
        """Returns the seconds until the next try. Raises the error if there should be none."""
        self._reached |= error.reached
        if error.code not in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
            raise error
        pause: float = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        if error.retry_after is not None:
            # A little later than the server asks for, so that clients that were refused at the same time do not all
            # come back at the same time.
            pause = error.retry_after + pause
        if pause > left or (not self._reached and attempt >= _TRIES_TO_REACH):
            raise error
        with self._lock:
            now = time.monotonic()
            if self._reached and now - self._last_warning >= _SECONDS_BETWEEN_WARNINGS:
                self._last_warning = now
                _LOG.warning("The server is busy (%s). Trying again in %.1f s, for %.0f s at most.", error, pause, left)
        return pause


def seconds_after(header: str | None) -> float | None:
    """Returns the number of seconds that a Retry-After header asks for, or None if it names no time.

    Args:
        header: The header's value, a number of seconds or a date, or None if the reply has no such header.

    Example:
        >>> seconds_after("3"), seconds_after("soon")
        (3.0, None)
    """
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
