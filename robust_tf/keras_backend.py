"""Refuses a Keras backend other than TensorFlow as soon as this module is imported.

The packages that need TensorFlow import it first, so that the user gets one clear sentence before anything else fails.
"""

from robust_tf.environment import check_keras_backend

check_keras_backend()
