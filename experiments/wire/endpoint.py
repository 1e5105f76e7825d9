"""One end of the calibration: sends or serves the frames it is told to over the project's own streams, and counts them.

Orders are lines of JSON on stdin, answers lines on stdout. Encryption is put under the streams from here: what a record
costs does not depend on who presents which certificate.
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

import grpc

from swarm_core.wire.allocator import keep_large_blocks
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind
from swarm_core.wire.streams import Dialled, FrameStream, Server, dial

LIMITS = {kind: 1 << 28 for kind in FrameKind}
PAUSE_S = 0.3  # before and after each case: the last acknowledgement may take 200 ms


def encrypt(folder: Path) -> None:
    """From now on, what this process dials or serves unencrypted is encrypted with the certificate of `folder`."""
    key, certificate = (folder / "key.pem").read_bytes(), (folder / "certificate.pem").read_bytes()
    dialled = grpc.ssl_channel_credentials(certificate)
    served = grpc.ssl_server_credentials([(key, certificate)])
    plain_server = grpc.aio.server

    def server(*args: Any, **kwargs: Any) -> grpc.aio.Server:
        made = plain_server(*args, **kwargs)
        made.add_insecure_port = lambda address: made.add_secure_port(address, served)
        return made

    grpc.aio.server = server
    grpc.aio.insecure_channel = lambda address, options: grpc.aio.secure_channel(address, dialled, options=options)


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


async def serve(address: str, ledger: Ledger) -> None:
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
    print(await server.start(address), flush=True)
    async for _ in lines():
        print(counted(ledger), flush=True)
    await server.stop()


async def opened(address: str, ledger: Ledger) -> Dialled:
    stream = await dial(address, "Stage/Link", ledger, "the other end", 10.0)
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


async def dials(address: str, ledger: Ledger) -> None:
    stream = await opened(address, ledger)
    await send(stream, {"sizes": [1 << 20], "answered": False, "gap_s": 0})  # the peers agree on frame sizes
    await asyncio.sleep(PAUSE_S)
    ledger.take()
    print("ready", flush=True)
    async for line in lines():
        case = json.loads(line)
        await asyncio.sleep(PAUSE_S)
        for _ in range(case["connections"]):
            await (await opened(address, ledger)).finish()
        if case["sizes"]:
            await send(stream, case)
        await asyncio.sleep(PAUSE_S)
        print(counted(ledger), flush=True)
    await stream.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("side", choices=("serve", "dial"))
    parser.add_argument("address")
    parser.add_argument("--tls", type=Path, help="folder of key.pem and certificate.pem")
    arguments = parser.parse_args()
    keep_large_blocks()
    if arguments.tls:
        encrypt(arguments.tls)
    ledger = Ledger(tls=arguments.tls is not None)
    asyncio.run((serve if arguments.side == "serve" else dials)(arguments.address, ledger))
    return 0


if __name__ == "__main__":
    sys.exit(main())
