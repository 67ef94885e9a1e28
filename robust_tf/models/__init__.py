"""Architectures, classifier files, and the exchange of weights with PyTorch checkpoints.

In these modules "the reference" is the PyTorch code whose checkpoints are read: MadryLab's library robustness and the
code of Salman et al. 2020 (arXiv 2007.08489), which builds on it.

To add an architecture, see `robust_tf.models.architectures`.
"""

import robust_tf.keras_backend  # noqa: F401  # before Keras is imported
from robust_tf.models.architectures import ARCHITECTURES, Architecture, build_classifier
from robust_tf.models.classifier_file import load_classifier, read_model, save_classifier
from robust_tf.models.conversion import classifier_from_checkpoint
from robust_tf.models.digest import weights_sha256
from robust_tf.models.execution import Execution
from robust_tf.models.plain import image_shape, outputs_of, pixel_warning, plain_classifier
from robust_tf.models.published import PUBLISHED, PublishedModel, fetch_published, standard_twin
from robust_tf.models.reference_checkpoint import ReferenceCheckpoint, read_reference_checkpoint
from robust_tf.models.reference_state import (
    load_reference_state,
    reference_architecture,
    reference_normalization,
    reference_num_classes,
    to_reference_state,
)
from robust_tf.models.representation import features_of

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Execution",
    "PUBLISHED",
    "PublishedModel",
    "ReferenceCheckpoint",
    "build_classifier",
    "classifier_from_checkpoint",
    "fetch_published",
    "features_of",
    "image_shape",
    "load_classifier",
    "load_reference_state",
    "outputs_of",
    "pixel_warning",
    "plain_classifier",
    "read_model",
    "read_reference_checkpoint",
    "reference_architecture",
    "reference_normalization",
    "reference_num_classes",
    "save_classifier",
    "standard_twin",
    "to_reference_state",
    "weights_sha256",
]
