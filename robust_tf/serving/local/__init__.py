"""A classifier or an export in this process, behind the interface of a client of a server."""

from robust_tf.serving.local.client import LocalClient, open_classifier, open_export

__all__ = ["LocalClient", "open_classifier", "open_export"]
