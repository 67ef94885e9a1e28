"""What is measured on a finished classifier: attacks, corruptions, calibration, and pictures of what it looks at."""
