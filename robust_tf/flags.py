"""Flags of the programs: the fields of a frozen dataclass, each with a default and a help text, parsed by absl.

A field made with `flag` is one flag. A field made with `record` holds another dataclass, whose fields are flags too.
On the command line all flags are on one level, however deeply the records are nested.
"""

import dataclasses
import fractions
import functools
import os
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from absl import flags

from robust_tf.environment import Verbosity, set_verbosity
from robust_tf.errors import UserError, unknown_name

Config = TypeVar("Config")
_HELP_WIDTH = 100

# The flags that every program has.
_COMMON_FLAGS = """
Flags of every program:
  --flagfile: File to read more flags from, one on each line.
  --verbosity: Lowest severity of the messages of TensorFlow and other libraries that are shown.
      One of error, warning, info. Default: error.
  --help: Show this help."""


def flag(default: Any, help_text: str, **metadata: Any) -> Any:
    """Declares a dataclass field that is a flag.

    Args:
        default: Value of the flag when the user leaves it out.
        help_text: Text that `--help` prints, in whole sentences.
        **metadata: `formerly` is an older name of the flag that still works, and `heading` replaces the heading of the
            record in `--help`. With `repeated=True` a flag of type `tuple[str, ...]` may be given several times, and
            each time adds one text, which may hold commas. The dataclass may use further keys, as `JobConfig` does
            with `identity`.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def record(config_class: type[Any], heading: str) -> Any:
    """Declares a dataclass field that holds further flags.

    Args:
        config_class: Dataclass whose fields are made with `flag` or `record`, each with a default.
        heading: Heading of these flags in `--help`.
    """
    return dataclasses.field(default_factory=config_class, metadata={"heading": heading})


@dataclasses.dataclass(frozen=True)
class FlatField:
    """One flag of a config.

    Attributes:
        name: Name of the flag, and of the field in its record.
        kind: Type of its value, without `| None`.
        default: Value when it is left out.
        metadata: Help text and further arguments of `flag`.
        records: Names of the nested fields that lead to the record; empty for a field of the config itself.
        heading: Heading of the flag in `--help`.
    """

    name: str
    kind: Any
    default: Any
    metadata: Mapping[str, Any]
    records: tuple[str, ...]
    heading: str

    def value_in(self, config: Any) -> Any:
        """Returns the value of this flag in a config."""
        return getattr(functools.reduce(getattr, self.records, config), self.name)


def flat_fields(config_class: type[Any]) -> tuple[FlatField, ...]:
    """Returns every flag of a dataclass and of the records within it, in the order of `--help`.

    Raises:
        TypeError: Two fields have the same name, or the former name of one is the name of another.
    """
    key: Any = config_class  # the cache asks for Hashable, which mypy does not see in a class
    return _flat_fields(key)


@functools.cache
def _flat_fields(config_class: Any) -> tuple[FlatField, ...]:
    found = tuple(_walk(config_class, records=(), heading="Flags"))
    names = [name for field in found for name in (field.name, field.metadata.get("formerly")) if name]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise TypeError(f"Flags must have different names. {config_class.__name__} repeats {', '.join(repeated)}.")
    return found


def flat_values(config: Any) -> dict[str, Any]:
    """Returns the values of all flags of a config by name."""
    return {field.name: field.value_in(config) for field in flat_fields(type(config))}


def from_flat_values(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds a config, with its records, from flags by name; flags that are left out take their defaults.

    Raises:
        TypeError: There is no flag of that name.
        UserError: The config refuses a value.
    """
    if unknown := sorted(values.keys() - {field.name for field in flat_fields(config_class)}):
        raise TypeError(f"{config_class.__name__} has no flag {', '.join(unknown)}.")
    return _build(config_class, values)


class ParsedFlags(NamedTuple):
    """Flags as they were read, before a config has checked them together.

    Attributes:
        values: Values of all flags by name.
        given: Names of the flags that do not have their defaults because the user gave them.
        rest: Arguments that are not flags.
    """

    values: dict[str, Any]
    given: frozenset[str]
    rest: list[str]


