"""Parses the JSON requests of the REST interface, in TensorFlow Serving's format."""

import base64
import binascii
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from robust_tf.serving.model.session import type_name
from robust_tf.serving.model.status import ServingError, invalid


class PredictRequest(NamedTuple):
    """A predict request as arrays.

    Attributes:
        inputs: An array for each input, by name.
        by_row: Whether the request lists its inputs by row under "instances". The reply then lists its outputs by row
            under "predictions".
    """

    inputs: dict[str, np.ndarray]
    by_row: bool


def parse_body(body: bytes) -> dict[str, Any]:
    """Parses the JSON object of a request.

    As in TensorFlow Serving, NaN and Infinity are numbers, and bytes after the object are ignored.

    Raises:
        ServingError: The body is not a JSON object, or is nested too deeply (INVALID_ARGUMENT).
    """
    if not body.strip():
        raise invalid("JSON Parse error: The document is empty at offset: 0")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = _parse_leniently(body)  # tried second because it is ten times slower
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {_excerpt(document)} Is not object")
    return document


def signature_name_of(document: Mapping[str, Any]) -> str:
    """Returns the `signature_name` of a request, or "" if it has none."""
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid(f"JSON Value: {_excerpt(name)} 'signature_name' key must be a string value.")
    return name


def parse_predict(document: Mapping[str, Any], definition: meta_graph_pb2.SignatureDef) -> PredictRequest:
    """Converts a predict request to arrays.

    Args:
        document: The JSON object of the request.
        definition: Signature that the request is for.

    Raises:
        ServingError: The document does not fit the signature (INVALID_ARGUMENT), or an input has a type that JSON
            cannot carry (UNIMPLEMENTED).
    """
    by_row = "instances" in document
    if by_row and "inputs" in document:
        raise invalid(
            "JSON Value: Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
        )
    if by_row:
        return PredictRequest(_parse_rows(document["instances"], definition), True)
    if "inputs" in document:
        return PredictRequest(_parse_columns(document["inputs"], definition), False)
    raise invalid("Missing 'inputs' or 'instances' key")


def parse_examples(document: Mapping[str, Any]) -> list[bytes]:
    """Returns the serialized tf.Examples of a classify or regress request, each merged with the request's context."""
    if "examples" not in document:
        raise invalid("When method is classify/regress, key 'examples' is expected and was not found.")
    examples, context = document["examples"], document.get("context", {})
    if not isinstance(examples, list):
        raise invalid("Expecting 'examples' value to be an list/array")
    if not examples:
        raise invalid("'examples' value is an empty array")
    if not isinstance(context, dict):
        raise invalid(f"Context is not an object. JSON Value: {_excerpt(context)}")
    return [_parse_example(example, context) for example in examples]


def _parse_leniently(body: bytes) -> Any:
    try:
        text = body.decode("utf-8", "surrogateescape")
        document, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
        text[:end].encode("utf-8")  # only the document must be valid UTF-8, not what follows it
        return document
    except json.JSONDecodeError as error:
        raise invalid(f"JSON Parse error: Invalid value. at offset: {error.pos}") from error
    except UnicodeEncodeError as error:
        raise invalid(f"JSON Parse error: Invalid encoding in string. at offset: {error.start}") from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer with thousands of digits
        raise invalid(f"JSON Parse error: nested too deeply or too long a number: {error}") from error


def _parse_rows(instances: Any, definition: meta_graph_pb2.SignatureDef) -> dict[str, np.ndarray]:
    if not isinstance(instances, list):
        raise invalid("Expecting 'instances' to be an list/array")
    if not instances:
        raise invalid("No values in 'instances' array")
    names = sorted(definition.inputs)
    if not isinstance(instances[0], dict) or _is_bytes(instances[0]):
        if len(names) != 1:
            raise invalid(
                f"instances is a plain list, but expecting list of objects as multiple input tensors required: {names}"
            )
        return {names[0]: _row_array(names[0], instances, definition)}
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise _bad_row(row, f"JSON Value: {_excerpt(instance)} Is not object")
        for name, value in instance.items():
            if name not in columns:
                raise _bad_row(row, f"JSON object: does not have named input: {name}", key=name)
            columns[name].append(value)
        if len(instance) != len(names):
            raise _bad_row(row, f"JSON object keys must be equal to: {','.join(names)}")
    return {name: _row_array(name, values, definition) for name, values in columns.items()}


def _row_array(name: str, values: list[Any], definition: meta_graph_pb2.SignatureDef) -> np.ndarray:
    try:
        return _to_array(values, definition.inputs[name].dtype)
    except ServingError as error:
        raise _bad_row(0, f"{error.code}: {error.message}", key=name, wrap=False) from error


def _bad_row(row: int, message: str, *, key: str = "", wrap: bool = True) -> ServingError:
    named = f" key: {key}" if key else ""
    prefix = "INVALID_ARGUMENT: " if wrap else ""
    return invalid(f"Failed to process element: {row}{named} of 'instances' list. Error: {prefix}{message}")


