"""Parses the JSON requests of the REST interface, in TensorFlow Serving's format."""

import base64
import binascii
import itertools
import json
import math
from collections.abc import Mapping, Sequence
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
        raise _bad_document(
            document, "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist"
        )
    if by_row:
        return PredictRequest(_parse_rows(document, definition), True)
    if "inputs" in document:
        return PredictRequest(_parse_columns(document["inputs"], definition), False)
    raise invalid("Missing 'inputs' or 'instances' key")


def parse_examples(document: Mapping[str, Any]) -> list[bytes]:
    """Returns the serialized tf.Examples of a classify or regress request, each merged with the request's context."""
    context = _parse_example(document.get("context", {}))
    if "examples" not in document:
        raise _bad_document(document, "When method is classify, key 'examples' is expected and was not found")
    examples = document["examples"]
    if not isinstance(examples, list):
        raise _bad_document(document, "Expecting 'examples' value to be an list/array")
    if not examples:
        raise _bad_document(document, "'examples' value is an empty array")
    # Concatenating serialized messages merges them. Where both set a feature, the example's wins.
    return [context + _parse_example(example) for example in examples]


def _parse_leniently(body: bytes) -> Any:
    try:
        text = body.decode("utf-8", "surrogateescape")
        document, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
        text[:end].encode("utf-8")  # only the document must be valid UTF-8, not what follows it
    except json.JSONDecodeError as error:
        raise invalid(f"JSON Parse error: Invalid value. at offset: {error.pos}") from error
    except UnicodeEncodeError as error:
        raise invalid(f"JSON Parse error: Invalid encoding in string. at offset: {error.start}") from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer with thousands of digits
        raise invalid(f"JSON Parse error: nested too deeply or too long a number: {error}") from error
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # half a pair, written as an escape
        raise invalid("JSON Parse error: The surrogate pair in string is invalid.") from error
    except RecursionError as error:
        raise invalid(f"JSON Parse error: nested too deeply: {error}") from error
    return document


def _parse_rows(document: Mapping[str, Any], definition: meta_graph_pb2.SignatureDef) -> dict[str, np.ndarray]:
    instances = document["instances"]
    if not isinstance(instances, list):
        raise _bad_document(document, "Expecting 'instances' to be an list/array")
    if not instances:
        raise _bad_document(document, "No values in 'instances' array")
    names = sorted(definition.inputs)
    if not _is_object(instances[0]):
        if len(names) != 1:
            raise invalid(
                f"instances is a plain list, but expecting list of objects as multiple input tensors required: {names}"
            )
        for row, instance in enumerate(instances):
            if _is_object(instance):
                raise invalid(f"Expecting value/list but got object at item {row} of input list")
        return {names[0]: _row_array(instances, definition.inputs[names[0]].dtype)}
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row, instance in enumerate(instances):
        if not _is_object(instance):
            raise invalid(f"Expecting object but got list at item {row} of input list")
        for name, value in instance.items():
            if name not in columns:
                raise _bad_row(row, invalid(f"JSON object: does not have named input: {name}"), key=name)
            columns[name].append(value)
        if len(instance) != len(names):
            raise invalid(
                f"Failed to process element: {row} of 'instances' list. JSON object: {_excerpt(instance)} keys must "
                f"be equal to: {','.join(names)}"
            )
    return {name: _row_array(values, definition.inputs[name].dtype, key=name) for name, values in columns.items()}


def _row_array(rows: list[Any], datatype: int, *, key: str = "") -> np.ndarray:
    """Converts the values of an input, one for each row, to an array. `key` is the input's name if rows are objects."""
    try:
        return _to_array(rows, datatype)
    except ServingError as error:
        row, fault = _first_fault(rows, datatype) or (0, error)
        raise _bad_row(row, fault, key=key) from error


def _first_fault(rows: list[Any], datatype: int) -> tuple[int, ServingError] | None:
    """Returns the number of the first row that is not a tensor, or not one like the first row, and its error."""
    expected = _shape(rows[0])
    for row, value in enumerate(rows):
        try:
            _to_array(value, datatype)
        except ServingError as error:
            return row, error
        found = _shape(value)
        if math.prod(found) != math.prod(expected):
            return row, invalid(f"Expecting tensor size: {math.prod(expected)} but got: {math.prod(found)}")
        if found != expected:
            return row, invalid(f"Expecting shape {_text(expected)} but got: {_text(found)}")
    return None


