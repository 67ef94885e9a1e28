"""Names of norms and attacks, so that flags can be checked without importing TensorFlow.

The code behind them is in `robust_tf.attacks`: `threat_models.NORMS`, `table.ATTACKS` and `autoattack.VERSIONS`. A test
compares these tables with the names here.
"""

NORM_NAMES = ("linf", "l2", "l1")

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

# What --attack calls the versions of AutoAttack.
AUTOATTACK_VERSIONS = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}
