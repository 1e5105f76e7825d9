"""Who is let in: three bad frames shut a peer out until the next epoch, and nobody holds more streams than his share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm_core.wire import streams
from swarm_core.wire.door import HELLO_LIMIT, MOST_STREAMS, MOST_STRIKES, MOST_WAITING, Door
from swarm_core.wire.errors import (
    BadFrame,
    Crowded,
    ManifestMismatch,
    Nameless,
    Quarantined,
    Refused,
    StageTaken,
    StaleEpoch,
)
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind
from swarm_core.wire.streams import Dialled, FrameStream, Server, dial, peer_name

HELLO = Frame(Header(FrameKind.HELLO), b"hello")
BAD = BadFrame("the checksum of a frame does not match")


def strikes(door: Door, peer: str, times: int, error: Refused = BAD) -> None:
    for _ in range(times):
        door.enter(peer)
        door.greeted()
        door.leave(peer, greeted=True)
        door.refused(peer, error)


def test_three_strikes_and_a_new_epoch() -> None:
    door = Door()
    strikes(door, "ann", MOST_STRIKES - 1)
    strikes(door, "bob", MOST_STRIKES)
    strikes(door, "ann", 0)
    door.enter("ann")
    with pytest.raises(Quarantined, match="bob has sent 3 bad frames and is shut out until the next epoch"):
        door.enter("bob")
    door.begin_epoch()
    door.enter("bob")


@pytest.mark.parametrize("error", [StageTaken, ManifestMismatch, StaleEpoch, Crowded, Nameless, Quarantined])
def test_what_happens_to_honest_peers_is_no_strike(error: type[Refused]) -> None:
    door = Door()
    strikes(door, "ann", 10, error("not now"))
    door.enter("ann")


def test_a_finer_bad_frame_is_a_strike() -> None:
    class Finer(BadFrame):
        pass

    door = Door()
    strikes(door, "ann", MOST_STRIKES, Finer("finer"))
    with pytest.raises(Quarantined):
        door.enter("ann")


def test_peers_that_cannot_be_told_apart_are_not_shut_out() -> None:
    door = Door()
    strikes(door, "", 10 * MOST_STRIKES)
    for _ in range(MOST_STREAMS + 1):
        door.enter("")
        door.greeted()


def test_streams_of_a_peer_and_streams_that_say_nothing() -> None:
    door = Door()
    for _ in range(MOST_STREAMS):
        door.enter("ann")
        door.greeted()
    with pytest.raises(Crowded, match="ann has 32 streams open"):
        door.enter("ann")
    for i in range(MOST_WAITING):
        door.enter(f"peer {i}")
    with pytest.raises(Crowded, match="64 streams have not said who they are"):
        door.enter("bob")
    door.greeted()
    door.enter("bob")
    door.leave("bob", greeted=False)
    door.leave("ann", greeted=True)
    door.enter("ann")
    assert set(door._streams) == {"ann", *(f"peer {i}" for i in range(MOST_WAITING))}, "who has left is forgotten"


class Context:
    """What gRPC says of a peer."""

    def __init__(self, peer: str, identities: list[bytes] | None = None) -> None:
        self._peer, self._identities = peer, identities

    def peer(self) -> str:
        return self._peer

    def peer_identities(self) -> list[bytes] | None:
        return self._identities


@pytest.mark.parametrize(
    ("peer", "identities", "name"),
    [
        ("ipv4:127.0.0.1:50132", None, ""),
        ("ipv6:%5B::1%5D:50132", None, ""),
        ("ipv4:10.1.2.3:50132", None, "10.1.2.3 (Link)"),
        ("ipv4:10.1.2.3:50133", None, "10.1.2.3 (Link)"),
        ("ipv6:%5B2001:db8::7%5D:50132", None, "[2001:db8::7] (Link)"),
        ("ipv4:127.0.0.1:50132", [b"stage-1"], "stage-1"),
        ("ipv4:10.1.2.3:50132", [b"stage-1", b"other"], "stage-1"),
    ],
)
def test_the_name_of_a_peer(peer: str, identities: list[bytes] | None, name: str) -> None:
    assert peer_name(Context(peer, identities), "Link") == name


# Over real streams ----------------------------------------------------------------------------------------------------


async def refusing(stream: FrameStream) -> None:
    await stream.expect(FrameKind.HELLO)
    await stream.receive()


def served(work: Callable[[Server, str], Coroutine[Any, Any, None]]) -> None:
    async def inside() -> None:
        server = Server("Stage", {"Link": refusing}, Ledger())
        address = await server.start("127.0.0.1:0")
        try:
            await work(server, address)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(inside(), timeout=30))


async def bad_frame(address: str) -> Refused:
    """Say HELLO, then what is no frame; what the server says of it."""
    stream = await dial(address, "Stage/Link", Ledger(), "stage 1", 5.0)
    try:
        await stream.send(HELLO)
        with contextlib.suppress(*streams.BROKEN):  # who is shut out is told before
            await stream._write(b"no frame")
        with pytest.raises(BadFrame) as caught:
            await stream.receive()
        return caught.value
    except BadFrame as error:  # refused before it was written
        return error
    finally:
        await stream.close()


def test_a_server_shuts_out_who_sends_rubbish_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    name = ["mallory (Link)"]
    monkeypatch.setattr(streams, "peer_name", lambda context, call: name[0])

    async def work(server: Server, address: str) -> None:
        for _ in range(MOST_STRIKES):
            assert "not a frame" in str(await bad_frame(address))
        text = str(await bad_frame(address))
        assert "mallory (Link) has sent 3 bad frames and is shut out" in text and "\n" not in text
        name[0] = "ann (Link)"
        assert "not a frame" in str(await bad_frame(address))
        name[0] = "mallory (Link)"
        server.door.begin_epoch()
        assert "not a frame" in str(await bad_frame(address))

    served(work)


def test_loopback_peers_without_a_name_are_refused_frame_by_frame() -> None:
    async def work(server: Server, address: str) -> None:
        for _ in range(MOST_STRIKES + 2):
            assert "not a frame" in str(await bad_frame(address))

    served(work)


def test_who_says_nothing_is_sent_away_and_who_has_said_hello_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HELLO_S", 0.2)

    async def work(server: Server, address: str) -> None:
        silent = await dial(address, "Stage/Link", Ledger(), "stage 1", 5.0)
        spoke = await dial(address, "Stage/Link", Ledger(), "stage 1", 5.0)
        await spoke.send(HELLO)
        with pytest.raises(BadFrame, match="no HELLO came within"):
            await silent.receive()
        await asyncio.sleep(0.3)
        await spoke._write(b"no frame")
        with pytest.raises(BadFrame, match="not a frame"):
            await spoke.receive()
        for stream in (silent, spoke):
            await stream.close()
        assert server.door._waiting == 0

    served(work)


def test_a_first_frame_is_small() -> None:
    async def work(_server: Server, address: str) -> None:
        stream: Dialled = await dial(address, "Stage/Link", Ledger(), "stage 1", 5.0)
        await stream.send(Frame(HELLO.header, bytes(HELLO_LIMIT + 1)))
        with pytest.raises(BadFrame, match=f"at most {HELLO_LIMIT}"):
            await stream.receive()
        await stream.close()

    served(work)
