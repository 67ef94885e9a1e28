"""A client for TensorFlow Serving and for `robust_tf.serve`, over REST and gRPC; importing it loads no TensorFlow."""

from robust_tf.serving.client.base import Client, Guess, ServerError, Signature, TensorInfo
from robust_tf.serving.client.client import connect

__all__ = ["Client", "Guess", "ServerError", "Signature", "TensorInfo", "connect"]
