"""One end of the calibration: sends or serves the frames it is told to over the project's own streams, and counts them.

Orders are lines of JSON on stdin, answers lines on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from swarm_core.wire.allocator import keep_large_blocks
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind
from swarm_core.wire.streams import Dialled, FrameStream, Server, dial
from swarm_core.wire.tls import Identity, load_identity

LIMITS = {kind: 1 << 28 for kind in FrameKind}
PAUSE_S = 0.3  # before and after each case: the last acknowledgement may take 200 ms


def counted(ledger: Ledger) -> str:
    """The wire column by direction since the last call."""
    sums: dict[str, int] = defaultdict(int)
    for row in ledger.take():
        sums[row.direction] += row.wire_bytes
    return json.dumps(sums)


async def lines() -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        yield line


async def serve(address: str, ledger: Ledger, identity: Identity | None) -> None:
    """Answer FETCH with as many bytes, STOP with a VOTE, and nothing else."""

    async def handler(stream: FrameStream) -> None:
        await stream.expect(FrameKind.HELLO)
        stream.name("a-b", "up", LIMITS)
        await stream.send(Frame(Header(FrameKind.WELCOME)))
        while (frame := await stream.receive()) is not None:
            if frame.header.kind is FrameKind.FETCH:
                await stream.send(Frame(Header(FrameKind.GRADIENT), frame.payload))
            elif frame.header.kind is FrameKind.STOP:
                await stream.send(Frame(Header(FrameKind.VOTE)))

    server = Server("Stage", {"Link": handler}, ledger)
    server.identity, server.trusted_network = identity, identity is None
    print(await server.start(address), flush=True)
    async for _ in lines():
        print(counted(ledger), flush=True)
    await server.stop()


async def opened(address: str, ledger: Ledger, identity: Identity | None) -> Dialled:
    stream = await dial(address, "Stage/Link", ledger, "the other end", 10.0, identity=identity, stage=1)
    stream.name("a-b", "down", LIMITS)
    await stream.send(Frame(Header(FrameKind.HELLO)))
    await stream.expect(FrameKind.WELCOME)
    return stream


async def send(stream: Dialled, case: dict[str, Any]) -> None:
    """One case: frames of these sizes, back to back, with a gap behind each, or each after the answer to the last."""
    for size in case["sizes"]:
        payload = os.urandom(size)
        if case["answered"]:
            await stream.send(Frame(Header(FrameKind.FETCH), payload))
            await stream.expect(FrameKind.GRADIENT)
        else:
            await stream.send(Frame(Header(FrameKind.ACTIVATION), payload))
        if case["gap_s"]:
            await asyncio.sleep(case["gap_s"])
    await stream.send(Frame(Header(FrameKind.STOP)))
    await stream.expect(FrameKind.VOTE)


async def dials(address: str, ledger: Ledger, identity: Identity | None) -> None:
    stream = await opened(address, ledger, identity)
    await send(stream, {"sizes": [1 << 20], "answered": False, "gap_s": 0})  # the peers agree on frame sizes
    await asyncio.sleep(PAUSE_S)
    ledger.take()
    print("ready", flush=True)
    async for line in lines():
        case = json.loads(line)
        await asyncio.sleep(PAUSE_S)
        for _ in range(case["connections"]):
            await (await opened(address, ledger, identity)).finish()
        if case["sizes"]:
            await send(stream, case)
        await asyncio.sleep(PAUSE_S)
        print(counted(ledger), flush=True)
    await stream.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("side", choices=("serve", "dial"))
    parser.add_argument("address")
    parser.add_argument("--tls", type=Path, help="folder of serve.pem and dial.pem")
    arguments = parser.parse_args()
    keep_large_blocks()
    identity = load_identity(arguments.tls / f"{arguments.side}.pem") if arguments.tls else None
    asyncio.run((serve if arguments.side == "serve" else dials)(arguments.address, Ledger(), identity))
    return 0


if __name__ == "__main__":
    sys.exit(main())
