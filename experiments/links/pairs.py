"""A sender and a receiver as children of the bench, on this machine or on two hosts of an emulated network."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from deploy.wan.link import ROOT, Host


@dataclass(frozen=True)
class Arrival:
    """One message: its bytes and when (CLOCK_MONOTONIC, s) it was begun to be sent and was all there."""

    size: int
    sent_at: float
    arrived_at: float

    @property
    def took_s(self) -> float:
        return self.arrived_at - self.sent_at


class End:
    """One process."""

    def __init__(self, arguments: Sequence[object], host: Host | None) -> None:
        command = [sys.executable, "-m", "experiments.links.ends", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
        self.process = subprocess.Popen(
            host.command(command) if host is not None else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    @property
    def inlet(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if not words:
            raise RuntimeError("an end of the bench fell over; its reason stands above")
        return words


class Pair:
    """A connection to be measured. `warm` switches the keep-warm messages of `frames` on."""

    def __init__(
        self, kind: str, hosts: Sequence[Host] | None = None, *, warm: bool = False, limit: str | None = None
    ) -> None:
        self.kind = kind
        source, target = hosts if hosts is not None else (None, None)
        self._source = source
        options = [] if limit is None else ["--limit-mbps", limit]
        self.receiver = End([kind, "receive", f"{target.address if target else '127.0.0.1'}:0"], target)
        try:
            self.address = self.receiver.line()[1]
            self.sender = End([kind, "send", self.address, *options, *(["--keep-warm"] if warm else [])], source)
        except BaseException:
            self.receiver.process.kill()
            raise

    def send(self, sizes: Sequence[int], idle_s: float = 0.0) -> list[Arrival]:
        """Wait, send the messages back to back, and return how they arrived."""
        self.sender.inlet.write(" ".join(map(str, (idle_s, *sizes))) + "\n")
        self.sender.inlet.flush()
        arrivals = []
        for _ in sizes:
            size, sent_at, arrived_at = self.receiver.line()
            arrivals.append(Arrival(int(size), float(sent_at), float(arrived_at)))
        self.sender.line()
        return arrivals

    def congestion(self) -> str:
        """The congestion control that the sender's kernel says it uses here."""
        assert self._source is not None
        shown = subprocess.run(
            self._source.command(["ss", "-tin", "dst", self.address]), check=False, capture_output=True, text=True
        )
        return next((word for word in shown.stdout.split() if word in ("cubic", "bbr", "reno")), "unknown")

    def close(self) -> tuple[int, int]:
        """End both processes; the keep-warm frames and their message bytes, as the sender's ledger counted them."""
        self.sender.inlet.close()
        counted = (0, 0)
        if self.kind == "frames":
            _, frames, counted_bytes = self.sender.line()
            counted = (int(frames), int(counted_bytes))
        for end in (self.sender, self.receiver):
            end.process.wait(20)
        return counted

    def kill(self) -> None:
        for end in (self.sender, self.receiver):
            with contextlib.suppress(ProcessLookupError):
                end.process.kill()
            end.process.wait()
