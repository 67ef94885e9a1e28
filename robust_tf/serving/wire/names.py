"""Names of signatures."""

# The signature that runs if a request does not name one.
DEFAULT_SIGNATURE = "serving_default"
# TensorFlow lists the operation that initializes a model as if it were a signature, but requests cannot run it.
INIT_SIGNATURE = "__saved_model_init_op"
# The attack that an export serves if it was asked for. TensorFlow Serving does not know this name.
PROBE_SIGNATURE = "attack_probe"
