"""Data sets for semantic segmentation: images with masks, read from folders or from TFDS, and their transforms.

A record is (index, encoded image, label) as for classification. The label is an encoded PNG of the size of the image.
The value of a pixel is its class, or 255 if it is ignored. In a PNG with a palette, it is the position in the palette.
See `decode_mask`.
"""

from robust_tf.data.masks.mask_files import decode_mask
from robust_tf.data.masks.open_masks import open_masks
from robust_tf.data.masks.transforms import MaskPreprocessing

__all__ = ["MaskPreprocessing", "decode_mask", "open_masks"]
