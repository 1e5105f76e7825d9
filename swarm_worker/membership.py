"""Joining a run: dial the anchor, say who we are, take the manifest. Shared by stage workers and samplers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from codec.basis import Basis
from codec.spec import Direction
from swarm_core.errors import KedgeError
from swarm_core.manifest import Manifest, read_manifest
from swarm_core.wire.bases import as_whole, basis_of, key_of, largest_set_bytes
from swarm_core.wire.beats import Pulse
from swarm_core.wire.errors import BadFrame, ManifestMismatch, PeerLost, WireError
from swarm_core.wire.frames import Frame, Header, run_id
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    BasisSet,
    Check,
    Checked,
    Fence,
    FrameKind,
    Hello,
    Report,
    Start,
    Stop,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.streams import Dialled, dial
from swarm_core.wire.tls import Identity

ANCHOR_LIMITS = {FrameKind.WELCOME: 4 << 20}
CORRECTION_BESIDE = 1 << 10  # what a CORRECTION has beside its packet
LAST_WORDS_S = 0.5  # between the reason of a failure and the end of the stream that carries it
AGAIN_S = 0.5  # before an anchor that was lost is dialled again
LOST_AT_MOST = 20  # times before the start; an anchor that loses us more often has another trouble than restarts
log = logging.getLogger(__name__)
Greeted = tuple[Dialled, Welcome]


@dataclass(frozen=True)
class Way:
    """How this process comes to the anchor: first to join, and again whenever its stream has broken."""

    address: str
    method: str
    ledger: Ledger
    link: str
    hello: Hello
    identity: Identity | None = None
    limits: dict[FrameKind, int] = field(default_factory=lambda: dict(ANCHOR_LIMITS))  # of frames from it
    pulse: Pulse = field(default_factory=lambda: Pulse("loading"))  # what its beats say


@dataclass
class Membership:
    """An open stream to the anchor and what it said."""

    anchor: Dialled
    manifest: Manifest
    digest: str
    way: Way
    last_bases: BasisSet | None = None  # as it came, whole: the next one may be changes of it
    early: deque[Frame] = field(default_factory=deque)  # came while something else was awaited; read before the stream

    @property
    def run(self) -> int:
        return run_id(self.digest)

    async def next(self) -> Frame | None:
        """The next frame of the anchor, before the start; None at the end of the stream."""
        return self.early.popleft() if self.early else await self.anchor.receive()

    def expect_corrections(self, largest_packet: int) -> None:
        """From now on, and on every stream to come, corrections may be this large."""
        self.way.limits[FrameKind.CORRECTION] = largest_packet + CORRECTION_BESIDE
        self.anchor.name(self.way.link, "up", self.way.limits)

    def take_bases(self, frame: Frame) -> BasisSet:
        """The bases of a BASIS frame, whole. To be given every such frame of the stream, in order. Raises BadFrame."""
        self.last_bases = as_whole(from_bytes(BasisSet, frame.payload), self.last_bases, self.manifest.link())
        return self.last_bases


async def greet(
    way: Way, hello: Callable[[], Hello], wait_s: float, waiting: Callable[[float], None] | None = None
) -> Greeted:
    """Dial the anchor and say who we are. Raises Unreachable, PeerLost, and what the anchor refuses us with.

    `hello` is asked once the connection stands: dialling may take seconds, in which a stage at work has gone on.
    """
    anchor = await dial(way.address, way.method, way.ledger, "the anchor", wait_s, waiting, way.identity)
    anchor.name(way.link, "up", way.limits)
    try:
        await anchor.send(Frame(Header(FrameKind.HELLO), to_bytes(hello())))
        welcome = from_bytes(Welcome, (await anchor.expect(FrameKind.WELCOME)).payload)
        anchor.heart.start(way.pulse)
        return anchor, welcome
    except BaseException:
        await anchor.close()
        raise


async def join(
    address: str, method: str, hello: Hello, ledger: Ledger, wait_s: float, link: str, identity: Identity | None = None
) -> Membership:
    """Dial the anchor and take the manifest. Raises BadAddress, Unreachable, Refused and ManifestMismatch, each readable."""
    hello.versions = {name: importlib.metadata.version(name) for name in ("torch", "grpcio", "protobuf")}
    hello.member = secrets.randbits(64) | 1  # never 0, which is nobody

    def waiting(waited_s: float) -> None:
        log.warning("no answer from the anchor at %s for %.0f s, trying on until %.0f s", address, waited_s, wait_s)

    way = Way(address, method, ledger, link, hello, identity)
    anchor, welcome = await _greet_again(way, wait_s, waiting)
    manifest = read_manifest(welcome.manifest)
    if manifest.digest() != welcome.manifest_digest:
        raise ManifestMismatch(
            f"the manifest from {address} has digest {manifest.digest()[:12]}..., the anchor calls it "
            f"{welcome.manifest_digest[:12]}...: install the same version of the software on both"
        )
    if hello.manifest_digest and hello.manifest_digest != welcome.manifest_digest:
        raise ManifestMismatch(f"the anchor at {address} runs another manifest than the one expected")
    way.limits[FrameKind.BASIS] = largest_set_bytes(manifest.link(), manifest.boundaries)
    anchor.name(link, "up", way.limits)
    return Membership(anchor, manifest, welcome.manifest_digest, way)


async def _greet_again(way: Way, wait_s: float, waiting: Callable[[float], None] | None = None) -> Greeted:
    """`greet`, also by way of anchors that are lost before they have answered."""
    until = time.monotonic() + wait_s
    while True:
        try:
            return await greet(way, lambda: way.hello, max(1.0, until - time.monotonic()), waiting)
        except PeerLost:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(AGAIN_S)


async def rejoin(membership: Membership, wait_s: float) -> None:
    """The anchor was lost before the start: wait for it, or for the next one, and begin a stream anew. Raises as `greet`."""
    limits = membership.anchor.limits
    membership.early.clear()
    membership.anchor, welcome = await _greet_again(membership.way, wait_s)
    membership.anchor.pace(limits)
    if welcome.manifest_digest != membership.digest:
        raise ManifestMismatch(f"the anchor at {membership.way.address} runs another manifest than before")


async def await_word(
    membership: Membership,
    ready: Frame,
    wait_s: float,
    take_bases: Callable[[BasisSet], None] | None = None,
    answer: Callable[[Fence], Awaitable[Frame]] | None = None,
    check: Callable[[Check], Awaitable[Checked]] | None = None,
) -> Start | None:
    """Say READY and `await_start`. An anchor that is lost meanwhile is waited for as if it had not been there yet.

    Else a death of the anchor would be one of every worker that is about to start, too. Raises PeerLost, Unreachable.
    """
    for _ in range(LOST_AT_MOST):
        try:
            await membership.anchor.send(ready)
            return await await_start(membership, take_bases, answer, check)
        except PeerLost as error:
            log.warning("%s; waiting for it, as nothing has begun", error)
            await membership.anchor.close()
            await asyncio.sleep(AGAIN_S)
            await rejoin(membership, wait_s)
    raise PeerLost(f"the anchor at {membership.way.address} was lost {LOST_AT_MOST} times before the start")


async def await_start(
    membership: Membership,
    take_bases: Callable[[BasisSet], None] | None = None,
    answer: Callable[[Fence], Awaitable[Frame]] | None = None,
    check: Callable[[Check], Awaitable[Checked]] | None = None,
) -> Start | None:
    """Wait until the anchor starts the run, taking the bases that come first; None when it ends before it began.

    A stage that joins a run at work is asked what it holds of it (`answer`), one of a run that goes on from a checkpoint
    whether its shard is whole (`check`).
    """
    membership.way.pulse.phase = "waits for the start"
    while (frame := await membership.next()) is not None:
        match frame.header.kind:
            case FrameKind.BASIS:
                bases = membership.take_bases(frame)
                if take_bases is not None:
                    take_bases(bases)
            case FrameKind.FENCE if answer is not None:
                await membership.anchor.send(await answer(from_bytes(Fence, frame.payload)))
            case FrameKind.CHECK if check is not None:
                checked = await check(from_bytes(Check, frame.payload))
                await membership.anchor.send(Frame(Header(FrameKind.CHECKED, membership.run), to_bytes(checked)))
            case FrameKind.CORRECTION | FrameKind.SNAPSHOT_HELD:
                pass  # meant for whoever held this stage; corrections are said again after START
            case FrameKind.START:
                start = from_bytes(Start, frame.payload)
                if len(start.stage_addresses) != membership.manifest.stages:
                    raise BadFrame(f"START names {len(start.stage_addresses)} stages, not {membership.manifest.stages}")
                membership.way.pulse.phase = "starting"
                return start
            case FrameKind.STOP:
                log.info("the run ended before it began: %s", from_bytes(Stop, frame.payload).reason)
                await membership.anchor.finish()
                return None
            case kind:
                raise BadFrame(f"the anchor sent {kind.name} before the start")
    raise PeerLost("the anchor closed the stream before the start")


def failed_report(who: str, error: Exception) -> Report:
    """Why a process ends, for the anchor's books: it failed itself, or it lost a neighbour."""
    text = str(error) if isinstance(error, KedgeError) else f"{type(error).__name__}: {error}"
    event = "lost" if isinstance(error, WireError) else "failed"
    return Report("event", 0, words={"event": event, "message": f"{who}: {' '.join(text.split())[:500]}"})


async def tell_failure(membership: Membership, who: str, error: Exception) -> None:
    """Let the anchor say why this process ends: it would only see it go away. What breaks a stream, it sees itself."""
    if isinstance(error, WireError):
        return
    with contextlib.suppress(WireError, TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            await membership.anchor.send_report(failed_report(who, error), 0)
        await asyncio.sleep(LAST_WORDS_S)


def read_bases(message: BasisSet, manifest: Manifest, stage: int | None = None) -> dict[tuple[int, Direction], Basis]:
    """The bases of a whole set, checked against the manifest before they are used. Raises BadFrame.

    All boundaries next to `stage` must be there; None: all of them.
    """
    spec = manifest.link()
    near = [b for b in range(manifest.boundaries) if stage is None or b in (stage - 1, stage)]
    wanted = {(b, d) for b in near for d in Direction if spec.basis_direction(d) is d}
    bases = {key_of(m, manifest.boundaries): basis_of(m, message.version, spec) for m in message.matrices}
    if set(bases) != wanted:
        raise BadFrame(f"basis version {message.version} holds {sorted(bases)}, wanted {sorted(wanted)}")
    return bases
