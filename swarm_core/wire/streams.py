"""Open streams: frames over a bidirectional gRPC call, dialled or served, every byte counted. Knows no message's meaning.

Every stream has a TCP connection of its own, so bulk on one delays nothing on another: links between neighbours, the
anchor's stream and samplers' feeds each have theirs. Within a link control shares the order of the tensors, and loses
nothing by it: a VOTE must follow its last gradient anyway, and when stage 0 decides, every activation of the tick has been
consumed, so nothing that is large stands before a DECIDE, or before the BEGIN behind it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import grpc

from swarm_core.errors import UserError
from swarm_core.wire.beats import Heart
from swarm_core.wire.channel import OPTIONS, open_channel
from swarm_core.wire.door import HELLO_LIMIT, HELLO_S, Door
from swarm_core.wire.errors import (
    BadAddress,
    BadFrame,
    Nameless,
    NotAllowed,
    PeerLost,
    PortInUse,
    Refused,
    Silent,
    Unencrypted,
    WireError,
    from_status,
    status_of,
)
from swarm_core.wire.frames import CHUNK_BYTES, Assembler, Frame, Header, chunks_of, message_bytes
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Report
from swarm_core.wire.pacing import NO_LIMITS, Limits
from swarm_core.wire.tls import Caller, Identity

ALL_INTERFACES = ("0.0.0.0", "::", "*")
log = logging.getLogger(__name__)
Handler = Callable[["FrameStream"], Awaitable[None]]
Answer = Callable[[Caller, bytes], Awaitable[bytes]]

MOST_CALLS = 1024  # open at a server at a time, whoever makes them
# Everything that gRPC raises for a stream that is no more; which one depends on the moment.
BROKEN = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


def _raw(data: bytes) -> bytes:
    return data


class FrameStream:
    """One bidirectional stream of frames. Sending is serialised, so the chunks of a frame stay together.

    `link` and `direction` name the ledger rows; the sender counts. For a link "a-b", down is from a to b.
    """

    def __init__(
        self, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]], ledger: Ledger, peer: str
    ) -> None:
        self._read = read
        self._write = write
        self._ledger = ledger
        self._lock = asyncio.Lock()
        self._assembler = Assembler({})
        self.limits = NO_LIMITS
        self.sent_tick = 0  # of the newest frame sent
        self.sent_at = 0.0
        self.on_first: Callable[[], None] | None = None  # called with the first frame that comes
        self.link = ""
        self.direction = "down"
        self.peer = peer
        self.loopback = False
        self.caller: Caller | None = None  # proved by its certificate; None: a plain stream, or one that was dialled
        self.heart = Heart(self)

    def name(self, link: str, direction: str, limits: dict[FrameKind, int] | None = None) -> FrameStream:
        """Say which link this is (ledger rows) and how large frames may get, once the peer is known."""
        self.link, self.direction = link, direction
        self._assembler = Assembler(limits or {})
        return self

    def must_be_stage(self, stage: int) -> None:
        """What the peer says of itself must be what its certificate says. Raises NotAllowed; a plain stream proves nothing."""
        if self.caller is not None and self.caller.name.stage != stage:
            raise NotAllowed(
                f"a certificate for {self.caller.name} joins as that, not as stage {stage}: use a token for it"
            )

    def bound(self, limit: Callable[[Header], int]) -> None:
        """Say how large a frame may get by its whole header, before anything is allocated for it."""
        self._assembler.limit = limit

    def pace(self, limits: Limits) -> FrameStream:
        """Keep to the limits of this host's line from now on."""
        self.limits = limits
        return self

    @property
    def busy(self) -> bool:
        """Whether a frame is being sent."""
        return self._lock.locked()

    async def send_ahead(self, frame: Frame) -> None:
        """Send a small frame that is counted before it is: a report made meanwhile must not miss it."""
        self._count(frame, message_bytes(memoryview(frame.payload).nbytes))
        await self.send(frame, count=False)

    async def send_report(self, report: Report, tick: int) -> None:
        """Send a report that carries everything this process has counted so far, the report itself included."""
        payload = self._ledger.take_report(report, tick, self.link, self.direction)
        await self.send(Frame(Header(FrameKind.REPORT, tick=tick), payload), count=False)

    async def send(self, frame: Frame, *, count: bool = True) -> None:
        """Write a frame and count it. Raises PeerLost when the stream is gone."""
        message = 0
        up = self.limits.up
        # What counts itself (a report) foretold its size in chunks of the usual size.
        chunk_bytes = up.chunk_bytes if up is not None and count else CHUNK_BYTES
        async with self._lock:
            for chunk in chunks_of(frame, chunk_bytes):
                if up is not None:
                    await up.take(len(chunk))
                try:
                    await self._write(chunk)
                except BROKEN as error:
                    raise await self._lost(error) from None
                message += len(chunk)
            self.sent_tick, self.sent_at = frame.header.tick, time.monotonic()
        if count:
            self._count(frame, message)

    def _count(self, frame: Frame, message: int) -> None:
        self._ledger.count(
            frame.header.tick,
            self.link,
            self.direction,
            frame.header.kind,
            frame.header.mode,
            dense=frame.dense_bytes,
            packet=memoryview(frame.payload).nbytes,
            message=message,
        )

    async def receive(self) -> Frame | None:
        """The next whole frame; None when the peer has closed the stream. Raises PeerLost (Silent), Refused, BadFrame."""
        while True:
            try:
                message = await self.heart.read(self._read())
            except BROKEN as error:
                raise await self._lost(error) from None
            if message is grpc.aio.EOF:
                return None
            if self.limits.down is not None:
                await self.limits.down.take(len(message))
            frame = self._assembler.feed(message)
            if frame is None or frame.header.kind is FrameKind.WARM:
                continue
            if frame.header.kind is not FrameKind.BEAT:
                if self.on_first is not None:
                    self.on_first()
                    self.on_first = None
                return frame
            self.heart.take(frame)

    async def expect(self, kind: FrameKind) -> Frame:
        """The next frame, which must be of this kind."""
        frame = await self.receive()
        if frame is None:
            raise PeerLost(f"{self.peer} closed the stream; a {kind.name} was expected")
        if frame.header.kind is not kind:
            raise BadFrame(f"{self.peer} sent {frame.header.kind.name}; a {kind.name} was expected")
        return frame

    async def _lost(self, error: Exception) -> Exception:
        if isinstance(error, grpc.aio.AioRpcError):
            return from_status(error.code(), error.details() or "", self.peer)
        return PeerLost(f"the stream to {self.peer} broke ({type(error).__name__})")


