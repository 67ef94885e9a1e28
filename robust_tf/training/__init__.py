"""Adversarial training of Keras models with Keras's own `compile`, `fit` and `evaluate`.

Start with `AdversarialTrainer`. To add an objective, see `robust_tf.training.objectives`.
"""

import robust_tf.keras_backend  # noqa: F401  # before Keras is imported
from robust_tf.attacks import AttackConfig
from robust_tf.training.metrics import MeanPerClassAccuracy
from robust_tf.training.objectives import Recipe
from robust_tf.training.trainer import AdversarialTrainer

__all__ = ["AdversarialTrainer", "AttackConfig", "MeanPerClassAccuracy", "Recipe"]