def _bad_row(row: int, error: ServingError, *, key: str) -> ServingError:
    named = f" key: {key}" if key else ""
    return invalid(f"Failed to process element: {row}{named} of 'instances' list. Error: {error}")


def _bad_document(document: Mapping[str, Any], message: str) -> ServingError:
    return invalid(f"JSON Value: {_excerpt(document)} {message}")


def _parse_columns(inputs: Any, definition: meta_graph_pb2.SignatureDef) -> dict[str, np.ndarray]:
    names = sorted(definition.inputs)
    if not _is_object(inputs):
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
    """Returns whether a JSON value is the base64 form of bytes, {"b64": "..."}."""
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _is_object(value: Any) -> bool:
    """Returns whether a JSON value is an object that does not stand for bytes."""
    return isinstance(value, dict) and not _is_bytes(value)


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
    for size in shape:
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            raise _ragged(value, shape)
        level = list(itertools.chain.from_iterable(level))
    if list in set(map(type, level)):
        raise _ragged(value, shape)
    return level


def _ragged(value: Any, shape: Sequence[int]) -> ServingError:
    """Returns the error for the first part of nested lists that does not fit their shape."""
    waiting = [(value, 0)]
    while True:
        item, level = waiting.pop()
        if not isinstance(item, list):
            if level != len(shape):
                return invalid(
                    f"JSON Value: {_excerpt(item)} found at incorrect level: {level + 1} in the JSON DOM. Expected at "
                    f"level: {len(shape)}"
                )
        elif level >= len(shape):
            return invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
        elif len(item) != shape[level]:
            return invalid(
                f"Encountered list at unexpected size: {len(item)} at level: {level} expected size: {shape[level]}"
            )
        else:
            waiting.extend((part, level + 1) for part in reversed(item))


def _text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _to_bytes(value: str | dict[str, Any]) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8")
    if not _is_bytes(value):
        raise invalid(f"JSON Value: {_excerpt(value)} not formatted correctly for base64 data")
    text: str = "".join(value["b64"].split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"JSON Value: {_excerpt(value)} Unable to base64 decode") from error


def _parse_example(example: Any) -> bytes:
    if not isinstance(example, dict):
        raise invalid(f"Example must be JSON object but got JSON {_json_type(example)}")
    message = tf.train.Example()
    for name, value in example.items():
        feature = message.features.feature[name]
        for item in value if isinstance(value, list) else [value]:
            _add_value(item, name, feature)
    serialized: bytes = message.SerializeToString()
    return serialized


def _add_value(value: Any, name: str, feature: tf.train.Feature) -> None:
    """Adds a JSON value to the list of a feature. All values of a feature have the same type."""
    converted: int | float | bytes
    if isinstance(value, str) or _is_bytes(value):
        kind, converted = "bytes_list", _to_bytes(value)
    elif isinstance(value, bool | int) and -(2**63) <= value < 2**64:
        kind, converted = "int64_list", int(value)
    elif isinstance(value, int | float):  # an integer beyond 64 bits is a decimal number, as in other JSON parsers
        kind, converted = "float_list", _to_float(value)
    else:
        raise invalid(f"Feature: {name} has element with unexpected JSON type: {_json_type(value)}")
    known = feature.WhichOneof("kind")
    if known not in (None, kind):
        expected = known.removesuffix("_list")
        raise invalid(f"Unexpected element type in feature: {name} expecting type: {expected}")
    if kind == "int64_list" and converted >= 2**63:  # type: ignore[operator]  # it is an int
        raise invalid(f"Feature: {name} has uint64_t element. Only int64_t is supported. Received: {value}.")
    getattr(feature, kind).value.append(converted)


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _excerpt(value: Any) -> str:
    try:
        text = orjson.dumps(value).decode("utf-8", "replace")
    except (orjson.JSONEncodeError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 200 else text[:200] + "...TRUNCATED"


def _json_type(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    return {str: "String", dict: "Object", list: "Array", type(None): "Null"}.get(type(value), "Number")
