"""A slow network on one machine: hosts in network namespaces, joined by TUN devices that one shaping process reads.

Each host has an access link of `rate_mbps` up and as much down, and every packet is `delay_ms` on its way after its last
bit has left; a queue of `queue_ms` stands in front of the up link and drops what comes over it. The link is a virtual clock:
a packet leaves when those before it have (bytes x 8 / rate), so the rate holds however late the process wakes up. IP
packets are what is counted. netem is not needed; root and /dev/net/tun are. Nothing of Kedge is known here.

    python -m deploy.wan.link --hosts 3 --rate-mbps 100 --delay-ms 40               # until Ctrl-C; says how to get in
    python -m deploy.wan.link --rate-mbps 20 --delay-ms 100 -- iperf3 -c 10.77.0.2  # a command on host 0

or `with wan(rate_mbps=100, delay_ms=40) as hosts:` from Python; there `hosts.cut(hosts[0], hosts[2])` loses every packet
between two of them, and tells neither, until `hosts.heal`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
NETWORK = "10.77.0"  # each WAN has namespaces of its own, so the same addresses serve all of them
PACKET_BYTES = 1 << 16


class WanError(Exception):
    """The emulated network cannot be had here; the message says what is missing."""


@dataclass(frozen=True)
class Host:
    """One end: a network namespace with one address."""

    namespace: str
    address: str

    def command(self, arguments: Sequence[object]) -> list[str]:
        """How to run something on this host."""
        return ["ip", "netns", "exec", self.namespace, *map(str, arguments)]


class Hosts(list[Host]):
    """The hosts of a network that is up. Between two of them it can be cut: their packets are lost, and nobody is told."""

    def __init__(self, hosts: Sequence[Host], network: TextIO) -> None:
        super().__init__(hosts)
        self._network = network

    def cut(self, one: Host, other: Host) -> None:
        self._say("cut", one, other)

    def heal(self, one: Host, other: Host) -> None:
        self._say("heal", one, other)

    def _say(self, verb: str, one: Host, other: Host) -> None:
        print(verb, self.index(one), self.index(other), file=self._network, flush=True)


@dataclass
class Link:
    """One direction of a host's access link as a virtual clock: when is a packet of n bytes through, if at all?"""

    bytes_per_s: float
    queue_s: float
    free_at: float = 0.0

    def through_at(self, now: float, n: int) -> float | None:
        """When its last bit is through; None when the queue is full."""
        start = max(now, self.free_at)
        if start - now > self.queue_s:
            return None
        self.free_at = start + n / self.bytes_per_s
        return self.free_at


@contextlib.contextmanager
def wan(
    hosts: int = 2,
    *,
    rate_mbps: float,
    delay_ms: float,
    queue_ms: float | None = None,
    loss: float = 0.0,
    seed: int = 0,
    congestion: str = "cubic",
) -> Iterator[Hosts]:
    """An emulated network for as long as the block lasts, shaped by a process of its own. Raises WanError."""
    check()
    options = {"hosts": hosts, "rate-mbps": rate_mbps, "delay-ms": delay_ms, "loss": loss, "seed": seed}
    options |= {"congestion": congestion} | ({} if queue_ms is None else {"queue-ms": queue_ms})
    command = [sys.executable, "-m", "deploy.wan.link", "--while-stdin"]
    command += [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdin is not None
        lines = [process.stdout.readline().split() for _ in range(hosts)]
        if not all(lines):
            raise WanError("the emulated network did not come up; its reason stands above")
        yield Hosts([Host(line[0], line[1]) for line in lines], process.stdin)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def check() -> None:
    """Raises WanError where namespaces and TUN devices are not to be had."""
    if os.geteuid() != 0 or not TUN.exists():
        raise WanError("an emulated network needs root and /dev/net/tun")
    tried = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise WanError(f"an emulated network needs `ip netns`: {tried.stderr.strip()}")


@contextlib.contextmanager
def namespaces(hosts: int, congestion: str) -> Iterator[tuple[list[Host], list[int]]]:
    """The hosts and the TUN device of each; the congestion control of their TCP is pinned, as defaults differ."""
    made: list[Host] = []
    tuns: list[int] = []
    try:
        for number in range(hosts):
            name, device = f"kedge-{os.getpid()}-{number}", f"kt{os.getpid()}n{number}"
            address = f"{NETWORK}.{number + 1}"
            tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
            tuns.append(tun)
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
            _ip("netns", "add", name)
            made.append(Host(name, address))
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up", "txqueuelen", "10000")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "route", "change", f"{NETWORK}.0/24", "dev", device, "src", address, "congctl", congestion)
        yield made, tuns
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.namespace], check=False)
        for tun in tuns:
            os.close(tun)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise WanError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")


