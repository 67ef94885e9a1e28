"""Errors and warnings that the programs show to their users."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """An error in the input (a flag, file, image, checkpoint or request), not in the program.

    The message states the rule, the value that was received and what to do about it. The command-line programs print it
    without a traceback and exit with code 2.
    """

    # Inside a tf.function, TensorFlow's autograph would otherwise turn it into a StagingError with a long traceback.
    ag_pass_through = True


class AttackWarning(UserWarning):
    """A sign that an attack did not work, so that the robust accuracy is too good to be true."""


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> UserError:
    """Returns the error for an unknown name, which lists the valid names and suggests the most similar one.

    Args:
        kind: What the name stands for, such as "architecture".
        name: Value that was received. A value that is not a string counts as unknown.
        valid: Names that would have been accepted.

    Example:
        >>> print(unknown_name("norm", "l3", ["l2", "linf"]))
        Unknown norm. Received: 'l3'. Did you mean 'l2'? Valid: l2, linf.
    """
    names = sorted(valid)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    suggestion = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(f"Unknown {kind}. Received: {name!r}.{suggestion} Valid: {', '.join(names)}.")


def warn_user(message: str) -> None:
    """Prints a warning as one line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends a command-line program without a traceback, with code 2 after a `UserError` and 130 after Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
