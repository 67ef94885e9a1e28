"""Reads facts about a served model from the `results.json` of the job that trained it."""

from typing import Any

from robust_tf.data.transforms import Decoding
from robust_tf.errors import UserError
from robust_tf.json_records import to_json
from robust_tf.results import JobResults, MeasuredAttack
from robust_tf.serving.publish.probe import AttackProbe

LICENSE_NOT_STATED = "not stated"
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


def card_from_results(results: JobResults, *, license_name: str = "") -> dict[str, Any]:
    """Returns the facts for the model card: data, metric, accuracies and license.

    Args:
        results: Results of the job. Facts that it lacks become None.
        license_name: License of the classifier; "" means that it is not stated.
    """
    facts = {name: to_json(getattr(results, name)) for name in _CARD_KEYS}
    known = {name: None if value in ("", {}) else value for name, value in facts.items()}
    return known | {"license": license_name or LICENSE_NOT_STATED}


def decoding_from_results(results: JobResults) -> Decoding:
    """Returns how encoded images were decoded in training."""
    return Decoding(exif=results.exif, alpha_background=results.alpha_background)


def probe_from_results(results: JobResults, *, norm: str = "", steps: int = 20) -> AttackProbe:
    """Returns the attack to serve as the signature `attack_probe`.

    Args:
        results: Results of the job. The radius of its evaluation is used only if `norm` is the norm of that evaluation.
        norm: Norm of the attack, "linf" or "l2"; "" takes the norm of the job's evaluation.
        steps: Number of gradient steps.

    Raises:
        UserError: Neither `results` nor `norm` names a norm.
    """
    attack = results.robust_accuracy_attack or MeasuredAttack()
    chosen = norm or attack.norm
    if not chosen:
        raise UserError(
            "The attack probe needs a norm, and there is no results.json that names one. Received: norm=''. Use "
            "--norm=l2 or --norm=linf."
        )
    epsilon = attack.epsilon or 0.0 if chosen == attack.norm else 0.0
    return AttackProbe(norm=chosen, steps=steps, epsilon=epsilon)