class Dialled(FrameStream):
    """The dialling side of a stream; owns its channel."""

    def __init__(self, channel: grpc.aio.Channel, call: Any, ledger: Ledger, peer: str, loopback: bool = False) -> None:
        super().__init__(call.read, call.write, ledger, peer)
        self.loopback = loopback
        self._channel = channel
        self._call = call

    async def _lost(self, error: Exception) -> Exception:
        if not isinstance(error, grpc.aio.AioRpcError) and self._call.done():
            # A write on a finished call says only "invalid state"; the call itself knows why it ended.
            return from_status(await self._call.code(), await self._call.details() or "", self.peer)
        return await super()._lost(error)

    async def done(self) -> None:
        """Say that nothing more will be sent. Raises PeerLost when the stream is gone."""
        self.heart.stop()
        async with self._lock:
            try:
                await self._call.done_writing()
            except BROKEN as error:
                raise await self._lost(error) from None

    async def finish(self, wait_s: float = 5.0) -> None:
        """Say that nothing more will be sent, wait until the peer has read it all and closed its side, then close."""
        try:
            await self.done()
            async with asyncio.timeout(wait_s):
                while await self._read() is not grpc.aio.EOF:
                    pass
        except (*BROKEN, WireError, TimeoutError):
            pass
        await self.close()

    async def close(self) -> None:
        self.heart.stop()
        self._call.cancel()
        await self._channel.close(grace=1.0)


async def dial(
    address: str,
    method: str,
    ledger: Ledger,
    who: str,
    wait_s: float,
    on_wait: Callable[[float], None] | None = None,
    identity: Identity | None = None,
    stage: int | None = None,
) -> Dialled:
    """Open a stream to `method` ("Anchor/Attend"), waiting up to `wait_s` for the peer to come up.

    `on_wait(seconds waited)` is called every two seconds meanwhile. With an `identity` the stream is encrypted, and the
    peer must prove to be the anchor, or `stage`. Raises BadAddress, Unreachable, Unauthenticated, NotAllowed.
    """
    ledger.tls = ledger.tls or identity is not None
    split_address(address)
    channel = await open_channel(address, method, who, wait_s, on_wait, identity, stage)
    call = channel.stream_stream(f"/swarm.v1.{method}", request_serializer=_raw, response_deserializer=_raw)()
    return Dialled(channel, call, ledger, f"{who} at {address}", is_loopback(address))


