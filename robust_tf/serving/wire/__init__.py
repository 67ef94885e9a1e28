"""The parts that the client and the server share. They do not import TensorFlow."""
