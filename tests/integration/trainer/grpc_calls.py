"""Calls of gRPC methods by their names, in plain HTTP/2.

Nothing is said but an empty message, which every method takes, and nothing is read but the status: no gRPC library is needed for that.
"""

import importlib
import pkgutil
import socket
from types import TracebackType
from typing import Self

import h2.config
import h2.connection
import h2.events
import ray.core.generated

OK, UNIMPLEMENTED, UNAUTHENTICATED = 0, 12, 16
"""Status codes, as gRPC numbers them."""
NO_ANSWER = -1
"""The stream or the connection was closed without a status."""
EMPTY = b"\0\0\0\0\0"
"""One message, not compressed, of no bytes."""
NODE = "0" * 56
"""The id of no node, in hexadecimal."""
SECONDS = 30.0

UNGENERATED = (
    # Ray's wheel has no Python module for these (object_manager.proto, ray_syncer.proto); the last two are gRPC's own.
    "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.syncer.RaySyncer/StartSync",
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


def every_method() -> tuple[str, ...]:
    """The path of every method of every service of the installed Ray: /package.Service/Method."""
    found = set(UNGENERATED)
    package = ray.core.generated
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("_pb2"):
            continue
        descriptor = importlib.import_module(module.name).DESCRIPTOR
        found |= {f"/{service.full_name}/{method.name}" for service in descriptor.services_by_name.values() for method in service.methods}
    return tuple(sorted(found))


def service_of(method: str) -> str:
    """The service in /package.Service/Method."""
    return method.split("/")[1]


class GrpcCaller:
    """One connection to a server, for one call after the other. A context. Raises OSError where nobody speaks HTTP/2 there."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=SECONDS)
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._connection.initiate_connection()
        self._send()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def call(self, method: str, token: str | None, *, node: str | None = NODE) -> int:
        """The status with which a call of a method ends that says nothing.

        `node` is who calls, which Ray's stream of resources wants to know; others do not look at it. Raises ConnectionError where the
        server goes away instead.
        """
        stream = self._connection.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":authority", "head"), (":path", method)]
        headers += [("te", "trailers"), ("content-type", "application/grpc"), ("grpc-timeout", "5S")]
        headers += [("node_id", node)] if node is not None else []
        headers += [("authorization", f"Bearer {token}")] if token is not None else []
        self._connection.send_headers(stream, headers)
        self._connection.send_data(stream, EMPTY, end_stream=True)
        self._send()
        status: int = NO_ANSWER
        while True:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError(f"the connection was closed at {method}")
            for event in self._connection.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if getattr(event, "stream_id", None) != stream:
                    continue
                if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                    status = int(dict(event.headers).get("grpc-status", status))
                if isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)):
                    self._send()
                    return status
            self._send()

    def _send(self) -> None:
        self._socket.sendall(self._connection.data_to_send())
