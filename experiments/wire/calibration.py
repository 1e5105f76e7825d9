"""Known frames over one stream between two hosts: the ledger's wire column beside the interfaces' counters."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchor_node.authority import CERTIFICATE_S, Authority
from experiments.children import Child
from experiments.wire.network import Network, Sockets
from swarm_core.wire.tls import Identity, Name, new_key

ENDPOINT = "experiments.wire.endpoint"
KB, MB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Case:
    """Frames with payloads of these sizes. `answered`: each is answered with as many bytes before the next one goes."""

    name: str
    sizes: tuple[int, ...] = ()
    gap_s: float = 0.0
    answered: bool = False
    connections: int = 0


CASES = (
    Case("20 connections", connections=20),
    Case("200 x 0 B", (0,) * 200),
    Case("25 x 0 B, every 200 ms", (0,) * 25, gap_s=0.2),
    Case("200 x 1 KB", (KB,) * 200),
    Case("100 x 1 KB, every 20 ms", (KB,) * 100, gap_s=0.02),
    Case("100 x 1 KB, answered", (KB,) * 100, answered=True),
    Case("200 x 8 KB", (8 * KB,) * 200),
    Case("100 x 8 KB, every 20 ms", (8 * KB,) * 100, gap_s=0.02),
    Case("100 x 8 KB, answered", (8 * KB,) * 100, answered=True),
    Case("100 x 64 KB", (64 * KB,) * 100),
    Case("50 x 64 KB, every 20 ms", (64 * KB,) * 50, gap_s=0.02),
    Case("50 x 64 KB, answered", (64 * KB,) * 50, answered=True),
    Case("10 x 1 MB, every 100 ms", (MB,) * 10, gap_s=0.1),
    Case("5 x 1 MB, answered", (MB,) * 5, answered=True),
    Case("4 x 5 MB", (5 * MB,) * 4),
    Case("mixed", (0, KB, 8 * KB, 8 * KB, 0, 64 * KB, MB, 0, 5 * MB, KB) * 2, gap_s=0.01),
)


@dataclass(frozen=True)
class Direction:
    """One direction of a case: what the ledger says, what the interface counted, and how TCP got there."""

    ledger: int
    interface: int
    sockets: Sockets

    @property
    def ratio(self) -> float:
        return self.ledger / self.interface

    def as_json(self) -> dict[str, Any]:
        return {"ledger": self.ledger, "interface": self.interface, "ratio": self.ratio, **asdict(self.sockets)}


def certificates(folder: Path) -> None:
    """For the two sides of a link: what stages 0 and 1 of a run would hold."""
    authority = Authority(folder)
    for stage, side in enumerate(("dial", "serve")):
        key = new_key()
        given = authority.issue(key.public_key(), Name(authority.run, "stage", stage), CERTIFICATE_S)
        Identity(key, given, authority.certificate).save(folder / f"{side}.pem")


def calibrate(
    folder: Path, tls: bool, rate: str | None, cases: Sequence[Case] = CASES
) -> list[tuple[Case, Direction, Direction]]:
    """Run the cases; (case, down, up) of each."""
    folder.mkdir(parents=True)
    found = []
    with Network(("dialler", "server"), rate) as network:
        where = f"{network.address('server')}:7500"
        extra: tuple[object, ...] = ()
        if tls:
            certificates(folder)
            extra = ("--tls", folder)
        children: list[Child] = []
        try:
            server = Child("server", ENDPOINT, ["serve", where, *extra], folder, prefix=network.inside("server"))
            children.append(server)
            server.line()
            dialler = Child("dialler", ENDPOINT, ["dial", where, *extra], folder, prefix=network.inside("dialler"))
            children.append(dialler)
            dialler.line()
            server.ask("counted")
            for case in cases:
                before = _kernel(network)
                counted = [json.loads(dialler.ask(json.dumps(asdict(case)))), json.loads(server.ask("counted"))]
                time.sleep(0.1)
                sides = [
                    Direction(sum(side.get(way, 0) for side in counted), now[0] - then[0], now[1].since(then[1]))
                    for way, now, then in zip(("down", "up"), _kernel(network), before, strict=True)
                ]
                found.append((case, sides[0], sides[1]))
        finally:
            for child in reversed(children):
                child.close()
    return found


def _kernel(network: Network) -> list[tuple[int, Sockets]]:
    return [(network.sent_bytes(host), network.sockets(host)) for host in ("dialler", "server")]
