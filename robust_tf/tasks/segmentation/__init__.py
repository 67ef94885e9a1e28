"""Semantic segmentation: the model, its loss, its metrics, and the attacks on it.

A mask holds the class of every pixel, and `IGNORED` for pixels whose class is unknown or does not matter. Such pixels
count in no loss and in no metric.
"""
