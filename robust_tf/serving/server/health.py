"""The standard health service of gRPC (grpc.health.v1), with the services and statuses of TensorFlow Serving."""

import threading
from collections.abc import Callable
from typing import Any

import grpc

from robust_tf.errors import UserError

try:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
except ModuleNotFoundError as error:
    raise UserError(
        "--enable_grpc_healthcheck_service needs another package: pip install 'robust_tf[serve]'. Missing: "
        f"{error.name}, which is part of grpcio-health-checking."
    ) from error

# The name "" stands for the whole server, and is served from the start.
_SERVICES = ("ModelService", "PredictionService")


class HealthService(health.HealthServicer):
    """Answers Check and Watch. A server that is stopping is not serving.

    As in TensorFlow Serving, the statuses do not depend on the models. The port opens only when these are loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._streams_lock = threading.Lock()
        self._streams: set[Callable[[Any], None]] = set()
        for service in _SERVICES:
            self.set(service, health_pb2.HealthCheckResponse.SERVING)

    def add_to(self, server: grpc.Server) -> None:
        """Adds the service to a gRPC server."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def Watch(self, request: Any, context: grpc.ServicerContext, send_response_callback: Callable[[Any], None]) -> None:
        """Sends the status of a service now and whenever it changes."""

        def send(response: Any) -> None:
            if response is None:  # the end of the stream, which must not be sent twice
                with self._streams_lock:
                    if send not in self._streams:
                        return
                    self._streams.remove(send)
            send_response_callback(response)

        with self._streams_lock:
            self._streams.add(send)
        super().Watch(request, context, send)

    def stop(self) -> None:
        """Reports that no service is serving anymore, and ends the streams, for which the server would wait."""
        self.enter_graceful_shutdown()
        with self._streams_lock:
            streams = list(self._streams)
        for send in streams:
            send(None)
