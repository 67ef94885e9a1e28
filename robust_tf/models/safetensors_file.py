"""Reads `.safetensors` files: a JSON header with the type, shape and position of each tensor, then the numbers.

The format is described at https://github.com/huggingface/safetensors#format. It contains no code, but a hostile file
can still claim wrong sizes and positions, so all of them are checked before an array is made.
"""

import json
import math
import mmap
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from robust_tf.errors import UserError
from robust_tf.models.torch_pickle import short

_DTYPES: dict[str, Any] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
# In bytes. The entry of each tensor takes about 120 bytes, and parsed JSON takes 25 times the memory of its text.
_LONGEST_HEADER = 2**22
_MAX_DIMENSIONS = 32


def is_safetensors(start: bytes) -> bool:
    """Returns whether a file is a `.safetensors` file. Unlike PyTorch's files, it starts with a length and then JSON.

    Args:
        start: First nine bytes of the file.
    """
    return start[8:9] == b"{" and start[6:8] == b"\x00\x00"


def read_safetensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by name, as read-only views of the file, in their order in the file.

    Args:
        file: File to read.

    Raises:
        UserError: The header is too long, incomplete or not JSON; a type is unknown; or tensors overlap, leave gaps, or
            reach beyond the file.
    """
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    available = len(data) - 8
    if length > min(_LONGEST_HEADER, available):
        raise UserError(
            f"The header of a .safetensors file must have at most {_LONGEST_HEADER} bytes, and lie inside the file. "
            f"Received: {length} bytes in a file of {len(data)}."
        )
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_repetition)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"The header of a .safetensors file must be JSON. Received: {type(error).__name__}.") from None
    header.pop("__metadata__", None)
    places = {name: _place(name, entry) for name, entry in header.items()}
    arrays, end = {}, 0
    for name, (dtype, shape, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != end or 8 + length + stop > len(data):
            raise UserError(
                "The tensors of a .safetensors file must follow one another inside the file, without gaps or overlaps. "
                f"Received: {short(name)} from {begin} to {stop}, but the previous tensor ends at {end} and the file "
                f"at {len(data) - 8 - length}."
            )
        arrays[name] = np.frombuffer(data, dtype, math.prod(shape), 8 + length + begin).reshape(shape)
        end = stop
    if 8 + length + end != len(data):
        raise UserError(
            f"A .safetensors file must end with its last tensor, at {8 + length + end} bytes. Received: {len(data)}."
        )
    return arrays


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise UserError(f"Names in a .safetensors file must be unique. Received: {short([n for n, _ in pairs])}.")
    return entries


def _place(name: str, entry: Any) -> tuple[np.dtype, list[int], int, int]:
    """Returns the type, shape and byte range of a tensor after checking that they agree with each other."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    code, shape, offsets = fields.get("dtype"), fields.get("shape", ()), fields.get("data_offsets", ())
    if not isinstance(code, str) or code not in _DTYPES:
        raise UserError(f"The dtype of {short(name)} must be one of {', '.join(_DTYPES)}. Received: {short(code)}.")
    dtype = np.dtype(_DTYPES[code])
    if not _are_counts(shape, at_most=_MAX_DIMENSIONS) or not _are_counts(offsets, at_most=2) or len(offsets) != 2:
        raise UserError(
            f"The shape and data_offsets of {short(name)} must be lists of integers of at least 0. Received: "
            f"{short(shape)}, {short(offsets)}."
        )
    begin, end = offsets
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
        raise UserError(f"The numbers of {short(name)} must take {short(size)} bytes. Received: {short(offsets)}.")
    return dtype, shape, begin, end


def _are_counts(values: Any, *, at_most: int) -> bool:
    return (
        isinstance(values, list) and len(values) <= at_most and all(type(n) is int and 0 <= n < 2**63 for n in values)
    )
