"""A SavedModel in memory: loading it, running its signatures, and finding its versions on disk."""
