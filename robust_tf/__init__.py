"""Adversarially robust image classifiers that transfer, in Keras 3 and TensorFlow.

Importing this package does not import TensorFlow: `robust_tf.attacks`, `robust_tf.models`, … do.
"""

__version__ = "0.2.0"
