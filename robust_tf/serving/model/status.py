"""The one error of the serving code: a canonical code and a message, with the two ways of sending them."""

import contextlib
import logging
from collections.abc import Iterator

_LOG = logging.getLogger(__name__)

# Canonical status codes by number (google.rpc.Code), with the HTTP status that TF Serving's REST interface gives them.
_CODES = {
    "OK": (0, 200),
    "CANCELLED": (1, 499),
    "UNKNOWN": (2, 500),
    "INVALID_ARGUMENT": (3, 400),
    "DEADLINE_EXCEEDED": (4, 504),
    "NOT_FOUND": (5, 404),
    "ALREADY_EXISTS": (6, 409),
    "PERMISSION_DENIED": (7, 403),
    "RESOURCE_EXHAUSTED": (8, 429),
    "FAILED_PRECONDITION": (9, 400),
    "ABORTED": (10, 409),
    "OUT_OF_RANGE": (11, 400),
    "UNIMPLEMENTED": (12, 501),
    "INTERNAL": (13, 500),
    "UNAVAILABLE": (14, 503),
    "DATA_LOSS": (15, 500),
    "UNAUTHENTICATED": (16, 401),
}
_NAMES = {number: name for name, (number, _) in _CODES.items()}

_LONGEST_MESSAGE = 1024  # gRPC puts the message into a header; TF Serving cuts at the same length


class ServingError(Exception):
    """A request that cannot be answered.

    Attributes:
        code: canonical name, e.g. "INVALID_ARGUMENT".
        message: what the client reads; always one line without control characters.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = _one_line(message)
        super().__init__(f"{code}: {self.message}")

    @property
    def number(self) -> int:
        """The canonical code's number, as gRPC and StatusProto carry it."""
        return _CODES[self.code][0]

    @property
    def http_status(self) -> int:
        """The HTTP status of the REST interface."""
        return _CODES[self.code][1]


def code_name(number: int) -> str:
    """Name of a canonical code's number; numbers that don't exist are "UNKNOWN"."""
    return _NAMES.get(number, "UNKNOWN")


def invalid(message: str) -> ServingError:
    """The commonest error: the request itself is at fault."""
    return ServingError("INVALID_ARGUMENT", message)


@contextlib.contextmanager
def only_serving_errors() -> Iterator[None]:
    """Turns any other exception of the block into INTERNAL, so that a client never reads Python's account of it.

    Raises:
        ServingError: what the block raises.
    """
    try:
        yield
    except ServingError:
        raise
    except Exception as error:
        _LOG.exception("A request has met an error in the server itself")
        raise ServingError("INTERNAL", "The server failed to answer this request. Its log says why.") from error


def _one_line(message: str) -> str:
    """The message without line breaks and control characters, cut where it gets long."""
    lines = message.splitlines()
    text = message if len(lines) == 1 else " ".join(line.strip() for line in lines)
    if len(text) > _LONGEST_MESSAGE:
        text = text[:_LONGEST_MESSAGE] + "...TRUNCATED"
    # What a client sent may stand in it, half a surrogate pair included.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
