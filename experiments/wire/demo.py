"""A shortened demo run, every process on a host of its own, started as a user would: ledger against interfaces."""

from __future__ import annotations

import csv
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_node.authority import Authority
from experiments.children import ROOT, BenchError, Child
from experiments.wire.network import Network

RUN_FILE = ROOT / "examples" / "tiny" / "run.toml"
STAGES = 3
PORT = 7400
LIMIT_S = 420.0  # for a run that takes less than one minute on an idle machine


@dataclass(frozen=True)
class Host:
    """One process: what the ledger says it sent, message and wire, what its interface counted, what TCP repeated."""

    name: str
    message: int
    ledger: int
    interface: int
    repeated_segments: int

    @property
    def ratio(self) -> float:
        return self.ledger / self.interface


def demo(folder: Path, ticks: int, tls: bool, rate: str | None) -> list[Host]:
    """Run it; the hosts, and all of them together."""
    folder.mkdir(parents=True)
    stages = [f"stage{i}" for i in range(STAGES)]
    names = ["anchor", *stages, "sampler"]
    with Network(names, rate) as network:
        anchor = f"{network.address('anchor')}:{PORT}"

        def start(name: str, module: str, *arguments: object) -> Child:
            return Child(name, module, arguments, folder, prefix=network.inside(name), talks=False)

        before = {name: network.sent_bytes(name) for name in names}
        overrides = ("--set", f"run.ticks={ticks}", "--set", f"swarm.stages={STAGES}")
        serve = ("serve", "--config", RUN_FILE, "--listen", anchor, "--out", folder / "run", *overrides)
        authority = Authority(folder / "run") if tls else None

        def entry(role: str, stage: int | None) -> tuple[str, ...]:
            return ("--token", authority.create_token(role, stage)) if authority else ("--trusted-network",)

        common = ("--anchor", anchor, "--out", folder / "workers")
        children = [start("anchor", "anchor_node.cli", *serve, *(() if tls else ("--trusted-network",)))]
        try:
            for i, name in enumerate(stages):
                listen = f"{network.address(name)}:{PORT + 1 + i}"
                stage = ("join", "--stage", i, "--listen", listen, *common, *entry("stage", i))
                children.append(start(name, "swarm_worker.cli", *stage))
            children.append(start("sampler", "swarm_worker.cli", "sample", *common, *entry("sampler", None)))
            await_all(children)
            time.sleep(0.5)  # connections close
            after = {name: network.sent_bytes(name) for name in names}
            repeated = {name: network.retransmitted_segments(name) for name in names}
        finally:
            for child in children:
                child.close(0.1)
    message, wire = sent_by(folder / "run" / "ledger.csv")
    hosts = [Host(name, message[name], wire[name], after[name] - before[name], repeated[name]) for name in names]
    return [*hosts, together(hosts)]


def await_all(children: Sequence[Child]) -> None:
    """Until all have ended. Raises BenchError when one fails, or is too slow."""
    deadline = time.monotonic() + LIMIT_S
    while running := [child.name for child in children if child.running()]:
        if time.monotonic() > deadline:
            raise BenchError(
                f"after {LIMIT_S:.0f} s these still ran: {', '.join(running)}; see {children[0].log.parent}"
            )
        time.sleep(0.2)


def together(hosts: Sequence[Host]) -> Host:
    columns = ("message", "ledger", "interface", "repeated_segments")
    return Host("all", *(sum(getattr(host, column) for host in hosts) for column in columns))


def sent_by(ledger: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The message and the wire column summed by the process that sends: of a link `a-b`, a sends what goes down."""
    message: dict[str, int] = defaultdict(int)
    wire: dict[str, int] = defaultdict(int)
    with ledger.open(newline="") as file:
        for row in csv.DictReader(file):
            above, _, below = row["link"].partition("-")
            sender = above if row["direction"] == "down" else below
            message[sender] += int(row["message_bytes"])
            wire[sender] += int(row["wire_bytes"])
    return message, wire
