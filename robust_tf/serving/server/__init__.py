"""The server: REST and gRPC endpoints, versions, batching and metrics, as TF Serving has them."""
