"""Adversarially robust image classifiers that transfer, in Keras 3 and TensorFlow.

The library is in these packages:

* `robust_tf.attacks`: adversarial attacks, from FGSM to AutoAttack, on any Keras model or callable.
* `robust_tf.training`: adversarial training of any Keras classifier with `compile` and `fit`.
* `robust_tf.transfer`: new heads, frozen stages and changed copies of a trained classifier.
* `robust_tf.models`: architectures, published robust models, and conversion from PyTorch checkpoints.
* `robust_tf.data`: data sets and image folders as TensorFlow input pipelines.
* `robust_tf.serving`: publishing, a server and clients for trained classifiers.

The programs, such as `python -m robust_tf.train`, describe themselves with `--help`. Importing `robust_tf` alone does
not import TensorFlow.
"""

__version__ = "0.2.0"
