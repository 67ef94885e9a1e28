"""Classifiers and trainers that jobs of one process train one after another, so that TensorFlow traces them only once.

Tracing takes longer than training where networks and data sets are small, as in a study on a CPU. Jobs that differ in
their seed, their source or their images only have the same traced functions.
"""

import json
import re
from collections.abc import Callable, Hashable
from typing import Any

import keras

from robust_tf.config.job import JobConfig
from robust_tf.flags import flat_values
from robust_tf.sharing import MOST_TRAINERS, is_sharing, shared
from robust_tf.training.checkpoint import named_arrays
from robust_tf.training.trainer import AdversarialTrainer

# Flags that change the values of variables or the images, but no traced function.
_UNTRACED = ("seed", "workdir", "source")


def reuses_trainer(job: JobConfig) -> bool:
    """Returns whether a job trains a classifier that other jobs of this process train before or after it.

    Jobs that change their classifier or optimizer during the training, or keep moving averages that start from the
    initial weights, do not.

    Args:
        job: Job to run.
    """
    changes = job.transfer.unfreeze_at_epoch is not None or job.adversarial.on_alarm == "rollback"
    plain = job.run.distribution == "none" and not job.transfer.cached and not job.optimization.ema_decay
    plain = plain and job.data.task_type == "classification"
    return is_sharing() and plain and not changes


def reused_classifier(job: JobConfig, classifier: keras.Model) -> keras.Model:
    """Returns a classifier with the same layers and weights, which earlier jobs may have trained. The job may train it.

    Args:
        job: Job to run.
        classifier: Classifier as the job would train it by itself.
    """
    if not reuses_trainer(job):
        return classifier
    same = shared(("classifier", _structure(classifier), _family(job)), lambda: classifier, most=MOST_TRAINERS)
    if same is not classifier:
        for variable, value in zip(same.variables, classifier.variables, strict=True):
            variable.assign(value)
    return same


def reused_trainer(
    job: JobConfig, classifier: keras.Model, make: Callable[[], AdversarialTrainer], *, besides: Hashable
) -> AdversarialTrainer:
    """Returns a trainer as `make` returns it, which earlier jobs may have used.

    Args:
        job: Job to run.
        classifier: The classifier of `reused_classifier`.
        make: Returns a compiled trainer of the classifier with all of its variables.
        besides: Everything else on which the trainer depends besides the flags of the job.
    """

    def made() -> tuple[AdversarialTrainer, list[Any]]:
        trainer = make()
        return trainer, list(named_arrays(_own_variables(trainer)).values())

    trainer, start = shared(("trainer", classifier, _family(job), besides), made, most=MOST_TRAINERS)
    for variable, value in zip(_own_variables(trainer), start, strict=True):
        variable.assign(value)
    trainer.seed.assign(job.run.seed)
    return trainer


def _structure(classifier: keras.Model) -> str:
    """Returns the JSON text of a classifier without what differs between classifiers with the same traced functions.

    Keras counts names up from model to model, so they are replaced by numbers. Initializers hold the seed of a job.
    """
    text = re.sub(r'"seed": \d+', '"seed": 0', classifier.to_json())
    names: dict[str, int] = {}

    def collect(entry: dict[str, Any]) -> dict[str, Any]:
        config = entry.get("config")
        if "class_name" in entry and isinstance(config, dict) and isinstance(config.get("name"), str):
            names.setdefault(config["name"], len(names))
        return entry

    json.loads(text, object_hook=collect)
    return re.sub(r'"([^"]*)"', lambda match: str(names.get(match[1], match[0])), text)


def _own_variables(trainer: AdversarialTrainer) -> list[keras.Variable]:
    """Returns the variables of a trainer that are not those of its classifier."""
    return trainer.state[len(trainer.classifier.variables) :]


def _family(job: JobConfig) -> tuple[tuple[str, Any], ...]:
    values = flat_values(job.resolved())
    return tuple((name, value) for name, value in sorted(values.items()) if name not in _UNTRACED)
