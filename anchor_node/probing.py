"""What a worker that has not joined may try out on the anchor: its clock, its line, whether it can be dialled back.

`swarm_worker doctor` is the other end. Whoever probes is no member, holds no stage and is told nothing of the model. All of
it is bounded: one call for each address at a time and few in all, so many trials and bytes a call, and a dial back to the
address the call came from alone, at a port that is no service of the system.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import TYPE_CHECKING
from urllib.parse import unquote

from anchor_node.standing import phase
from swarm_core.exits import installed
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.messages import PROTOCOL, FrameKind, Hello, Trial, Tried, from_bytes, to_bytes
from swarm_core.wire.streams import FrameStream

if TYPE_CHECKING:
    from anchor_node.service import AnchorService

AT_ONCE = 4  # calls, of as many addresses
CALL_S = 60.0
TRIALS = 64  # a call
LOAD_BYTES = 4 << 20  # a trial: a second at 32 Mbit/s
CALL_BYTES = 16 << 20  # both ways together
REACH_S = 3.0  # for a connection and its first bytes, from the anchor to the worker
NONCE_BYTES = 16
FIRST_PORT = 1024  # below it are the services of a system, which nobody has us knock at


class Probing:
    """The `Anchor/Probe` calls of one anchor."""

    def __init__(self, anchor: AnchorService) -> None:
        self._anchor = anchor
        self._busy: set[str] = set()

    async def serve(self, stream: FrameStream) -> None:
        """One call, to its end. Raises BadFrame."""
        host = host_of(stream.peer)
        hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
        if hello.role != "probe":
            raise BadFrame(f"a {hello.role or 'nameless'} came where somebody tries the anchor out")
        stream.name("anchor-probe", "down", {FrameKind.LOAD: LOAD_BYTES})
        first = Tried(
            time.time(), PROTOCOL, installed(), host, self._anchor.manifest.config.run.name, phase(self._anchor)
        )
        if host in self._busy or len(self._busy) >= AT_ONCE:
            who = "your address" if host in self._busy else f"{AT_ONCE} others"
            first.refused = f"a probe of {who} is under way: try again in a minute"
            await self._answer(stream, first)
            return
        self._busy.add(host)
        try:
            async with asyncio.timeout(CALL_S):
                await self._answer(stream, first)
                await self._trials(stream, host)
        except TimeoutError:
            raise BadFrame(f"a probe takes {CALL_S:.0f} s at most") from None
        finally:
            self._busy.discard(host)

    async def _trials(self, stream: FrameStream, host: str) -> None:
        left_bytes, reached = CALL_BYTES, False
        for _ in range(TRIALS):
            frame = await stream.receive()
            if frame is None:
                return
            if frame.header.kind is not FrameKind.TRIAL:
                raise BadFrame(f"a probe sent {frame.header.kind.name}")
            trial, tried = from_bytes(Trial, frame.payload), Tried(time.time())
            if trial.what in ("down", "up"):
                if trial.load_bytes > min(LOAD_BYTES, left_bytes):
                    raise BadFrame(f"a probe moves {LOAD_BYTES} bytes at a time and {CALL_BYTES} in all at most")
                left_bytes -= trial.load_bytes
                tried.load_bytes = await self._load(stream, trial)
            elif trial.what == "reach" and not reached:
                reached = True
                tried.refused = await dial_back(host, trial.port, trial.nonce)
            elif trial.what != "echo":
                raise BadFrame(f"a probe asked for {trial.what!r}{' again' if reached else ''}")
            await self._answer(stream, tried)
        raise BadFrame(f"a probe makes {TRIALS} trials at most")

    async def _load(self, stream: FrameStream, trial: Trial) -> int:
        if trial.what == "down":
            await stream.send(Frame(Header(FrameKind.LOAD), bytes(trial.load_bytes)))
            return trial.load_bytes
        return len(memoryview((await stream.expect(FrameKind.LOAD)).payload))

    async def _answer(self, stream: FrameStream, tried: Tried) -> None:
        await stream.send(Frame(Header(FrameKind.TRIED), to_bytes(tried)))


def host_of(peer: str) -> str:
    """The address in what gRPC calls a peer: "ipv4:10.0.0.7:50132", "ipv6:%5B::1%5D:50132"."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


async def dial_back(host: str, port: int, nonce: bytes) -> str:
    """Why a worker cannot be dialled at that port; empty when it answers with the nonce."""
    if not FIRST_PORT <= port <= 65535 or len(nonce) != NONCE_BYTES:
        return f"port {port} is not dialled: only {FIRST_PORT} to 65535 are"
    writer = None
    try:
        async with asyncio.timeout(REACH_S):
            reader, writer = await asyncio.open_connection(host, port)
            came = await reader.readexactly(NONCE_BYTES)
    except TimeoutError:
        return f"nothing from {host}:{port} within {REACH_S:.0f} s"
    except asyncio.IncompleteReadError:
        return f"{host}:{port} closed the connection: something else listens there"
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    finally:
        if writer is not None:
            writer.close()
    return "" if hmac.compare_digest(came, nonce) else f"{host}:{port} is not this worker: something else listens there"
