"""Writes dataclasses as JSON objects, and reads them back with a check of every type."""

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

Kind = TypeVar("Kind")


class WrongValueError(ValueError):
    """A value is missing or has another type than its field. The text is "name=value"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON object that may have more keys than its class has fields.

    Attributes:
        extra: Values of the other keys. They are kept when the record is written again.
    """

    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the record as an object that `json.dump` accepts."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "extra"]
        return {**{name: to_json(getattr(self, name)) for name in names}, **self.extra}

    @classmethod
    def completed(cls, content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Returns the content from which the fields are read. Subclasses override this to add or drop keys.

        Args:
            content: The JSON object.
            where: Prefix of its keys in messages, such as "baseline.".
        """
        del where
        return content


def to_json(value: Any) -> Any:
    """Returns a value in a form that `json.dump` accepts: dataclasses become objects, tuples become lists."""
    if isinstance(value, Record):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_json(each) for name, each in value.items()}
    return [to_json(each) for each in value] if isinstance(value, list | tuple) else value


def from_json(kind: type[Kind], content: Any, where: str = "") -> Kind:
    """Returns the dataclass in a JSON object.

    Keys that are absent or null get the default of their field. A `Record` keeps unknown keys in `extra`; any other
    dataclass drops them.

    Args:
        kind: The dataclass. Its fields are str, int (0 or more), float (finite), bool, a Literal of strings, a tuple
            of one type, a mapping from str, a NamedTuple (a list in JSON), another dataclass, or one of these or None.
        content: What `json.load` returned.
        where: Prefix of the keys in messages.

    Raises:
        WrongValueError: A value is missing or has another type.
    """
    if not isinstance(content, Mapping):
        raise _wrong(where.removesuffix("."), content)
    if issubclass(kind, Record):
        content = kind.completed(content, where)
    hints = _field_types(typing.cast(type, kind))
    values = {
        name: _value(hints[name], value, f"{where}{name}")
        for name, value in content.items()
        if name in hints and value is not None
    }
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise _wrong(f"{where}{field.name}", None)
    if issubclass(kind, Record):
        values["extra"] = {name: value for name, value in content.items() if name not in hints}
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    """Returns a value other than None as the type `kind`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_json(typing.cast(type, kind), value, f"{where}.")
    if origin is Mapping and isinstance(value, Mapping):
        return {name: _value(arguments[1], each, f"{where}.{name}") for name, each in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], each, where) for each in value)
    if hasattr(kind, "_fields") and isinstance(value, list | tuple) and len(value) == len(kind._fields):
        hints = typing.get_type_hints(kind)
        return kind(*(_value(hints[name], each, where) for name, each in zip(kind._fields, value, strict=True)))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        str: isinstance(value, str),
        bool: isinstance(value, bool),
        int: is_number and isinstance(value, int) and value >= 0,
        float: is_number and abs(value) <= sys.float_info.max,  # false for NaN
    }
    if fits.get(kind) or origin is Literal and value in arguments:
        return value
    raise _wrong(where, value)


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name != "extra"}


def _wrong(name: str, value: Any) -> WrongValueError:
    return WrongValueError(f"{name}={value!r}"[:300])
