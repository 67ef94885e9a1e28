"""What a training job's `results.json` tells about a model that is served."""

from collections.abc import Mapping
from typing import Any

from robust_tf.data.transforms import Decoding
from robust_tf.errors import UserError
from robust_tf.results import job_record
from robust_tf.serving.publish.probe import AttackProbe

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
    record = job_record(results)
    chosen = norm or record.norm
    if not chosen:
        raise UserError(
            "The attack probe needs a norm, and there is no results.json with one. Received: norm=''. Give --norm=l2 "
            "or --norm=linf."
        )
    epsilon = record.epsilon or 0.0 if chosen == record.norm else 0.0
    return AttackProbe(norm=chosen, steps=steps, epsilon=epsilon)
