"""Measures a finished classifier: robustness to attacks and corruptions, calibration, and what it looks at.

The programs `robust_tf.evaluate` and `robust_tf.visualize` are the way in.
"""
