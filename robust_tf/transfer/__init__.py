"""Transfer of a trained backbone to another task: a new head, other images, and which stages train.

Start with `replace_head`, which puts a new head on a classifier's backbone, and with `freeze`, which chooses the layers
that train.
"""

import robust_tf.keras_backend  # noqa: F401  # before Keras is imported
from robust_tf.transfer.heads import replace_head, with_dtype_policy, with_image_size, with_normalization
from robust_tf.transfer.stages import freeze, parameter_counts, stages

__all__ = [
    "freeze",
    "parameter_counts",
    "replace_head",
    "stages",
    "with_dtype_policy",
    "with_image_size",
    "with_normalization",
]
