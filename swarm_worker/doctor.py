"""`swarm_worker doctor`: would a worker on this machine work with that anchor? Tries it out, and says what to do.

Nothing is joined: the anchor answers on a call of its own (anchor_node/probing.py), also while a run is at work.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swarm_core.errors import UserError
from swarm_core.exits import installed
from swarm_core.wire.errors import WireError
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import PROTOCOL, FrameKind, Hello, Trial, Tried, from_bytes, to_bytes
from swarm_core.wire.streams import ALL_INTERFACES, Dialled, dial, is_loopback, split_address
from swarm_core.wire.tls import Identity
from swarm_worker.entry import Entry, visit
from swarm_worker.machine import BAD, OK, SKIPPED, WARNING, Finding, device, disk

NAME_S, CONNECT_S, DIAL_S, ANSWER_S = 5.0, 5.0, 10.0, 15.0
ECHOES = 9
FIRST_LOAD, LAST_LOAD = 64 << 10, 2 << 20  # doubled while one takes less than
LOAD_S = 0.7  # so that one way takes two seconds at most, and moves 4 MB at most
SLOW_MBPS = 2.0  # a chunk of 1 MiB takes four seconds
FAR_S = 0.3
CLOCK_S, CLOCK_BAD_S = 5.0, 300.0  # nothing is ordered by clocks but what people read; certificates have a beginning
STYLE = {OK: "green", WARNING: "yellow", BAD: "bold red", SKIPPED: "dim"}


@dataclass(frozen=True)
class DoctorArguments:
    """The command line of `swarm_worker doctor`."""

    anchor: str
    listen: str | None = None
    advertise: str | None = None
    out: Path = Path("runs/worker")
    entry: Entry = field(default_factory=Entry)


def examine(arguments: DoctorArguments) -> int:
    """The command; returns 1 when something is bad. Raises BadAddress."""
    for address in (arguments.anchor, arguments.listen, arguments.advertise):
        if address is not None:
            split_address(address)
    console = Console(highlight=False)
    megabytes = sum(FIRST_LOAD << i for i in range((LAST_LOAD // FIRST_LOAD).bit_length())) / 1e6
    console.print(f"Trying out {arguments.anchor}: about 10 s, at most {megabytes:.0f} MB each way; nothing is joined.")
    findings = asyncio.run(Doctor(arguments).run())
    findings += [disk(arguments.out), device()]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in ("check", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        texts = (Text(text) for text in (finding.figure, finding.advice))  # as they are: brackets are no markup
        table.add_row(finding.name, Text(finding.verdict, STYLE[finding.verdict]), *texts)
    console.print(table)
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in (BAD, WARNING)}
    console.print(f"{counts[BAD]} bad, {counts[WARNING]} warnings" if any(counts.values()) else "All is well.")
    return 1 if counts[BAD] else 0


class Doctor:
    """The checks that take an anchor, in the order in which one needs the other."""

    def __init__(self, arguments: DoctorArguments) -> None:
        self.arguments = arguments
        self.host, self.port = split_address(arguments.anchor)
        self._identity: Identity | None = None

    async def run(self) -> list[Finding]:
        """All findings. Does not raise for what it finds."""
        found: list[Finding] = []
        for check in (self._name, self._tcp):
            found.append(await check())
            if found[-1].verdict == BAD:
                return found + self._unchecked(found[-1].name)
        found.append(self._encryption())
        if found[-1].verdict == BAD:
            return found + self._unchecked("TLS")
        try:
            async with self._probe() as (stream, first):
                if first.refused:
                    return [*found, Finding("anchor", BAD, first.refused), *self._unchecked("anchor")]
                found.append(Finding("anchor", OK, f"run {first.run}: {first.phase}"))
                found += self._versions(first)
                found += await self._clock_and_trip(stream)
                found.append(await self._reach(stream, first.seen))
                found.append(await self._rate(stream, "down"))
                found.append(await self._rate(stream, "up"))
        except (WireError, TimeoutError) as error:
            text = str(error) or f"no answer within {ANSWER_S:.0f} s"
            advice = "look at the anchor's log; is it an anchor of this version that listens there?"
            found.append(Finding("anchor", BAD, text, advice))
        return found

    def _unchecked(self, why: str) -> list[Finding]:
        return [
            Finding(name, SKIPPED, f"for want of {why}") for name in ("protocol", "round trip", "reach-back", "line")
        ]

    async def _name(self) -> Finding:
        host, started = self.host.strip("[]"), time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(NAME_S):
                entries = await loop.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)
        except TimeoutError:
            return Finding("name", BAD, f"{host}: no answer within {NAME_S:.0f} s", "the name server does not answer")
        except OSError as error:
            advice = "check the spelling, or give the anchor's IP address"
            return Finding("name", BAD, f"{host}: {error.strerror or error}", advice)
        addresses = ", ".join(dict.fromkeys(str(entry[4][0]) for entry in entries))
        return Finding("name", OK, f"{host} is {addresses}, in {1e3 * (time.monotonic() - started):.0f} ms")

    async def _tcp(self) -> Finding:
        started, where = time.monotonic(), self.arguments.anchor
        try:
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_connection(self.host.strip("[]"), self.port)
        except TimeoutError:
            advice = "a firewall drops it, or the machine is off: open the port, on the anchor's side first"
            return Finding("TCP", BAD, f"{where}: no answer within {CONNECT_S:.0f} s", advice)
        except OSError as error:
            advice = "nobody listens there: is the anchor running, with --listen 0.0.0.0:PORT, and is the port right?"
            return Finding("TCP", BAD, f"{where}: {error.strerror or error}", advice)
        took_s = time.monotonic() - started
        writer.close()
        return Finding("TCP", OK, f"{where} took the connection in {1e3 * took_s:.0f} ms")

    def _encryption(self) -> Finding:
        a = self.arguments
        try:
            self._identity = visit(a.entry, a.anchor, a.out)
        except UserError as error:
            what, _, advice = str(error).partition(": ")
            return Finding("TLS", BAD, what, advice)
        if self._identity is not None:
            until = self._identity.certificate.not_valid_after_utc
            return Finding("TLS", OK, f"as {self._identity.name}, until {until:%Y-%m-%d %H:%M} UTC")
        if is_loopback(a.anchor):
            return Finding("TLS", OK, "plaintext, on this machine only")
        return Finding(
            "TLS", WARNING, "plaintext", "for a network where nobody else is; anybody on it can read and join"
        )

    @asynccontextmanager
    async def _probe(self) -> AsyncIterator[tuple[Dialled, Tried]]:
        who = self._identity
        stream = await dial(self.arguments.anchor, "Anchor/Probe", Ledger(), "the anchor", DIAL_S, identity=who)
        stream.name("anchor-probe", "up", {FrameKind.LOAD: LAST_LOAD})
        try:
            hello = Hello(role="probe", versions=installed())
            await stream.send(Frame(Header(FrameKind.HELLO), to_bytes(hello)))
            yield stream, await _tried(stream)
        finally:
            await stream.close()

    def _versions(self, first: Tried) -> list[Finding]:
        advice = "install the same version on both: pip install -c constraints.txt"
        same = first.protocol == PROTOCOL
        figure = f"{PROTOCOL} here, {first.protocol} at the anchor"
        found = [Finding("protocol", OK if same else BAD, figure, "" if same else advice)]
        here, different = installed(), []
        for name, version in here.items():
            if version.partition("+")[0] != first.versions.get(name, "").partition("+")[0]:  # "+cpu", "+cu128"
                different.append(f"{name} {version or 'none'} here, {first.versions.get(name) or 'none'} at the anchor")
        if different:
            return [*found, Finding("versions", WARNING, "; ".join(different), advice)]
        return [
            *found,
            Finding("versions", OK, ", ".join(f"{name} {version}" for name, version in here.items() if version)),
        ]

    async def _clock_and_trip(self, stream: Dialled) -> list[Finding]:
        trips: list[tuple[float, float]] = []
        for _ in range(ECHOES):
            said, started = time.time(), time.monotonic()
            tried = await _try(stream, Trial("echo"))
            took_s = time.monotonic() - started
            trips.append((took_s, tried.clock_s - said - took_s / 2))
        least_s, ahead_s = min(trips)
        usual_s = statistics.median(took_s for took_s, _ in trips)
        text = f"{abs(ahead_s):.3f} s {'behind' if ahead_s > 0 else 'ahead of'} the anchor"
        verdict = OK if abs(ahead_s) < CLOCK_S else WARNING if abs(ahead_s) < CLOCK_BAD_S else BAD
        clock = Finding("clock", verdict, text, "" if verdict == OK else "let NTP set it: timedatectl set-ntp true")
        far = usual_s > FAR_S
        advice = "a tick takes a round trip for each stage: choose neighbours that are near each other" if far else ""
        figure = f"{1e3 * usual_s:.1f} ms, at least {1e3 * least_s:.1f}"
        return [clock, Finding("round trip", WARNING if far else OK, figure, advice)]

    async def _reach(self, stream: Dialled, seen: str) -> Finding:
        a = self.arguments
        if a.listen is None:
            text = "stages are dialled by neighbours and samplers: give the --listen and --advertise of the worker"
            return Finding("reach-back", SKIPPED, "no --listen", text)
        nonce = secrets.token_bytes(16)

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(nonce)
            writer.close()

        host, port = split_address(a.listen)
        host = host.strip("[]")
        try:
            server = await asyncio.start_server(answer, None if host in ALL_INTERFACES else host, port)
        except OSError as error:
            return Finding(
                "reach-back",
                BAD,
                f"{a.listen}: {error.strerror or error}",
                "a worker listens there already? Try another port",
            )
        async with server:
            bound = server.sockets[0].getsockname()[1]
            name, advertised = split_address(a.advertise or a.listen)
            tried = await _try(stream, Trial("reach", port=advertised or bound, nonce=nonce))
        if tried.refused:
            advice = "open the port in this machine's firewall and forward it on its router, or work inside a VPN"
            if is_loopback(a.listen) and not is_loopback(a.anchor):
                advice = f"--listen {a.listen} is for this machine alone: listen on 0.0.0.0:PORT"
            return Finding("reach-back", BAD, tried.refused, advice)
        return await self._advertised(name.strip("[]"), advertised or bound, seen)

    async def _advertised(self, name: str, port: int, seen: str) -> Finding:
        """The anchor has dialled the address it sees; the others will dial the name."""
        figure = f"the anchor reaches {seen}:{port}"
        if name in ALL_INTERFACES:
            return Finding(
                "reach-back", WARNING, figure, f"joining takes --advertise HOST:{port} besides; {seen} would do"
            )
        try:
            entries = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except OSError as error:
            return Finding(
                "reach-back",
                BAD,
                f"{figure}; {name}: {error.strerror or error}",
                "advertise a name that others resolve",
            )
        addresses = {str(entry[4][0]) for entry in entries}
        if seen in addresses:
            return Finding("reach-back", OK, figure)
        advice = f"others dial {name}, which is {', '.join(sorted(addresses))}: does it lead here for all of them?"
        return Finding("reach-back", WARNING, figure, advice)

    async def _rate(self, stream: Dialled, way: str) -> Finding:
        """Loads that double until one takes long enough; the last one counts, less a round trip."""
        name, size, moved, trip_s = f"line {way}", FIRST_LOAD, 0, 0.0
        while True:
            started = time.monotonic()
            await _try(stream, Trial("echo"))
            trip_s = time.monotonic() - started
            started = time.monotonic()
            await _load(stream, way, size)
            took_s = time.monotonic() - started
            moved += size
            if took_s >= LOAD_S or size == LAST_LOAD:
                break
            size *= 2
        mbps = 8e-6 * size / max(1e-6, took_s - min(trip_s, took_s / 2))
        figure = f"{mbps:,.1f} Mbit/s {'from' if way == 'down' else 'to'} the anchor ({moved / 1e6:.1f} MB moved)"
        if mbps < SLOW_MBPS:
            return Finding(
                name, WARNING, figure, f"very slow: give the worker --limit-mbps {mbps:.2f}, so that chunks are small"
            )
        return Finding(name, OK, figure)


async def _tried(stream: Dialled) -> Tried:
    async with asyncio.timeout(ANSWER_S):
        return from_bytes(Tried, (await stream.expect(FrameKind.TRIED)).payload)


async def _try(stream: Dialled, trial: Trial) -> Tried:
    await stream.send(Frame(Header(FrameKind.TRIAL), to_bytes(trial)))
    return await _tried(stream)


async def _load(stream: Dialled, way: str, size: int) -> None:
    await stream.send(Frame(Header(FrameKind.TRIAL), to_bytes(Trial(way, size))))
    async with asyncio.timeout(ANSWER_S):
        if way == "up":
            await stream.send(Frame(Header(FrameKind.LOAD), bytes(size)))
        else:
            await stream.expect(FrameKind.LOAD)
    await _tried(stream)
