"""The facts in the card of a served model: from the `results.json` of its training job, and from the export itself."""

import dataclasses
import datetime
import platform
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

import robust_tf
from robust_tf.config.data import TaskType
from robust_tf.data.transforms import Decoding
from robust_tf.errors import UserError
from robust_tf.json_records import to_json
from robust_tf.models import weights_sha256
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
_ACCURACIES = ("clean_accuracy", "mean_per_class_accuracy", "robust_accuracy")


def card_from_results(
    results: JobResults, *, license_name: str = "", task_type: TaskType = "classification"
) -> dict[str, Any]:
    """Returns the facts for the model card: data, metric, figures and license.

    Args:
        results: Results of the job. Facts that it lacks become None.
        license_name: License of the model; "" means that it is not stated.
        task_type: What the model predicts. The figures of a classifier are accuracies. Those of a detector or segmenter
            are the values of its metric, `clean` and `robust`.
    """
    names = list(_CARD_KEYS)
    if task_type != "classification":
        names = [*(name for name in names if name not in _ACCURACIES), "clean", "robust"]
    facts = {name: to_json(getattr(results, name)) for name in names}
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


def export_facts(
    model: keras.Model, model_name: str, *, labels: Sequence[str], resize_size: int, decoding: Decoding
) -> dict[str, Any]:
    """Returns the facts that an export itself adds to the card: sizes, classes, pixel range, digest and versions.

    Args:
        model: The model that is published, with images (batch, size, size, 3) in [0, 1].
        model_name: Name of the model in requests.
        labels: Names of the classes.
        resize_size: Length in pixels to which an encoded image is resized.
        decoding: How encoded images are decoded.
    """
    return {
        "model_name": model_name,
        "architecture": model.name,
        "weights_sha256": weights_sha256(model),
        "classes": len(labels),
        "labels": list(labels),
        "image_size": model.input_shape[1],
        "resize_size": resize_size,
        "pixel_range": [0.0, 1.0],
        **dataclasses.asdict(decoding),
        "exported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "export_versions": {
            "robust_tf": robust_tf.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "python": platform.python_version(),
        },
    }


def checked_labels(labels: Sequence[str] | None, num_classes: int) -> list[str]:
    """Returns the names of the classes, by default "0", "1", ...

    Args:
        labels: Names of the classes in the order of the logits, or None.
        num_classes: Number of classes of the model.

    Raises:
        UserError: There is not exactly one name for each class, or a name is not one line of text.
    """
    if labels is None:
        return [str(index) for index in range(num_classes)]
    if len(labels) != num_classes:
        raise UserError(
            f"Each of the classifier's {num_classes} classes needs a label. Received: {len(labels)} labels."
        )
    for label in labels:
        if not label.strip() or "\n" in label or "\r" in label:
            raise UserError(f"A label must be one line of text that is not empty. Received: {label!r}.")
    if len(set(labels)) != len(labels):
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        raise UserError(f"Labels must differ from each other. Received more than once: {', '.join(twice)}.")
    return list(labels)
