"""Network namespaces on one bridge, each with an Ethernet of its own, and what the kernel counted there. Linux, root.

Segmentation offload is off: a packet on such an interface is a frame of at most 1500 bytes, as on a cable, and every
header is in the counters. With it on, the kernel counts up to 64 KB under one header.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from experiments.children import BenchError

MTU = 1500


@dataclass(frozen=True)
class Sockets:
    """Sums over a namespace's established TCP connections, in its sending direction (`ss -ti`)."""

    sent_bytes: int
    retransmitted_bytes: int
    segments: int
    data_segments: int

    def since(self, before: Sockets) -> Sockets:
        return Sockets(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))


def run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def require() -> None:
    """Raises BenchError with what is missing."""
    missing = [tool for tool in ("ip", "ss", "tc", "sysctl") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        raise BenchError(f"network namespaces want root{' and ' if missing else ''}{', '.join(missing)} (iproute2)")


class Network:
    """`with Network(["a", "b"]) as network`: two hosts, 10.77.0.1 and 10.77.0.2. `rate` (of `tc`) limits every host's
    upload; None leaves it to the CPU. The bridge has a namespace of its own: this machine's network is not touched."""

    def __init__(self, hosts: Sequence[str], rate: str | None = None) -> None:
        require()
        self.hosts = tuple(hosts)
        self.rate = rate
        self._prefix = f"kedge{os.getpid()}-"

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        hub = self._prefix + "hub"
        run("ip", "netns", "add", hub)
        quiet = [f"net.ipv6.conf.{which}.disable_ipv6=1" for which in ("all", "default")]  # no router solicitations
        run("ip", "netns", "exec", hub, "sysctl", "-qw", *quiet)
        run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", hub, "link", "set", "bridge", "up")
        for host in self.hosts:
            space = self._prefix + host
            run("ip", "netns", "add", space)
            run("ip", "netns", "exec", space, "sysctl", "-qw", *quiet)
            run("ip", "-n", hub, "link", "add", f"to-{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "-n", hub, "link", "set", f"to-{host}", "master", "bridge", "gso_max_segs", "1", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")
            run("ip", "-n", space, "link", "set", "eth0", "mtu", str(MTU), "gso_max_segs", "1", "up")
            run("ip", "-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            if self.rate:
                # Three packets of burst: segments arrive one by one, as they do from a line of that rate.
                tbf = ("root", "tbf", "rate", self.rate, "burst", "4500", "limit", "20mb")
                run("tc", "-n", space, "qdisc", "add", "dev", "eth0", *tbf)

    def _remove(self) -> None:
        for host in (*self.hosts, "hub"):
            subprocess.run(["ip", "netns", "delete", self._prefix + host], check=False, capture_output=True)

    def address(self, host: str) -> str:
        return f"10.77.0.{self.hosts.index(host) + 1}"

    def inside(self, host: str) -> list[str]:
        """What to put before a command that is to run on this host."""
        return ["ip", "netns", "exec", self._prefix + host]

    def sent_bytes(self, host: str) -> int:
        """The interface's counter of this host's upload, Ethernet headers included."""
        return int(run(*self.inside(host), "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def retransmitted_segments(self, host: str) -> int:
        """Segments that this host sent again, over all connections it ever had."""
        names, values = (
            line.split() for line in run(*self.inside(host), "grep", "^Tcp:", "/proc/net/snmp").splitlines()
        )
        return int(values[names.index("RetransSegs")])

    def sockets(self, host: str) -> Sockets:
        text = run(*self.inside(host), "ss", "-tiH", "state", "established")

        def total(field: str) -> int:
            return sum(map(int, re.findall(rf"\b{field}:(\d+)", text)))

        again = total("bytes_retrans")
        return Sockets(total("bytes_sent") - again, again, total("segs_out"), total("data_segs_out"))


def congestion_control() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
