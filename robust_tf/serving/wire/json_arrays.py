"""Writes JSON that contains NumPy arrays, for requests and replies."""

import json
from typing import Any

import numpy as np
import orjson


def dump_json(document: Any) -> bytes:
    """Writes a document as JSON.

    Args:
        document: Dicts and lists of numbers, strings and numeric arrays. Arrays must be C-contiguous, and not float16.

    Returns:
        The document in UTF-8. A float32 is written with the fewest digits that identify it. NaN and infinity are
        written `NaN`, `Infinity` and `-Infinity`, as TensorFlow Serving does.

    Example:
        >>> dump_json({"predictions": np.float32([[0.1, 0.9]])})
        b'{"predictions":[[0.1,0.9]]}'
    """
    if _all_finite(document):
        content: bytes = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        return content
    # orjson would write NaN and infinity as null.
    return json.dumps(document, default=_to_shortest, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list):
        return not value or isinstance(value[0], str) or all(map(_all_finite, value))
    return not isinstance(value, (float, np.ndarray, np.floating)) or bool(np.isfinite(value).all())


def _to_shortest(value: np.ndarray | np.generic) -> Any:
    """Returns doubles that print with as few digits as the float32 needs: 0.1, not 0.10000000149011612."""
    if value.dtype == np.float32:
        return value.astype(str).astype(np.float64).tolist()
    return value.tolist()