def parse_flags(
    config_class: type[Config], argv: Sequence[str], usage: str = "", *, announce_former_names: bool = True
) -> tuple[Config, list[str]]:
    """Reads `--name=value` arguments (and `--flagfile`) into a dataclass; prints help and exits for `--help`.

    Args:
        config_class: Dataclass whose fields are made with `flag` (of type str, int, float, bool, a Literal of strings,
            one of these or None, or a tuple of one of them, written with commas) or with `record`. It checks its
            values itself.
        argv: Name of the program and its arguments.
        usage: Text that `--help` prints above the flags.
        announce_former_names: Whether to report on stderr that a flag has been renamed. Use False for flags that a
            program wrote itself.

    Returns:
        The config, and the arguments that are not flags.

    Raises:
        UserError: A flag is unknown (the message suggests the most similar one), or a value has the wrong type.
    """
    parsed = parse_values(config_class, argv, usage, announce_former_names=announce_former_names)
    return from_flat_values(config_class, parsed.values), parsed.rest


def parse_values(
    config_class: type[Any], argv: Sequence[str], usage: str = "", *, announce_former_names: bool = True
) -> ParsedFlags:
    """Reads flags as `parse_flags` does, without building the config, so that other values can be added first.

    Args:
        config_class: As in `parse_flags`.
        argv: As in `parse_flags`.
        usage: As in `parse_flags`.
        announce_former_names: As in `parse_flags`.

    Raises:
        UserError: A flag is unknown (the message suggests the most similar one), or a value has the wrong type.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    fields = flat_fields(config_class)
    for field in fields:
        for name in (field.name, field.metadata.get("formerly")):
            if name:
                _define(name, field, values)
    flags.DEFINE_boolean("help", False, "Show this help.", short_name="h", flag_values=values)
    flags.DEFINE_string("verbosity", "error", "Show messages of the libraries.", flag_values=values)
    try:
        positional = values(list(argv))[1:]
    except flags.Error as error:
        reason = str(error).removeprefix("ERROR:: ").rstrip(".")
        raise UserError(f"{reason}. Use --help for the list of flags.") from error
    if values["help"].value:
        _print_help(usage.strip() + "\n" + _help_of(fields) + "\n" + _COMMON_FLAGS)
        raise SystemExit(0)
    if values["verbosity"].present:
        _set_verbosity(values["verbosity"].value)
    parsed, given = {}, set()
    for field in fields:
        name = _name_used(field, values, announce=announce_former_names)
        value: Any = values[name].value
        if field.metadata.get("repeated"):
            value = tuple(value)
        elif typing.get_origin(field.kind) is tuple:
            value = _parse_items(field.name, value, typing.get_args(field.kind)[0])
        parsed[field.name] = value
        if values[name].present:
            given.add(field.name)
    return ParsedFlags(parsed, frozenset(given), positional)


def _print_help(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head` reads only the first lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_flag_file(config: Any) -> str:
    """Returns a flag file that gives the same config, with all flags except those without a value."""
    lines = []
    for field in flat_fields(type(config)):
        value = field.value_in(config)
        texts = value if field.metadata.get("repeated") else (to_text(value),)
        lines += [f"--{field.name}={text}\n" for text in texts if _is_set(value)]
    return "".join(lines)


def to_text(value: Any) -> str:
    """Returns a value as it is written after `--name=`."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def default_workdir(argv: Sequence[str], *, otherwise: str = "train") -> str:
    """Returns runs/<name of the flag file>, or runs/<otherwise> without one.

    Args:
        argv: Name of the program and its arguments.
        otherwise: Name of the folder without a flag file.

    Example:
        >>> default_workdir(["train", "--flagfile=configs/pets.cfg"])
        'runs/pets'
    """
    arguments = [arg.lstrip("-").partition("=") for arg in argv]
    following = [*argv[1:], ""]  # absl also accepts "--flagfile FILE"
    flag_files = [
        value if separator else after
        for (name, separator, value), after in zip(arguments, following, strict=True)
        if name == "flagfile"
    ]
    return str(pathlib.Path("runs") / (pathlib.Path(flag_files[-1]).stem if flag_files else otherwise))


