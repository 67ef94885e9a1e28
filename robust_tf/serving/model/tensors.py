"""Converts the protocol's tensors and examples to arrays, and arrays to its tensors."""

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import input_pb2

from robust_tf.serving.model.status import invalid

# Limit for requests that declare a huge shape but hold a single value, which is then repeated to fill the shape.
_MAX_REPEATED_BYTES = 1 << 28

_VALUE_FIELDS = {
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.int64: "int64_val",
    tf.int32: "int_val",
    tf.int16: "int_val",
    tf.int8: "int_val",
    tf.uint16: "int_val",
    tf.uint8: "int_val",
    tf.uint32: "uint32_val",
    tf.uint64: "uint64_val",
    tf.bool: "bool_val",
    tf.string: "string_val",
}


def to_array(name: str, proto: tensor_pb2.TensorProto) -> np.ndarray:
    """Converts a tensor of a request to an array.

    Args:
        name: Name of the input, for the error message.
        proto: The tensor.

    Returns:
        The array. Strings are bytes in an object array.

    Raises:
        ServingError: The values do not fit the shape (INVALID_ARGUMENT).
    """
    try:
        dtype = tf.as_dtype(proto.dtype)
        dims = [dim.size for dim in proto.tensor_shape.dim]
        if proto.tensor_shape.unknown_rank or min(dims, default=0) < 0:
            raise ValueError("the shape must be known")
        if math.prod(dims) * max(dtype.size or 1, 1) > max(_MAX_REPEATED_BYTES, proto.ByteSize()):
            raise ValueError(f"the shape {dims} is too large for its {proto.ByteSize()} bytes")
        array: np.ndarray = tf.make_ndarray(proto)
    except (ValueError, TypeError, OverflowError, KeyError, IndexError) as error:
        raise invalid(f"tensor parsing error: {name}: {error}") from error
    return array


def to_proto(value: np.ndarray, *, packed: bool = False) -> tensor_pb2.TensorProto:
    """Converts an array to a tensor of a reply.

    Args:
        value: The array.
        packed: Whether to write the values as bytes (`tensor_content`) instead of in the typed field that TensorFlow
            Serving uses. Strings are always in the typed field.
    """
    field = _VALUE_FIELDS.get(tf.as_dtype(value.dtype))
    if field is None:
        return tf.make_tensor_proto(value)
    proto = tensor_pb2.TensorProto(dtype=tf.as_dtype(value.dtype).as_datatype_enum)
    for size in value.shape:
        proto.tensor_shape.dim.add(size=size)
    if packed and value.dtype != object:
        proto.tensor_content = value.astype(value.dtype.newbyteorder("<")).tobytes()
        return proto
    getattr(proto, field).extend(value.ravel().tolist())
    return proto


def examples_of(source: input_pb2.Input) -> list[bytes]:
    """Returns the serialized tf.Examples of a Classify or Regress request, each merged with the request's context.

    Raises:
        ServingError: The request holds no example (INVALID_ARGUMENT).
    """
    kind = source.WhichOneof("kind")
    if kind == "example_list":
        examples = [example.SerializeToString() for example in source.example_list.examples]
    elif kind == "example_list_with_context":
        # Concatenating serialized messages merges them. Where both set a feature, the later message wins, so
        # examples override the context.
        listed = source.example_list_with_context
        context = listed.context.SerializeToString()
        examples = [context + example.SerializeToString() for example in listed.examples]
    else:
        examples = []
    if not examples:
        raise invalid("Input is empty.")
    return examples
