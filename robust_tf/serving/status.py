"""The one error of the serving code: a canonical code and a message, with the two ways of sending them."""

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

_LONGEST_GRPC_MESSAGE = 1024  # gRPC puts the message into a header; TF Serving cuts at the same length


class ServingError(Exception):
    """A request that cannot be answered.

    Attributes:
        code: canonical name, e.g. "INVALID_ARGUMENT".
        message: what the client reads.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    @property
    def number(self) -> int:
        """The canonical code's number, as gRPC and StatusProto carry it."""
        return _CODES[self.code][0]

    @property
    def http_status(self) -> int:
        """The HTTP status of the REST interface."""
        return _CODES[self.code][1]

    @property
    def grpc_message(self) -> str:
        """The message, short enough for a gRPC status."""
        if len(self.message) <= _LONGEST_GRPC_MESSAGE:
            return self.message
        return self.message[:_LONGEST_GRPC_MESSAGE] + "...TRUNCATED"


def code_name(number: int) -> str:
    """Name of a canonical code's number; numbers that don't exist are "UNKNOWN"."""
    return _NAMES.get(number, "UNKNOWN")


def invalid(message: str) -> ServingError:
    """The commonest error: the request itself is at fault."""
    return ServingError("INVALID_ARGUMENT", message)
