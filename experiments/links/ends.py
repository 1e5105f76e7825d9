"""The two ends of a measured connection, as processes: messages over a link of the swarm, or over a blocking raw socket.

    python -m experiments.links.ends frames receive 127.0.0.1:0     says "listening HOST:PORT", then a line for every message:
                                                                    its bytes, when it was sent, when it was all there
    python -m experiments.links.ends frames send 127.0.0.1:4242     reads orders, one a line: "1.5 100000 100000" waits 1.5 s
                                                                    and sends two messages; says "done" after each order

Times are CLOCK_MONOTONIC, which is one clock for all processes and namespaces of a machine; a message carries the time at
which its sender began to send it in its first eight bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import struct
import sys
import threading
import time

from swarm_core.wire.allocator import keep_large_blocks
from swarm_core.wire.beats import Pulse
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind
from swarm_core.wire.pacing import read_limits
from swarm_core.wire.streams import FrameStream, Server, dial, split_address

LARGEST = 64 << 20
STAMP = struct.Struct("<dQ")  # when it was sent, and how long the message is (raw)


def say(*words: object) -> None:
    print(*words, flush=True)


def stamped(payloads: dict[int, bytearray], size: int) -> bytearray:
    payload = payloads.setdefault(size, bytearray(size))
    STAMP.pack_into(payload, 0, time.monotonic(), size)
    return payload


def receive_raw(listen: str) -> None:
    with socket.create_server(split_address(listen)) as server:
        say("listening", f"{split_address(listen)[0]}:{server.getsockname()[1]}")
        connection, _ = server.accept()
        view = memoryview(bytearray(LARGEST))
        while True:
            have, size = 0, STAMP.size
            while have < size:
                n = connection.recv_into(view[have:size])
                if n == 0:
                    return
                have += n
                if have == STAMP.size:
                    size = STAMP.unpack_from(view)[1]
            say(size, STAMP.unpack_from(view)[0], time.monotonic())


def send_raw(address: str) -> None:
    with socket.create_connection(split_address(address)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        payloads: dict[int, bytearray] = {}
        for line in sys.stdin:
            idle_s, *sizes = line.split()
            time.sleep(float(idle_s))
            for size in sizes:
                connection.sendall(stamped(payloads, int(size)))
            say("done")


async def receive_frames(listen: str, limit: str | None) -> None:
    over = asyncio.Event()

    async def take(stream: FrameStream) -> None:
        stream.name("a-b", "up", dict.fromkeys(FrameKind, LARGEST))
        while (frame := await stream.receive()) is not None:
            now = time.monotonic()
            sent_at, size = STAMP.unpack_from(frame.payload)
            say(size, sent_at, now)
        over.set()

    server = Server("Stage", {"Link": take}, Ledger())
    server.limits = read_limits(limit)
    server.trusted_network = True  # an emulated line of this machine's own
    say("listening", await server.start(listen))
    await over.wait()
    await server.stop()


async def send_frames(address: str, keep_warm: bool, limit: str | None) -> None:
    ledger = Ledger()
    stream = await dial(address, "Stage/Link", ledger, "the other end", 20.0)
    stream.name("a-b", "down").pace(read_limits(limit))
    if keep_warm:
        stream.heart.start(Pulse())
    payloads: dict[int, bytearray] = {}
    while line := await asyncio.to_thread(sys.stdin.readline):
        idle_s, *sizes = line.split()
        await asyncio.sleep(float(idle_s))
        for size in sizes:
            await stream.send(Frame(Header(FrameKind.ACTIVATION), stamped(payloads, int(size))))
        say("done")
    await stream.finish()
    rows = [row for row in ledger.take() if row.kind == "beat"]
    say("warm", sum(row.frames for row in rows), sum(row.message_bytes for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("raw", "frames"))
    parser.add_argument("role", choices=("send", "receive"))
    parser.add_argument("address")
    parser.add_argument("--keep-warm", action="store_true")
    parser.add_argument("--limit-mbps")
    given = parser.parse_args()
    keep_large_blocks()
    if given.role == "receive":  # nobody is left to listen to
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    match given.kind, given.role:
        case "raw", "receive":
            receive_raw(given.address)
        case "raw", _:
            send_raw(given.address)
        case _, "receive":
            asyncio.run(receive_frames(given.address, given.limit_mbps))
        case _:
            asyncio.run(send_frames(given.address, given.keep_warm, given.limit_mbps))


if __name__ == "__main__":
    main()
