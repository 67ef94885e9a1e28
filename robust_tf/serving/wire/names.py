"""Names that TensorFlow Serving's protocol fixes."""

# The signature that runs if a request does not name one.
DEFAULT_SIGNATURE = "serving_default"
# TensorFlow lists the operation that initializes a model as if it were a signature, but requests cannot run it.
INIT_SIGNATURE = "__saved_model_init_op"
