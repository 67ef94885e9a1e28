"""A SavedModel that is loaded: its signatures, requests in and answers out."""
