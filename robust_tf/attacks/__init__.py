"""Attacks on any callable from [0, 1] images to logits."""

import robust_tf.keras_backend  # noqa: F401  # before Keras is imported
from robust_tf.attacks.apgd import apgd
from robust_tf.attacks.autoattack import VERSIONS, AutoAttackResult, attacks_of, autoattack
from robust_tf.attacks.cascade import CascadeState, CompiledAttacks, cascade
from robust_tf.attacks.fab import fab
from robust_tf.attacks.fgsm import fgsm
from robust_tf.attacks.pgd import AttackResult, climb, pgd, run_pgd
from robust_tf.attacks.square import square
from robust_tf.attacks.table import ATTACKS, check_attacks
from robust_tf.attacks.threat_models import NORMS
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
    "apgd",
    "attacks_of",
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
