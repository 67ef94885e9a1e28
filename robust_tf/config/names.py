"""Names of norms and attacks, so that flags can be checked without importing TensorFlow.

The code behind them is in `robust_tf.attacks`: `threat_models.NORMS`, `table.ATTACKS` and `autoattack.VERSIONS`. A test
compares these tables with the names here.
"""

from typing import Literal, TypeAlias, get_args

# All norms that at least one attack supports.
AttackNorm: TypeAlias = Literal["linf", "l2", "l1"]
NORM_NAMES: tuple[str, ...] = get_args(AttackNorm)

ATTACK_NAMES = (
    "fgsm",
    "pgd",
    "pgd-100x10",
    "apgd-ce",
    "apgd-dlr",
    "apgd-t",
    "fab-t",
    "square",
    "apgd-ce-x5",
    "apgd-dlr-x5",
    "fab-x5",
    "apgd-ce-rand",
    "apgd-dlr-rand",
)

# The versions of AutoAttack by their names in --attack.
AUTOATTACK_VERSIONS = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}
