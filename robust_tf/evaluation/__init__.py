"""Measures a finished classifier: robustness to attacks and corruptions, calibration, and what it looks at.

Start with `run_evaluation` in `run.py` and `run_visualization` in `visualization.py`, which the programs
`robust_tf.evaluate` and `robust_tf.visualize` call.
"""