class Shaper:
    """Carries packets between the devices. `step()` moves what is due and waits for what comes next."""

    def __init__(
        self, tuns: Sequence[int], bytes_per_s: float, delay_s: float, queue_s: float, loss: float, seed: int
    ) -> None:
        self._tuns = list(tuns)
        self._up = [Link(bytes_per_s, queue_s) for _ in tuns]
        self._down = [Link(bytes_per_s, queue_s) for _ in tuns]
        self._delay_s, self._loss = delay_s, loss
        self._random = random.Random(seed)
        self._due: list[collections.deque[tuple[float, bytes]]] = [collections.deque() for _ in tuns]
        self._cut: set[frozenset[int]] = set()

    def obey(self, line: str) -> None:
        """`cut A B`: from now on nothing passes between these two, by their numbers, until `heal A B`. From any thread."""
        verb, *ends = line.split()
        change = {"cut": self._cut.add, "heal": self._cut.discard}[verb]
        change(frozenset(map(int, ends)))

    def step(self) -> None:
        first = min((due[0][0] for due in self._due if due), default=None)
        wait_s = 0.5 if first is None else max(0.0, first - time.monotonic())
        for tun in select.select(self._tuns, [], [], wait_s)[0]:
            self._read(self._tuns.index(tun))
        now = time.monotonic()
        for tun, due in zip(self._tuns, self._due, strict=True):
            while due and due[0][0] <= now:
                with contextlib.suppress(OSError):  # the host's device is down: the packet is lost, as on any network
                    os.write(tun, due.popleft()[1])

    def _read(self, source: int) -> None:
        for _ in range(64):  # then the other side has its turn
            try:
                packet = os.read(self._tuns[source], PACKET_BYTES)
            except OSError:
                return  # nothing more, or the device is down
            target = packet[19] - 1 if packet[0] >> 4 == 4 and packet.startswith(b"\x0a\x4d\0", 16) else -1
            if not 0 <= target < len(self._tuns) or target == source or self._random.random() < self._loss:
                continue
            if frozenset((source, target)) in self._cut:
                continue
            up = self._up[source].through_at(time.monotonic(), len(packet))
            if up is None:
                continue
            # The far access link works on a packet while it comes in, so it costs time only where several hosts send.
            down = self._down[target]
            arrives = down.through_at(up - len(packet) / down.bytes_per_s, len(packet))
            if arrives is not None:
                self._due[target].append((arrives + self._delay_s, packet))


def serve(arguments: argparse.Namespace) -> int:
    """Bring the network up, say how to use it, carry packets until told to stop or until the command ends."""
    bytes_per_s = arguments.rate_mbps * 1e6 / 8
    # One round trip and 50 ms of the line rate: what a home router holds, and enough for cubic to keep the link full.
    queue_s = (2 * arguments.delay_ms + 50 if arguments.queue_ms is None else arguments.queue_ms) / 1e3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with namespaces(arguments.hosts, arguments.congestion) as (hosts, tuns):
        with contextlib.suppress(OSError):  # late packets are measurement errors; without the right it still works
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        for host in hosts:
            print(f"{host.namespace} {host.address}  # ip netns exec {host.namespace} COMMAND", flush=True)
        shaper = Shaper(tuns, bytes_per_s, arguments.delay_ms / 1e3, queue_s, arguments.loss, arguments.seed)
        if arguments.while_stdin:
            threading.Thread(target=_listen, args=[shaper], daemon=True).start()
        child = subprocess.Popen(hosts[0].command(arguments.command)) if arguments.command else None
        while child is None or child.poll() is None:
            shaper.step()
        return child.returncode


def _listen(shaper: Shaper) -> None:
    """What to cut and to heal, until standard input ends: whoever started us may be killed without a word."""
    for line in sys.stdin:
        shaper.obey(line)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.wan.link", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rate-mbps", type=float, required=True, help="of each access link, each way")
    parser.add_argument("--delay-ms", type=float, required=True, help="one way")
    parser.add_argument("--queue-ms", type=float, help="queue of a link (default: a round trip and 50 ms)")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets lost (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the losses")
    parser.add_argument(
        "--congestion", default="cubic", help="TCP congestion control of the hosts (default %(default)s)"
    )
    parser.add_argument(
        "--while-stdin", action="store_true", help="end when standard input does; lines there cut and heal"
    )
    parser.add_argument("command", nargs="*", help="to be run on host 0, after --")
    try:
        check()
        return serve(parser.parse_args())
    except WanError as error:
        print(f"deploy.wan.link: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
