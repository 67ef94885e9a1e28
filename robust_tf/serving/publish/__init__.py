"""From a classifier to a published, verified version folder."""