def parse_number(text: str) -> float:
    """Reads a decimal number or a fraction such as 8/255, without evaluating anything."""
    try:
        return float(fractions.Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"A number or a fraction such as 8/255 is needed. Received: {text!r}.") from None


def parse_amount(text: str) -> int | float:
    """Reads a number of images ("1000", an int) or a share of them ("0.1", a float in (0, 1])."""
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    if re.fullmatch(r"0?\.\d+|1\.0*", text) and float(text) > 0:
        return float(text)
    raise UserError(f"--subset is a number of images (1000) or a share of them (0.1). Received: {text!r}.")


def without_none(hint: Any) -> Any:
    """Returns the type `X` of a hint `X | None`, and any other hint as it is."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


class _NumberParser(flags.ArgumentParser[float]):
    """Lets absl read fractions."""

    syntactic_help = "a number or a fraction such as 8/255"

    def parse(self, argument: str | float) -> float:
        return parse_number(argument) if isinstance(argument, str) else float(argument)


def _set_verbosity(value: Any) -> None:
    if value not in typing.get_args(Verbosity):
        raise unknown_name("value of --verbosity", value, typing.get_args(Verbosity))
    set_verbosity(value)


def _walk(config_class: type[Any], *, records: tuple[str, ...], heading: str) -> list[FlatField]:
    hints = typing.get_type_hints(config_class)
    found = []
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            found += _walk(
                hints[field.name], records=(*records, field.name), heading=field.metadata.get("heading", heading)
            )
        else:
            kind = without_none(hints[field.name])
            own_heading = field.metadata.get("heading", heading)
            found.append(FlatField(field.name, kind, field.default, field.metadata, records, own_heading))
    return found


def _build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    hints = typing.get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return config_class(**arguments)


def _name_used(field: FlatField, values: flags.FlagValues, *, announce: bool) -> str:
    """Returns the name under which a flag was given, which may be its former name."""
    former = field.metadata.get("formerly")
    if not former or not values[former].present:
        return field.name
    if values[field.name].present:
        raise UserError(f"--{former} is now called --{field.name}. Received: both. Leave out --{former}.")
    if announce:
        print(f"--{former} is now called --{field.name}; the old name still works.", file=sys.stderr)
    return str(former)


def _define(name: str, field: FlatField, values: flags.FlagValues) -> None:
    kind, default, help_text = field.kind, field.default, field.metadata["help"]
    if field.metadata.get("repeated"):
        flags.DEFINE_multi_string(name, list(default), help_text, flag_values=values)
    elif typing.get_origin(kind) is tuple:
        flags.DEFINE_list(name, list(default), help_text, flag_values=values)
    elif kind is float:
        flags.DEFINE(_NumberParser(), name, default, help_text, flag_values=values)
    elif kind is bool:
        flags.DEFINE_boolean(name, default, help_text, flag_values=values)
    elif kind is int:
        flags.DEFINE_integer(name, default, help_text, flag_values=values)
    else:  # the dataclass checks a Literal, because it can suggest the most similar choice
        flags.DEFINE_string(name, default, help_text, flag_values=values)


def _help_of(fields: Sequence[FlatField]) -> str:
    lines = []
    heading = None
    for field in fields:
        if field.heading != heading:
            heading = field.heading
            lines += ["", f"{heading}:"]
        text = field.metadata["help"]
        if typing.get_origin(field.kind) is Literal:
            text += f" One of {', '.join(typing.get_args(field.kind))}."
        if _is_set(field.default):
            shown = f"{field.default:g}" if isinstance(field.default, float) else to_text(field.default)
            text += f" Default: {shown}."
        # A long word such as a path stays whole, so that users can copy it.
        lines += textwrap.wrap(
            f"--{field.name}: {text}",
            _HELP_WIDTH,
            initial_indent="  ",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _is_set(value: Any) -> bool:
    return value not in (None, "", ())


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