class Server:
    """Serves streams; a refused or broken stream ends with the status of its error.

    With an `identity`, set before the start, it is encrypted, and each caller has the methods of its certificate and no
    more. `trusted_network` lets a plain one listen where other machines reach it.
    """

    def __init__(self, service: str, handlers: dict[str, Handler], ledger: Ledger) -> None:
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MOST_CALLS)
        self._service = service
        self._ledger = ledger
        self.limits = NO_LIMITS
        self.door = Door()
        self.identity: Identity | None = None
        self.trusted_network = False
        self._credentials: grpc.ServerCredentials | None = None
        methods = {
            name: grpc.stream_stream_rpc_method_handler(
                self._serve(f"{service}/{name}", handler), request_deserializer=_raw, response_serializer=_raw
            )
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"swarm.v1.{service}", methods),))

    def add_answer(self, name: str, answer: Answer) -> None:
        """One request of bytes, one answer: for callers with a certificate only. Before the start."""

        async def serve(data: bytes, context: Any) -> bytes:
            try:
                if self.identity is None:
                    raise NotAllowed(f"{self._service}/{name} needs TLS, and this server does without")
                return await answer(self.identity.admit(f"{self._service}/{name}", context.auth_context()), data)
            except Refused as error:
                await context.abort(status_of(error), str(error))
                raise AssertionError("abort raises") from None

        methods: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(serve)}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(f"swarm.v1.{self._service}", methods),)
        )

    def _serve(self, method: str, handler: Handler) -> Callable[[Any, Any], Awaitable[None]]:
        async def serve(_request_iterator: Any, context: Any) -> None:
            stream = FrameStream(context.read, context.write, self._ledger, context.peer()).pace(self.limits)
            stream.loopback = is_loopback(unquote(context.peer()).partition(":")[2])  # "ipv4:127.0.0.1:50132"
            stream.bound(lambda _header: HELLO_LIMIT)
            peer = peer_name(context, method)
            try:
                if self.identity is not None:
                    stream.caller = self.identity.admit(method, context.auth_context())
                await self._admitted(peer, stream, handler)
            except Refused as error:
                self.door.refused(peer, error)
                await context.abort(status_of(error), str(error))
            except Silent as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))  # should it wake, it knows
            except (PeerLost, asyncio.CancelledError):
                pass  # the peer is gone, or this server stops: neither is worth gRPC's traceback in the log
            finally:
                stream.heart.stop()

        return serve

    async def _admitted(self, peer: str, stream: FrameStream, handler: Handler) -> None:
        """Serve one stream, if it may come in and says who it is in time. Raises what the handler does, and Nameless."""
        self.door.enter(peer)

        def greeted() -> None:
            deadline.reschedule(None)
            self.door.greeted()

        stream.on_first = greeted
        try:
            async with asyncio.timeout(HELLO_S) as deadline:
                await handler(stream)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise Nameless(f"no HELLO came within {HELLO_S:.0f} s") from None
        finally:
            self.door.leave(peer, greeted=stream.on_first is None)

    async def start(self, listen: str) -> str:
        """Bind and serve; returns the address with the port really bound. Raises PortInUse, Unencrypted."""
        host, port = split_address(listen)
        if self.identity is None and not is_loopback(listen):
            if not self.trusted_network:
                raise Unencrypted(listen)
            log.warning("listening on %s without encryption or admission, as --trusted-network asks", listen)
        _probe(host, port, listen)
        try:
            if self.identity is None:
                bound = self._server.add_insecure_port(listen)
            else:
                self._ledger.tls = True
                self._credentials = self.identity.server_credentials()
                bound = self._server.add_secure_port(listen, self._credentials)
        except RuntimeError as error:
            raise PortInUse(listen, str(error).splitlines()[0]) from None
        await self._server.start()
        return f"{host}:{bound}"

    async def stop(self) -> None:
        await self._server.stop(grace=1.0)


def peer_name(context: Any, call: str) -> str:
    """Who is at the other end, for whoever counts: an identity, or host and call; "" for an unnamed one on loopback."""
    identities = context.peer_identities()
    if identities:
        return bytes(next(iter(identities))).decode(errors="replace")
    address = unquote(context.peer()).partition(":")[2]
    return "" if is_loopback(address) else f"{address.rpartition(':')[0]} ({call})"


def _probe(host: str, port: int, listen: str) -> None:
    """Bind once the plain way: the error of the operating system is the readable one."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise PortInUse(listen, error.strerror or str(error)) from None


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT as (host, port). Raises BadAddress."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BadAddress(address)
    return host, int(port)


def dialable(address: str) -> str:
    """The address, unless it means "all interfaces": that is one to listen on, not one to dial. Raises UserError."""
    host = split_address(address)[0].strip("[]")
    if host in ALL_INTERFACES:
        raise UserError(f"listening on {address} says not where others should dial: add --advertise HOST:PORT")
    return address


def dialable_here(address: str) -> str:
    """How a process on this machine dials a listening address."""
    host, port = split_address(address)
    return f"127.0.0.1:{port}" if host.strip("[]") in ALL_INTERFACES else address


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT stays on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
