"""How the load generator's requests travel: HTTP/1.1 and gRPC, built by tritonclient and sent with as little of our own time as possible.

A load generator shares the machine with the server that it measures. tritonclient's own clients build a request anew each time and
take about half a millisecond of CPU for it; these bytes are made once, and an answer is read only as far as its status.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from forja.errors import BadInput
from forja.serving.repository import INPUT, OUTPUT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["ok", "rejected", "timeout", "overflow", "other"]
"""How a request ends: answered, refused because the server has too much to do, not in time, not sent because too many were under way,
or with another error."""
Done = Callable[[Kind], None]
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model at a server."""

    address: str
    """host:port of the protocol."""
    model: str
    protocol: Literal["http", "grpc"] = "http"
    version: str = ""
    """A version, or the one that is served."""

    def __post_init__(self) -> None:
        if self.protocol not in ("http", "grpc"):
            raise BadInput("protocol of the load generator", value=self.protocol, allowed="http or grpc")


class Transport(Protocol):
    """What carries requests."""

    def send(self, number: int, done: Done) -> None:
        """Send request ``number`` (they go round); ``done`` is called once, when it has ended."""

    async def close(self) -> None:
        """End all connections."""


def connect(target: Target, samples: Sequence[NDArray[np.float32]], timeout_s: float) -> Transport:
    """A transport for requests of these samples, each float32 [n, *shape], inside a running event loop."""
    if target.protocol == "http":
        return _Http(target, http_requests(target, samples), timeout_s)
    return _Grpc(target, [_message(target, sample) for sample in samples], timeout_s)


def body(sample: NDArray[np.float32]) -> tuple[bytes, int]:
    """Body of an HTTP request, float32 [n, *shape] as binary, and the length of its JSON part."""
    from tritonclient import http

    tensor = http.InferInput(INPUT, list(sample.shape), "FP32")
    tensor.set_data_from_numpy(sample)
    made: tuple[bytes, int] = http.InferenceServerClient.generate_request_body([tensor], outputs=[http.InferRequestedOutput(OUTPUT)])
    return made


def path(target: Target) -> str:
    """Path of inference over HTTP."""
    return f"/v2/models/{target.model}{f'/versions/{target.version}' if target.version else ''}/infer"


def http_requests(target: Target, samples: Sequence[NDArray[np.float32]]) -> list[bytes]:
    """Whole requests, as they go over the wire."""
    found = []
    for sample in samples:
        content, json_bytes = body(sample)
        head = (
            f"POST {path(target)} HTTP/1.1\r\nHost: {target.address}\r\nContent-Type: application/octet-stream\r\n"
            f"Inference-Header-Content-Length: {json_bytes}\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        found.append(head.encode() + content)
    return found


class _Http:
    """Keeps a connection for each request that is under way; an idle one is used again."""

    def __init__(self, target: Target, requests: list[bytes], timeout_s: float) -> None:
        host, _, port = target.address.rpartition(":")
        self.place, self.requests, self.timeout_s = (host, int(port)), requests, timeout_s
        self.idle: list[_Connection] = []
        self.all: set[_Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()

    def send(self, number: int, done: Done) -> None:
        request = self.requests[number % len(self.requests)]
        if self.idle:
            self.idle.pop().ask(request, done)
            return
        task = self._loop.create_task(self._open(request, done))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, request: bytes, done: Done) -> None:
        try:
            _, connection = await self._loop.create_connection(lambda: _Connection(self), *self.place)
        except OSError:
            done("other")
            return
        connection.ask(request, done)

    async def close(self) -> None:
        for connection in list(self.all):
            connection.transport.abort()
        await asyncio.sleep(0)


class _Connection(asyncio.Protocol):
    """One request at a time."""

    transport: asyncio.Transport

    def __init__(self, owner: _Http) -> None:
        self._owner = owner
        self._buffer = bytearray()
        self._whole = 0
        self._done: Done | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._owner.all.add(self)

    def ask(self, request: bytes, done: Done) -> None:
        """Send one; the answer, or the end of the time or of the connection, calls ``done``."""
        self._done = done
        self._timer = self._owner._loop.call_later(self._owner.timeout_s, self._late)
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._whole:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            length = LENGTH.search(self._buffer, 0, end)
            if length is None:  # neither Triton nor Envoy answers so
                self._end("other", keep=False)
                return
            self._whole = end + 4 + int(length[1])
        if len(self._buffer) >= self._whole:
            status = bytes(self._buffer[9:12])
            self._buffer.clear()
            self._whole = 0
            self._end("ok" if status == b"200" else "rejected" if status == b"503" else "other", keep=True)

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.all.discard(self)
        if self in self._owner.idle:
            self._owner.idle.remove(self)
        self._end("other", keep=False)

    def _late(self) -> None:
        self._end("timeout", keep=False)

    def _end(self, kind: Kind, *, keep: bool) -> None:
        done, self._done = self._done, None
        if self._timer is not None:
            self._timer.cancel()
        if keep:
            self._owner.idle.append(self)
        else:
            self.transport.abort()
        if done is not None:
            done(kind)


class _Grpc:
    """All requests over one connection, which is what gRPC does."""

    def __init__(self, target: Target, messages: list[bytes], timeout_s: float) -> None:
        import grpc  # type: ignore[import-untyped]

        self._grpc, self._messages, self._timeout_s = grpc, messages, timeout_s
        # A pool that other channels of this process shared would measure their requests too.
        self._channel = grpc.aio.insecure_channel(target.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._infer = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, number: int, done: Done) -> None:
        task = asyncio.get_running_loop().create_task(self._one(self._messages[number % len(self._messages)], done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, message: bytes, done: Done) -> None:
        code = self._grpc.StatusCode
        try:
            await self._infer(message, timeout=self._timeout_s)
        except self._grpc.aio.AioRpcError as error:
            # A server that isn't there is UNAVAILABLE too, but says so in the transport's words.
            refused = error.code() == code.UNAVAILABLE and "connect" not in (error.details() or "").lower()
            done("timeout" if error.code() == code.DEADLINE_EXCEEDED else "rejected" if refused else "other")
            return
        done("ok")

    async def close(self) -> None:
        await self._channel.close()


def _message(target: Target, sample: NDArray[np.float32]) -> bytes:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=target.model, model_version=target.version)
    tensor = request.inputs.add(name=INPUT, datatype="FP32")
    tensor.shape.extend(sample.shape)
    request.outputs.add(name=OUTPUT)
    request.raw_input_contents.append(sample.astype("<f4").tobytes())
    encoded: bytes = request.SerializeToString()
    return encoded
