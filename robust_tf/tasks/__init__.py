"""Task types besides classification: detection and semantic segmentation."""
