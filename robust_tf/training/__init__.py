"""Adversarial training on plain Keras `compile`, `fit` and `evaluate`."""

import robust_tf.keras_backend  # noqa: F401  # before Keras is imported
from robust_tf.attacks import AttackConfig
from robust_tf.training.metrics import MeanPerClassAccuracy
from robust_tf.training.trainer import AdversarialTrainer

__all__ = ["AdversarialTrainer", "AttackConfig", "MeanPerClassAccuracy"]
