"""The error that the serving code raises: a canonical status code and a message, for both transports."""

import contextlib
import logging
from collections.abc import Iterator

_LOG = logging.getLogger(__name__)

# Canonical status codes (google.rpc.Code): number, and HTTP status in TensorFlow Serving's REST interface.
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

_LONGEST_MESSAGE = 1024  # gRPC puts the message into a header; TensorFlow Serving truncates it to the same length


class ServingError(Exception):
    """A request that cannot be answered.

    Args:
        code: Canonical name of the status, e.g. "INVALID_ARGUMENT".
        message: What went wrong.

    Attributes:
        code: Canonical name of the status.
        message: The message as the client reads it: a single line without control characters.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = _one_line(message)
        super().__init__(f"{code}: {self.message}")

    @property
    def number(self) -> int:
        """Number of the canonical code, as gRPC and StatusProto carry it."""
        return _CODES[self.code][0]

    @property
    def http_status(self) -> int:
        """HTTP status in the REST interface."""
        return _CODES[self.code][1]


def code_name(number: int) -> str:
    """Returns the name of a canonical code. Numbers that do not exist are "UNKNOWN"."""
    return _NAMES.get(number, "UNKNOWN")


def invalid(message: str) -> ServingError:
    """Returns the most common error, INVALID_ARGUMENT: the request is at fault."""
    return ServingError("INVALID_ARGUMENT", message)


@contextlib.contextmanager
def only_serving_errors() -> Iterator[None]:
    """Turns any other exception in the block into an INTERNAL error, so that no client ever sees a Python traceback.

    Raises:
        ServingError: The block raised this error, or another exception, which is logged.
    """
    try:
        yield
    except ServingError:
        raise
    except Exception as error:
        _LOG.exception("A request failed because of an error in the server")
        raise ServingError("INTERNAL", "The server failed to answer this request. Its log says why.") from error


def _one_line(message: str) -> str:
    """Returns a message without line breaks or control characters, truncated if it is too long."""
    lines = message.splitlines()
    text = message if len(lines) == 1 else " ".join(line.strip() for line in lines)
    if len(text) > _LONGEST_MESSAGE:
        text = text[:_LONGEST_MESSAGE] + "...TRUNCATED"
    # The message may quote the request, which may hold half a surrogate pair.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
