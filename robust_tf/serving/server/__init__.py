"""The server, with REST, gRPC, versions, batching and metrics as in TensorFlow Serving."""
