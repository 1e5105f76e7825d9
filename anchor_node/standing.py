"""Where the swarm stands, as one plain value that answers at any time, also when no tick moves. Reads; changes nothing.

`anchor_node status` asks for it and prints it (status.py); nobody who trains depends on it.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from swarm_core.wire.beats import Heart
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.messages import FrameKind, Hello, Status, from_bytes, to_bytes
from swarm_core.wire.outbox import Outbox
from swarm_core.wire.streams import FrameStream

if TYPE_CHECKING:
    from anchor_node.service import AnchorService, Screen

# Events that somebody should do something about; the live table has the same eye for them.
ERRORS = ("failed", "lost", "silent", "broke", "refused", "behind", "no_evaluation")


class Noted:
    """A screen that remembers what it was shown last, in front of the one that people watch."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self.last: dict[str, dict[str, Any]] = {}  # "tick", "event", "error", and each event by its name
        self.at: dict[str, float] = {}

    def update(self, row: dict[str, Any]) -> None:
        name = str(row.get("event", ""))
        keys = [str(row.get("type", "")), *([f"event {name}"] if name else [])]
        keys += ["error"] if any(word in name for word in ERRORS) else []
        for key in keys:
            self.last[key], self.at[key] = row, time.monotonic()
        self._screen.update(row)

    def bytes_update(self, totals: dict[str, list[int]]) -> None:
        self._screen.bytes_update(totals)

    def told(self, key: str) -> dict[str, Any] | None:
        """The last row under a key, in short."""
        if (row := self.last.get(key)) is None:
            return None
        words = {"name": row.get("event", ""), "message": row.get("message", ""), "tick": row.get("tick")}
        return words | {"age_s": round(time.monotonic() - self.at[key], 1)}


async def tell(anchor: AnchorService, stream: FrameStream) -> None:
    """Answer one `Anchor/Status` call. Raises BadFrame."""
    hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
    if hello.role != "status":
        raise BadFrame(f"a {hello.role or 'nameless'} came where somebody asks for the status")
    stream.name("anchor-status", "down")
    text = json.dumps(standing(anchor), default=str)
    await stream.send(Frame(Header(FrameKind.STATUS, tick=anchor.tick), to_bytes(Status(text))))


def standing(anchor: AnchorService) -> dict[str, Any]:
    """Everything that is known of the run. Times are in seconds, sizes in bytes of messages."""
    config, keeper = anchor.manifest.config, anchor.slow.keeper
    books = getattr(anchor, "books", None)  # they come once the socket is bound
    noted = anchor.screen
    ticked = noted.at.get("tick")
    return {
        "run": config.run.name,
        "manifest": anchor.digest[:12],
        "address": anchor.address,
        "phase": phase(anchor),
        "epoch": anchor.roster.epoch,
        "tick": anchor.tick,
        "target_ticks": config.run.ticks,
        "since_last_tick_s": None if ticked is None else round(time.monotonic() - ticked, 1),
        "stages": [_stage(anchor, stage) for stage in range(anchor.manifest.stages)],
        "samplers": [{"state": "here", **_heart(box.stream.heart)} for box in anchor.samplers.boxes.values()],
        "checkpoint": noted.told("event checkpoint"),
        "resumed_from": anchor.resume.name if anchor.resume else "",
        "basis_version": keeper.version if keeper is not None else None,
        "correction": noted.told("event correction"),
        "bytes": {kind: sums[2] for kind, sums in books.totals.items()} if books is not None else {},
        "last_event": noted.told("event"),
        "last_error": noted.told("error"),
    }


def phase(anchor: AnchorService) -> str:
    """What the run is at, in words."""
    if anchor.over.done():
        return "ending: members take their leave"
    if not anchor.opened:
        return "preparing: the anchor reads the model and makes the first bases"
    if not anchor.roster.started:
        missing = anchor.roster.missing()
        return f"waiting for stage{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    if anchor.owed is not None:
        return f"finished; still to come: {', '.join(sorted(anchor.owed)) or 'nothing'}"
    return "at work"


def _stage(anchor: AnchorService, stage: int) -> dict[str, Any]:
    member, box = anchor.roster.members.get(stage), anchor.stages.get(stage)
    found: dict[str, Any] = {"stage": stage, "state": "missing", "address": ""}
    if member is not None:
        found |= {"address": member.address, "state": "loading" if member.ready is None else "ready"}
        if anchor.roster.started:
            found["state"] = "away" if member.away else "at work"
    found["report_tick"] = anchor.ledgered.get(stage)
    found["copied_tick"] = anchor.off_host.copies[stage].tick or None
    return found | (_heart(box.stream.heart) if isinstance(box, Outbox) else {})


def _heart(heart: Heart) -> dict[str, Any]:
    """What the beats of a member said, and how old that is."""
    found: dict[str, Any] = {"silent_s": round(time.monotonic() - heart.came_at, 1)}
    if heart.judge is not None:
        found |= {"may_be_silent_s": round(heart.judge.limit_s, 1), "round_trip_s": round(heart.judge.round_trip_s, 4)}
    if heart.last is not None and heart.last_header is not None:
        beat, header = heart.last, heart.last_header
        found |= {"epoch": header.epoch, "tick": header.tick, "phase": beat.phase}
        found |= {"awaits": beat.awaits, "awaits_s": round(beat.awaits_s, 1)}
    return found
