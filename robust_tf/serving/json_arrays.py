"""JSON with NumPy arrays in it: for replies and for the client, which needs no TensorFlow."""

import json
from typing import Any

import numpy as np
import orjson


def dump_json(document: Any) -> bytes:
    """Dicts and lists of numbers, strings and numeric arrays (C-contiguous, no float16) as UTF-8.

    A float32 is written with as few digits as name it; NaN and infinity as the words that TensorFlow Serving uses.
    """
    if _all_finite(document):
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson has no word for NaN and infinity.
    return json.dumps(document, default=_shortest, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list):
        return not value or isinstance(value[0], str) or all(map(_all_finite, value))
    return not isinstance(value, (float, np.ndarray, np.floating)) or bool(np.isfinite(value).all())


def _shortest(value: np.ndarray | np.generic) -> Any:
    """Numbers with as few digits as name the same float32, not those of the nearest double."""
    if value.dtype == np.float32:
        return value.astype(str).astype(np.float64).tolist()
    return value.tolist()
