"""Publishing a classifier: building its signatures, verifying the export, and putting it in place."""