def _parse_columns(inputs: Any, definition: meta_graph_pb2.SignatureDef) -> dict[str, np.ndarray]:
    names = sorted(definition.inputs)
    if not isinstance(inputs, dict) or _is_bytes(inputs):
        if len(names) != 1:
            raise invalid(
                f"inputs is a plain value/list, but expecting an object as multiple input tensors required: {names}"
            )
        return {names[0]: _to_array(inputs, definition.inputs[names[0]].dtype)}
    for name in names:
        if name not in inputs:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _to_array(inputs[name], definition.inputs[name].dtype) for name in names}


def _is_bytes(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"]


def _to_array(value: Any, datatype: int) -> np.ndarray:
    """Converts a JSON value, or nested lists of equal length, to an array of a TensorFlow type."""
    dtype = tf.as_dtype(datatype)
    kinds = _LEAF_TYPES.get(dtype)
    if kinds is None:
        raise ServingError(
            "UNIMPLEMENTED", f"Conversion of JSON Value: {_excerpt(value)} to type: {type_name(datatype)}"
        )
    shape = _shape(value)
    leaves = _leaves(value, shape)
    if not set(map(type, leaves)) <= kinds:
        wrong = next(leaf for leaf in leaves if type(leaf) not in kinds)
        raise invalid(
            f"JSON Value: {_excerpt(wrong)} Type: {_json_type(wrong)} is not of expected type: {type_name(datatype)}"
        )
    if dtype == tf.string:
        array = np.empty(len(leaves), dtype=object)
        array[:] = [_to_bytes(leaf) for leaf in leaves]
        return array.reshape(shape)
    try:
        with np.errstate(over="ignore"):  # a double beyond the range of float32 becomes infinite
            return np.array(leaves, dtype=dtype.as_numpy_dtype).reshape(shape)
    except OverflowError as error:
        raise invalid(f"A JSON number is outside the range of type: {type_name(datatype)}: {error}") from error


# The Python types of the JSON values that each tensor type accepts. Subclasses do not count: a bool is not an int here.
_LEAF_TYPES: dict[tf.DType, set[type]] = {
    tf.string: {str, dict},
    tf.bool: {bool},
    **dict.fromkeys((tf.float32, tf.float64), {int, float}),
    **dict.fromkeys(
        (tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64),
        {int},
    ),
}


def _shape(value: Any) -> list[int]:
    """Returns the shape of nested lists, judging by the first element of each list."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return shape


def _leaves(value: Any, shape: Sequence[int]) -> list[Any]:
    """Checks that all lists at the same depth have the same length, and returns their elements in order."""
    level = [value]
    for depth, size in enumerate(shape):
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            raise _ragged(level, shape[depth:])
        level = list(itertools.chain.from_iterable(level))
    if list in set(map(type, level)):
        raise _ragged(level, [])
    return level


def _ragged(level: Sequence[Any], expected: Sequence[int]) -> ServingError:
    found = next(shape for shape in map(_shape, level) if len(shape) != len(expected) or shape[:1] != expected[:1])
    if len(found) == len(expected):
        return invalid(f"Expecting tensor size: {expected[0]} but got: {found[0]}")
    return invalid(f"Encountered list at unexpected size: Expecting shape {_text(expected)} but got: {_text(found)}")


def _text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _to_bytes(value: str | dict[str, Any]) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if not _is_bytes(value) or not isinstance(value["b64"], str):
        raise invalid(f"JSON Value: {_excerpt(value)} not formatted correctly for base64 data")
    text: str = "".join(value["b64"].split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"JSON Value: {_excerpt(value)} Unable to base64 decode") from error


def _parse_example(example: Any, context: Mapping[str, Any]) -> bytes:
    if not isinstance(example, dict):
        raise invalid(f"Example must be JSON object but got JSON Value: {_excerpt(example)}")
    message = tf.train.Example()
    for name, value in {**context, **example}.items():
        values = value if isinstance(value, list) else [value]
        kinds = {_FEATURE_LISTS.get(type(item)) for item in values}
        if not values:
            continue
        if None in kinds or len(kinds) > 1:
            raise invalid(
                f"Unable to parse feature {name!r}: JSON Value: {_excerpt(value)} must hold values of one type"
            )
        field, convert = _FEATURE_VALUES[kinds.pop()]  # type: ignore[index]
        try:
            getattr(message.features.feature[name], field).value.extend(map(convert, values))
        except (ValueError, OverflowError) as error:
            raise invalid(f"Unable to parse feature {name!r}: {error}") from error
    serialized: bytes = message.SerializeToString()
    return serialized


_FEATURE_LISTS: dict[type, str] = {int: "int", bool: "int", float: "float", str: "bytes", dict: "bytes"}
_FEATURE_VALUES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "int": ("int64_list", int),
    "float": ("float_list", float),
    "bytes": ("bytes_list", _to_bytes),
}


def _excerpt(value: Any) -> str:
    try:
        text = orjson.dumps(value).decode("utf-8", "replace")
    except (orjson.JSONEncodeError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 200 else text[:200] + "...TRUNCATED"


def _json_type(value: Any) -> str:
    return {str: "String", dict: "Object", list: "Array", bool: "Bool", type(None): "Null"}.get(type(value), "Number")
