"""Names of signatures."""

# The signature that runs if a request does not name one.
DEFAULT_SIGNATURE = "serving_default"
# TensorFlow lists the operation that initializes a model as if it were a signature, but requests cannot run it.
INIT_SIGNATURE = "__saved_model_init_op"
# The attack that an export serves if it was asked for. TensorFlow Serving does not know this name.
PROBE_SIGNATURE = "attack_probe"
# Of detectors and segmenters, whose default signature takes pixels.
IMAGE_BYTES_SIGNATURE = "image_bytes"
PREVIEW_SIGNATURE = "preview"
# Over REST, only strings whose name ends in "_bytes" may be anything but text.
MASK_OUTPUT = "mask_png_bytes"
