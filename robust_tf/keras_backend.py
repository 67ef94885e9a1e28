"""Imported first by the parts of the package that need TensorFlow: says at once when Keras runs on something else."""

from robust_tf.environment import check_keras_backend

check_keras_backend()
