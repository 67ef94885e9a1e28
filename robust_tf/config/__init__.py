"""The configuration of a job: frozen records that are read from flags and check themselves, without TensorFlow.

`JobConfig` holds one record for each topic. To add a flag, add a field to the record that it belongs to. A rule about
the fields of one record goes into its `__post_init__`, and a rule across records goes into `robust_tf.config.job`.
"""

from robust_tf.config.adversarial import AdversarialConfig
from robust_tf.config.attack import AttackConfig
from robust_tf.config.data import DataConfig
from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.config.optimization import OptimizationConfig
from robust_tf.config.run import PlanConfig, RunConfig
from robust_tf.config.transfer import TransferConfig

__all__ = [
    "AdversarialConfig",
    "AttackConfig",
    "DataConfig",
    "JobConfig",
    "OptimizationConfig",
    "PlanConfig",
    "RunConfig",
    "TransferConfig",
    "read_flag_file",
]
