"""What the client and the server have in common; imports no TensorFlow."""
