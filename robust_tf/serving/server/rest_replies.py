"""The JSON replies of the REST interface, in TensorFlow Serving's format."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from robust_tf.serving.model.inference import Classification
from robust_tf.serving.model.session import type_name
from robust_tf.serving.model.status import invalid
from robust_tf.serving.wire.json_arrays import dump_json


def predict_reply(outputs: Mapping[str, np.ndarray], *, by_row: bool) -> bytes:
    """Returns the reply to a predict request.

    Args:
        outputs: An array for each output, by name.
        by_row: Whether the request listed its inputs by row. The reply then lists its outputs by row, too.

    Raises:
        ServingError: The outputs cannot be listed by row, or have a type that JSON cannot carry (INVALID_ARGUMENT).
    """
    values = {name: _as_json(name, value) for name, value in outputs.items()}
    single = len(values) == 1
    if not by_row:
        return dump_json({"outputs": next(iter(values.values())) if single else values})
    rows = None
    for name, value in outputs.items():
        if value.ndim == 0:
            raise invalid(f"Tensor name: {name} has no shape information, which 'instances' needs. Ask with 'inputs'.")
        if rows not in (None, len(value)):
            raise invalid(f"Tensor name: {name} has inconsistent batch size: {len(value)} expecting: {rows}")
        rows = len(value)
    if single:
        return dump_json({"predictions": next(iter(values.values()))})
    return dump_json(
        {"predictions": [{name: value[row] for name, value in values.items()} for row in range(rows or 0)]}
    )


def classify_reply(result: Classification) -> bytes:
    """Returns the reply to a classify request: [label, score] pairs for each example."""
    labels, scores = result.classes, result.scores
    if labels is None:
        labels = np.full(np.asarray(scores).shape, b"", object)
    if scores is None:
        scores = np.zeros(labels.shape, np.float32)
    rows = zip(_as_json("classes", labels), scores, strict=True)
    return dump_json({"results": [list(map(list, zip(names, values, strict=True))) for names, values in rows]})


def regress_reply(values: np.ndarray) -> bytes:
    """Returns the reply to a regress request: one number for each example."""
    return dump_json({"results": values})


def error_reply(message: str) -> bytes:
    """Returns the body of an error."""
    return dump_json({"error": message})


def _as_json(name: str, value: np.ndarray) -> Any:
    """Returns an output in a form that `dump_json` can write. Strings are base64 if the name ends in `_bytes`."""
    if value.dtype.kind in "fiub" and value.dtype != np.float16:
        return np.ascontiguousarray(value) if value.ndim else value[()]
    if value.dtype.kind not in "OSU":
        received = type_name(tf.as_dtype(value.dtype).as_datatype_enum)
        raise invalid(f"Failed to write JSON value for tensor type: {received}")
    encode = _to_b64 if name.endswith("_bytes") else _to_text
    return np.frompyfunc(encode, 1, 1)(value).tolist() if value.ndim else encode(value[()])


def _to_b64(value: Any) -> dict[str, str]:
    return {"b64": base64.b64encode(value).decode("ascii")}


def _to_text(value: Any) -> str:
    return str(value, "utf-8", "replace")
