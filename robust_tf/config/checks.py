"""Rules that several records share: choices, ranges, and the radius of an attack."""

import dataclasses
import math
import numbers
import typing
from collections.abc import Iterable
from typing import Any, Literal

from robust_tf.errors import UserError, unknown_name
from robust_tf.flags import to_text, without_none


def check_epsilon(norm: str, epsilon: float, *, name: str = "epsilon") -> None:
    """Refuses a radius that is negative, is not finite, or exceeds the pixel range under linf.

    Args:
        norm: Norm of the attack.
        epsilon: Radius to check.
        name: Name of the argument or flag, for the message.
    """
    if not isinstance(epsilon, numbers.Real) and getattr(epsilon, "shape", None) != ():
        raise UserError(f"{name} must be one number, in [0, 1] pixel units. Received: {name}={epsilon!r}.")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise UserError(f"{name} must be 0 or more, in [0, 1] pixel units. Received: {name}={epsilon}.")
    if norm == "linf" and epsilon > 1:
        raise UserError(
            f"{name} of the linf norm must be in [0, 1], since pixels are. "
            f"Received: {name}={epsilon:g}. Did you mean {epsilon:g}/255?"
        )


def check_choices(config: Any) -> None:
    """Checks every field of a dataclass of flags whose type is a Literal.

    Raises:
        UserError: A field has a value that its type does not list; the message suggests the nearest one.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, value = without_none(hints[field.name]), getattr(config, field.name)
        undecided = field.default is None and value is None
        if typing.get_origin(kind) is Literal and not undecided:
            check_choice(f"--{field.name}", value, kind)


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuses a value that is not among the choices of a Literal.

    Args:
        name: Name of the flag or argument, for the message.
        value: Value to check.
        choices: Literal type of strings.
    """
    if not isinstance(value, str) or value not in typing.get_args(choices):
        raise unknown_name(f"value of {name}", value, typing.get_args(choices))


def check_ranges(config: Any, names: Iterable[str], *, lowest: float) -> None:
    """Checks that flags of a config are finite numbers of at least `lowest`, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not lowest <= value < math.inf:  # NaN fails this comparison too
            raise UserError(f"--{name} must be {lowest} or more. Received: {value}.")


def check_default(config: Any, names: Iterable[str], where: str) -> None:
    """Refuses flags that have no effect because of another one.

    Args:
        config: Record with the flags.
        names: Names of flags that must have their defaults.
        where: Flag and value that these flags need to have an effect, such as "--task=transfer".
    """
    for name in names:
        if getattr(config, name) != getattr(type(config), name):
            raise UserError(f"--{name} is for {where}. Received: --{name}={to_text(getattr(config, name))}.")


def check_local_folders(config: Any, names: Iterable[str]) -> None:
    """Refuses flags that name a folder in a store such as gs://."""
    for name in names:
        if "://" in getattr(config, name):
            raise UserError(
                f"--{name} must be a folder on this machine, or one that is mounted here; only --data_dir may be in a "
                f"store. Received: --{name}={getattr(config, name)}."
            )
