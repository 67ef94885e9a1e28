"""Adversarial attacks on any callable from images in [0, 1] to logits.

Start with `pgd` for adversarial examples, and with `autoattack` for a robust accuracy that you can compare with
published ones. `ATTACKS` holds every attack with its published settings, and `NORMS` holds the geometry of every norm.
`robust_tf.attacks.table` explains how to add an attack, and `robust_tf.attacks.threat_models` how to add a norm.

In these modules an attack "fells" an image if it makes the model's prediction wrong. An image "has fallen" when its
prediction is wrong, and "resists" as long as it is correct. "The reference" is MadryLab's library robustness.
"""

import robust_tf.keras_backend  # noqa: F401  # before Keras is imported
from robust_tf.attacks.apgd import apgd
from robust_tf.attacks.autoattack import VERSIONS, AutoAttackResult, attacks_of_version, autoattack
from robust_tf.attacks.cascade import cascade
from robust_tf.attacks.cascade_state import CascadeState
from robust_tf.attacks.compiled import CompiledAttacks
from robust_tf.attacks.fab import fab
from robust_tf.attacks.fgsm import fgsm
from robust_tf.attacks.pgd import AttackResult, climb, pgd, run_pgd
from robust_tf.attacks.square import square
from robust_tf.attacks.table import ATTACKS, NamedAttack, check_attacks
from robust_tf.attacks.threat_models import NORMS, Geometry
from robust_tf.attacks.warning_flags import zero_gradient_share
from robust_tf.config.attack import AttackConfig
from robust_tf.errors import AttackWarning

__all__ = [
    "ATTACKS",
    "NORMS",
    "VERSIONS",
    "AttackConfig",
    "AttackResult",
    "AttackWarning",
    "AutoAttackResult",
    "CascadeState",
    "CompiledAttacks",
    "Geometry",
    "NamedAttack",
    "apgd",
    "attacks_of_version",
    "autoattack",
    "cascade",
    "check_attacks",
    "climb",
    "fab",
    "fgsm",
    "pgd",
    "run_pgd",
    "square",
    "zero_gradient_share",
]
