"""Tasks other than classification: their networks, losses and measures."""
