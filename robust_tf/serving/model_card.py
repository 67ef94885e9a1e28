"""What a training job's `results.json` tells the export: facts that a `.keras` file doesn't hold."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from robust_tf.data.transforms import Decoding
from robust_tf.errors import UserError
from robust_tf.serving.probe import AttackProbe

_CARD_KEYS = (
    "task",
    "dataset",
    "source",
    "transfer_mode",
    "metric",
    "clean_accuracy",
    "mean_per_class_accuracy",
    "robust_accuracy",
    "robust_accuracy_attack",
    "num_test_images",
    "seed",
    "versions",
)


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """A job's results; empty when there is no such file.

    Raises:
        UserError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Move it away to export without its facts.") from error
    if not isinstance(results, dict):
        raise UserError(f"{path} must hold a JSON object. Received: {type(results).__name__}.")
    return results


def card_from_results(results: Mapping[str, Any], *, licence: str = "") -> dict[str, Any]:
    """Data, metric and accuracies for the model card, and the licence ("not stated" when empty)."""
    return {key: results[key] for key in _CARD_KEYS if key in results} | {"license": licence or "not stated"}


def decoding_from_results(results: Mapping[str, Any]) -> Decoding:
    """How encoded images were read in training; jobs of before these flags read them as they are stored."""
    return Decoding(**{key: results[key] for key in ("exif", "alpha_background") if key in results})


def probe_from_results(results: Mapping[str, Any], *, norm: str = "", steps: int = 20) -> AttackProbe:
    """The attack to serve: in the norm that the classifier was evaluated in, unless `norm` says otherwise.

    Raises:
        UserError: neither the results nor `norm` name a norm.
    """
    evaluated = results.get("robust_accuracy_attack") or {}
    chosen = norm or evaluated.get("norm", "")
    if not chosen:
        raise UserError(
            "The attack probe needs a norm, and there is no results.json with one. Received: norm=''. Give --norm=l2 "
            "or --norm=linf."
        )
    epsilon = evaluated.get("epsilon", 0.0) if chosen == evaluated.get("norm") else 0.0
    return AttackProbe(norm=chosen, steps=steps, epsilon=epsilon)
