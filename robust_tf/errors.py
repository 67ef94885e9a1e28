"""What the programs say when the input is at fault."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """The input (flag, file, image, checkpoint, request) is at fault, not the program.

    The message says the rule, the value received and the way out. The command-line programs print it without a
    traceback and exit with code 2.
    """

    # TensorFlow's autograph would make a StagingError of it, with a traceback of many lines, in a tf.function.
    ag_pass_through = True


class AttackWarning(UserWarning):
    """A sign that a robust accuracy is too good to be true: the attack could not do its work."""


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for a name that is in no table: lists the valid ones and suggests the nearest.

    Args:
        kind: what the name stands for, e.g. "architecture".
        name: the value received; names are text, so anything else is unknown too.
        valid: the names that would have been accepted.
    """
    names = sorted(valid)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    suggestion = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(f"Unknown {kind}. Received: {name!r}.{suggestion} Valid: {', '.join(names)}.")


def warn_user(message: str) -> None:
    """Prints what the user should know, though the program goes on: one line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """For the command-line programs: a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
