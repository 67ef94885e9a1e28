"""Names that TensorFlow Serving's protocol fixes."""

# The signature of a request that names none.
DEFAULT_SIGNATURE = "serving_default"
# TensorFlow lists the operation that initializes a model among its signatures; it is not one that a request can name.
INIT_SIGNATURE = "__saved_model_init_op"
