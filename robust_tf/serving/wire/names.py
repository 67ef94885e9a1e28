"""Names that TensorFlow Serving's protocol fixes."""

# The signature of a request that names none.
DEFAULT_SIGNATURE = "serving_default"
# TensorFlow lists the operation that initializes a model among the signatures, but requests cannot name it.
INIT_SIGNATURE = "__saved_model_init_op"
