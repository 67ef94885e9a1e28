"""Publishing a classifier: building its signatures, verifying the export, and putting it in place."""

from robust_tf.serving.publish.export import export_classifier
from robust_tf.serving.publish.probe import AttackProbe

__all__ = ["AttackProbe", "export_classifier"]
