"""Flags of the programs: the fields of a frozen dataclass, each with its default and help, parsed by absl."""

import dataclasses
import fractions
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from absl import flags

from robust_tf.environment import Verbosity, set_verbosity
from robust_tf.errors import UserError, unknown_name

Config = TypeVar("Config")

# The flags that every program has.
_COMMON_FLAGS = """
Flags of every program:
  --flagfile: File to read more flags from, one on each line.
  --verbosity: Least severe messages of TensorFlow and other libraries to show. One of error, warning, info.
    Default: error.
  --help: Show this help."""


def flag(default: Any, help_text: str, **metadata: Any) -> Any:
    """A dataclass field that is a flag.

    Args:
        metadata: `formerly`, an older name that still works; anything else is for the dataclass itself.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def parse_flags(config_class: type[Config], argv: Sequence[str], usage: str = "") -> tuple[Config, list[str]]:
    """Reads `--name=value` arguments (and `--flagfile`) into a dataclass; prints help and exits for `--help`.

    Args:
        config_class: its fields are made with `flag`, of type str, int, float, bool, a Literal of strings, one of
            these or None, or a tuple of one of them (written with commas). It checks its values itself.
        argv: the program's name and its arguments.
        usage: what `--help` prints above the flags.

    Returns:
        The config, and the arguments that are no flags.

    Raises:
        UserError: an unknown flag (with the nearest one), or a value of the wrong type.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    for field in fields:
        for name in (field.name, field.metadata.get("formerly")):
            if name:
                _define(name, _without_none(hints[field.name]), field.default, field.metadata["help"], values)
    flags.DEFINE_boolean("help", False, "Show this help.", short_name="h", flag_values=values)
    flags.DEFINE_string("verbosity", "error", "Show messages of the libraries.", flag_values=values)
    try:
        positional = values(list(argv))[1:]
    except flags.Error as error:
        reason = str(error).removeprefix("ERROR:: ").rstrip(".")
        raise UserError(f"{reason}. Use --help for the list of flags.") from error
    if values["help"].value:
        print(usage.strip() + "\n\nFlags:")
        for field in fields:
            print(f"  --{field.name}: {_help(_without_none(hints[field.name]), field)}")
        print(_COMMON_FLAGS)
        raise SystemExit(0)
    if values["verbosity"].present:
        _set_verbosity(values["verbosity"].value)
    parsed = {}
    for field in fields:
        value: Any = values[_name_used(field, values)].value
        if typing.get_origin(hints[field.name]) is tuple:
            value = _parse_items(field.name, value, typing.get_args(hints[field.name])[0])
        parsed[field.name] = value
    return config_class(**parsed), positional


def _set_verbosity(value: Any) -> None:
    if value not in typing.get_args(Verbosity):
        raise unknown_name("value of --verbosity", value, typing.get_args(Verbosity))
    set_verbosity(value)


def _name_used(field: Any, values: flags.FlagValues) -> str:
    """The name that a flag was given by, which may be the one it had before; says so then."""
    former = field.metadata.get("formerly")
    if not former or not values[former].present:
        return field.name
    if values[field.name].present:
        raise UserError(f"--{former} is now called --{field.name}. Received: both. Leave out --{former}.")
    print(f"--{former} is now called --{field.name}; the old name still works.", file=sys.stderr)
    return former


def to_flag_file(config: Any) -> str:
    """All fields of a config as a flag file that gives the same config; those without a value are left out."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return "".join(f"--{name}={to_text(value)}\n" for name, value in values.items() if value not in (None, "", ()))


def to_text(value: Any) -> str:
    """A value as it is written behind a flag."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_number(text: str) -> float:
    """A decimal number or a fraction such as 8/255, without evaluating anything."""
    try:
        return float(fractions.Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"A number or a fraction such as 8/255 is needed. Received: {text!r}.") from None


def parse_amount(text: str) -> int | float:
    """ "1000" -> 1000 of something; "0.1" -> that share of it, in (0, 1]."""
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    if re.fullmatch(r"0?\.\d+|1\.0*", text) and float(text) > 0:
        return float(text)
    raise UserError(f"--subset is a number of images (1000) or a share of them (0.1). Received: {text!r}.")


class _NumberParser(flags.ArgumentParser[float]):
    syntactic_help = "a number or a fraction such as 8/255"

    def parse(self, argument: str | float) -> float:
        return parse_number(argument) if isinstance(argument, str) else float(argument)


def _define(name: str, kind: Any, default: Any, help_text: str, values: flags.FlagValues) -> None:
    if typing.get_origin(kind) is tuple:
        flags.DEFINE_list(name, list(default), help_text, flag_values=values)
    elif kind is float:
        flags.DEFINE(_NumberParser(), name, default, help_text, flag_values=values)
    elif kind is bool:
        flags.DEFINE_boolean(name, default, help_text, flag_values=values)
    elif kind is int:
        flags.DEFINE_integer(name, default, help_text, flag_values=values)
    else:  # a Literal is checked by the dataclass, which can suggest the nearest
        flags.DEFINE_string(name, default, help_text, flag_values=values)


def _help(kind: Any, field: Any) -> str:
    text = field.metadata["help"]
    if typing.get_origin(kind) is Literal:
        text += f" One of {', '.join(typing.get_args(kind))}."
    return text if field.default in (None, "", ()) else f"{text} Default: {to_text(field.default)}."


def _parse_items(name: str, items: Sequence[str], kind: type) -> tuple[Any, ...]:
    convert: Callable[[str], Any] = parse_number if kind is float else kind
    texts = [item.strip() for item in items]
    if texts == [""]:
        return ()
    try:
        if "" in texts:
            raise ValueError
        return tuple(convert(text) for text in texts)
    except ValueError:
        kinds = {int: "integers", float: "numbers or fractions such as 8/255"}
        raise UserError(
            f"--{name} takes {kinds.get(kind, 'values')} with commas between them. Received: {','.join(items)}."
        ) from None


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint
