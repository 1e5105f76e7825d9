"""The books of the anchor's replay ring: which pairs of weights and rollouts are held, to be replayed, to be deleted.
No file, tensor or clock: the owner of the files tells what came and deletes what it is told.

A pair is everything of one snapshot tick s: the weights of every stage, the slice that the tick consumed and its old
log-probs. It is kept until its fire tick s + K has passed and it was replayed, or given up because its correction could
only be merged older than k_max, or came too late beside a newer one. Retention hangs on the schedule of the corrections
alone: how often the basis is refreshed does not enter.

Where the limit is reached the oldest go: first those past their fire tick, of these the replayed ones first; never one
under replay. With `limit_bytes` >= `needed_bytes(pair)` none goes before its fire tick, however slow the replays are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from swarm_core.learning.errors import UnfitError
from swarm_core.learning.latency import FireSchedule

Part = int | Literal["slice", "logprobs"]  # a stage's weights; the slice; old log-probs, empty without a score pass
MIB = 1 << 20


class RingError(UnfitError):
    """A ring too small, or a part or version that is not its own."""


@dataclass
class _Pair:
    parts: dict[Part, int] = field(default_factory=dict)  # sizes in bytes
    replayed: bool = False


class ReplayRing:
    """The pairs of one run. Versions are those of the corrections that will be made of them (`FireSchedule`).

    It keeps nothing by itself: after a restart or a rollback a new one is told what the volume holds.
    """

    def __init__(self, schedule: FireSchedule, stages: int, limit_bytes: int) -> None:
        if stages < 1 or limit_bytes < 1:
            raise RingError("replay ring", f"{stages} stages, {limit_bytes} bytes", ">= 1 of both", "raise them")
        self.schedule = schedule
        self.stages = stages
        self.limit_bytes = limit_bytes
        self._pairs: dict[int, _Pair] = {}
        self._replaying: int | None = None
        self._overtaken = 0  # it was replayed and has been due, so nothing up to it is worth a replay
        self._now = 0  # the newest tick told, or that a snapshot came of

    def needed_bytes(self, pair_bytes: int) -> int:
        """The least limit at which no pair of at most `pair_bytes` goes early."""
        return self.schedule.most_pairs() * pair_bytes

    def check(self, pair_bytes: int) -> None:
        """Refuse a ring that is too small for its schedule: RingError names the size that is needed."""
        needed = self.needed_bytes(pair_bytes)
        if needed > self.limit_bytes:
            raise RingError(
                "anchor.ring_mb",
                self.limit_bytes // MIB,
                f">= {-(-needed // MIB)} MiB ({self.schedule.most_pairs()} pairs of {pair_bytes / MIB:.1f} MiB)",
                "raise it, or anchor.m_cadence, or lower the latency",
            )

    # What came -----------------------------------------------------------------------------------------------------

    def part_came(self, version: int, part: Part, size_bytes: int) -> list[int]:
        """A part is whole and kept. Returns the versions whose files must go now to stay within the limit; `version`
        itself is among them where it finds no room or is of no more use. The same part again replaces the first."""
        tick = self.schedule.tick_of(version)
        if part not in self._wanted() or isinstance(part, bool):
            wanted = f'a stage below {self.stages}, "slice" or "logprobs"'
            raise RingError(f"part of pair {version}", repr(part), wanted, "send the parts of this run")
        if size_bytes < 0:
            raise RingError(f"part {part!r} of pair {version}", f"{size_bytes} bytes", ">= 0", "pass its size")
        self._now = max(self._now, tick)
        if version <= self._overtaken and version not in self._pairs and self._past(version, self._now):
            return [version]
        self._pairs.setdefault(version, _Pair()).parts[part] = size_bytes
        return self._make_room()

    def complete(self, version: int) -> bool:
        """Are all parts of `version` in?"""
        pair = self._pairs.get(version)
        return pair is not None and len(pair.parts) == self.stages + 2

    # Replays -------------------------------------------------------------------------------------------------------

    def next_replay(self, now: int, k_max: int) -> int | None:
        """The newest complete pair worth a replay in tick `now`: not replayed, not under replay, its correction due
        while not older than `k_max`, and none newer both replayed and due."""
        self._now = max(self._now, now)
        least = self._newest_due(now)
        for version in sorted(self._pairs, reverse=True):
            waits = self.complete(version) and not self._pairs[version].replayed and version != self._replaying
            if waits and version > least and not self._too_late(version, now, k_max):
                return version
        return None

    def start(self, version: int) -> None:
        """`version` is under replay (the one before it no more): it stays until `replayed`, `forget` or the next."""
        if not self.complete(version):
            raise RingError("replay", f"pair {version}", f"one of {self.held()} that is whole", "ask next_replay")
        self._replaying = version

    @property
    def replaying(self) -> int | None:
        """The version under replay; None also where its pair was forgotten since: its result must be thrown away."""
        return self._replaying

    def replayed(self, version: int) -> None:
        """Its correction is made, and durable: a restart would not replay it again."""
        if version not in self._pairs:
            raise RingError("replayed", f"pair {version}", f"one of {self.held()}", "a forgotten pair's replay ends")
        self._pairs[version].replayed = True
        self._stop(version)

    # What goes -----------------------------------------------------------------------------------------------------

    def drop(self, now: int, k_max: int) -> list[int]:
        """The versions to delete in tick `now`: past their fire tick and replayed, given up, or incomplete beside a
        newer complete one. They are forgotten here; one under replay stays."""
        self._now = max(self._now, now)
        self._overtaken = self._newest_due(now)
        newest = max((v for v in self._pairs if self.complete(v)), default=0)
        gone = [
            version
            for version, pair in self._pairs.items()
            if version != self._replaying
            and self._past(version, now)
            and (
                pair.replayed
                or version <= self._overtaken
                or self._too_late(version, now, k_max)
                or (version < newest and not self.complete(version))
            )
        ]
        return self._forget(gone)

    def forget(self, version: int) -> None:
        """`version` is lost, whatever state it was in (damaged, of another lineage). Its parts may come again."""
        self._pairs.pop(version, None)
        self._stop(version)

    # The books -----------------------------------------------------------------------------------------------------

    def held(self) -> list[int]:
        """The versions with any part, in order."""
        return sorted(self._pairs)

    @property
    def held_bytes(self) -> int:
        """Bytes of all parts held."""
        return sum(sum(pair.parts.values()) for pair in self._pairs.values())

    def _wanted(self) -> list[Part]:
        return [*range(self.stages), "slice", "logprobs"]

    def _past(self, version: int, now: int) -> bool:
        return now > self.schedule.fire_tick(version)

    def _too_late(self, version: int, now: int, k_max: int) -> bool:
        """Could its correction only be merged at an age above k_max?"""
        return max(now, self.schedule.fire_tick(version)) - self.schedule.tick_of(version) > k_max

    def _newest_due(self, now: int) -> int:
        """The newest version replayed whose correction may be merged: it wins over all before it."""
        due = [v for v, pair in self._pairs.items() if pair.replayed and self.schedule.fire_tick(v) <= now]
        return max([self._overtaken, *due])

    def _make_room(self) -> list[int]:
        if self.held_bytes <= self.limit_bytes:
            return []
        now = self._now
        self._overtaken = self._newest_due(now)
        gone: list[int] = []
        for version in sorted(self._pairs, key=lambda v: (not self._past(v, now), not self._pairs[v].replayed, v)):
            if version != self._replaying and self.held_bytes > self.limit_bytes:
                gone += self._forget([version])
        return gone

    def _forget(self, versions: list[int]) -> list[int]:
        for version in versions:
            self.forget(version)
        return sorted(versions)

    def _stop(self, version: int) -> None:
        if self._replaying == version:
            self._replaying = None
