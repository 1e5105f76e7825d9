"""Exhaustive explicit-state check of how a tick is committed and how a run recovers: plain Python, every order of everything.

Stages 0..S-1 (0 leads) and the anchor. A version is a lineage: the tuple of (epoch, outcome) of every decided tick. The
network is a growing set of messages: each may be delivered never, once or often, in any order. A stage or its machine dies
at any moment; what it had written and not synced is there or not. The anchor may end an epoch at any time, which covers
its own death too: of what it knows, only the number of the epoch is durable.

    a stage     syncs its log before it votes; then either outcome of that tick can be reached (`pending`)
    stage 0     has COMMIT or SKIP on disk before DECIDE leaves; others step when it arrives, and sync that with the next vote
    the anchor  FENCE e+1 to all; each answers HELD; START at the newest version that all can reach, with the decision
    the log     begins with a checkpoint every C ticks; the files of the newest KEEP and of one more stay

What is promised: no tick that anybody has heard of is lost, one lineage in an epoch, no process works in an epoch that it,
or one before it, has worked in, and the run can always go on. `bug` plants one of BUGS, each of which must be found.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

COMMIT, SKIP = "commit", "skip"
Lineage = tuple[tuple[int, str], ...]
Message = tuple[Any, ...]


class Stage(NamedTuple):
    """One stage: its process, and its disk."""

    born: int = 0  # which process it is
    epoch: int = 1  # newest it has heard of
    began: int = 1  # newest it has worked in
    worked: int = 1  # newest that any process of this stage has worked in
    on: bool = True
    cur: Lineage | None = ()  # applied, and written to the log
    voted: bool = False
    told: bool = True  # stage 0: the newest decision has left
    log: Lineage = ()  # synced
    vote: bool = False  # synced: it has voted on the tick behind `log`
    bases: tuple[int, ...] = (0,)  # ticks of the checkpoints that files begin with
    saving: int = 0  # a checkpoint that is not whole yet, where that is not waited for


class Anchor(NamedTuple):
    """What the anchor knows."""

    epoch: int = 1
    fenced: bool = False
    born: tuple[int, ...] = ()
    held: tuple[tuple[int, frozenset[Lineage], bool], ...] = ()  # stage, what it can reach, whether it knows how


class State(NamedTuple):
    """Everything."""

    stages: tuple[Stage, ...]
    net: frozenset[Message]
    anchor: Anchor
    deaths: int = 0
    skips: int = 0
    heard: Lineage = ()  # the newest decision that has left stage 0


def reach(stage: Stage, lead: bool) -> frozenset[Lineage]:
    """Everything that a stage can go back to, or on to. A live process syncs before it says so."""
    log, vote = (stage.log, stage.vote) if stage.cur is None else (stage.cur, stage.voted)
    versions = {log[:n] for n in range(stage.bases[0], len(log) + 1)} if stage.bases else set()
    if vote and not lead:
        versions |= {(*log, (stage.began if stage.cur is not None else stage.worked, out)) for out in (COMMIT, SKIP)}
    return frozenset(versions)


def newest(held: list[frozenset[Lineage]]) -> Lineage | None:
    return max(frozenset.intersection(*held), key=len, default=None)


class Model:
    """One configuration."""

    def __init__(
        self, S: int = 3, STEPS: int = 2, EPOCHS: int = 2, DEATHS: int = 1, SKIPS: int = 1, C: int = 1, KEEP: int = 1,
        bug: str = "",
    ) -> None:  # fmt: skip
        self.S, self.STEPS, self.EPOCHS, self.DEATHS, self.SKIPS = S, STEPS, EPOCHS, DEATHS, SKIPS
        self.C, self.KEEP, self.bug = C, KEEP, bug

    def start(self) -> State:
        return State(tuple(Stage() for _ in range(self.S)), frozenset(), Anchor(born=(0,) * self.S))

    def steps(self, s: State) -> Iterator[tuple[str, State | None]]:
        """(what happens, what comes of it; None: somebody cannot go on from there)."""
        lead = s.stages[0]
        if lead.on and lead.told and not lead.voted and lead.cur is not None and len(lead.cur) < self.STEPS:
            begin = ("begin", lead.epoch, lead.cur, 1) if self.S > 1 else ("votes", lead.epoch, lead.cur, 0)
            if begin not in s.net:
                yield "begin", s._replace(net=s.net | {begin})
        if not lead.told and lead.cur is not None and lead.on:
            yield (
                "DECIDE",
                self._put(s, 0, lead._replace(told=True))._replace(
                    net=s.net | {("decide", lead.cur[-1][0], lead.cur[:-1], lead.cur[-1][1], 1)}, heard=lead.cur
                ),
            )
        for message in s.net:
            yield from self._deliver(s, message)
        yield from self._disasters(s)

    def _put(self, s: State, i: int, stage: Stage) -> State:
        return s._replace(stages=(*s.stages[:i], stage, *s.stages[i + 1 :]))

    def _deliver(self, s: State, m: Message) -> Iterator[tuple[str, State | None]]:
        match m:
            case ("begin", e, lineage, i):
                if self._takes(s.stages[i], e) and s.stages[i].cur == lineage and not s.stages[i].voted:
                    if i < self.S - 1:
                        yield f"forward {i}", s._replace(net=s.net | {("begin", e, lineage, i + 1)})
                    else:
                        yield from self._vote(s, i, e, lineage)
            case ("votes", e, lineage, i):
                begun = i == 0 or ("begin", e, lineage, i) in s.net
                if self._takes(s.stages[i], e) and s.stages[i].cur == lineage and not s.stages[i].voted and begun:
                    yield from self._vote(s, i, e, lineage)
            case ("decide", e, lineage, outcome, i) if i < self.S:
                stage = s.stages[i]
                if self._takes(stage, e) and stage.cur == lineage and stage.voted:
                    after = self._saved(stage._replace(cur=(*lineage, (e, outcome)), voted=False))
                    yield (
                        f"apply {i}",
                        self._put(s, i, after)._replace(net=s.net | {("decide", e, lineage, outcome, i + 1)}),
                    )
            case ("fence", e, i, born):
                stage = s.stages[i]
                if stage.born == born and e >= stage.epoch and e > stage.began:
                    synced = stage if stage.cur is None else stage._replace(log=stage.cur, vote=stage.voted)
                    after = synced._replace(epoch=e, on=False)
                    knows = i > 0 or not after.bases or len(after.log) > after.bases[0] or not after.log
                    held = ("held", e, i, born, reach(after, i == 0), knows)
                    yield f"fence {i}", self._put(s, i, after)._replace(net=s.net | {held})
            case ("held", e, i, born, versions, knows):
                yield from self._held(s, e, i, born, versions, knows)
            case ("start", e, version, born, knows):
                for i, stage in enumerate(s.stages):
                    if stage.born == born[i] and self._may_start(stage, e):
                        can = knows or version == (stage.log if stage.cur is None else stage.cur)[: len(version)]
                        yield f"start {i}", self._put(s, i, self._restarted(stage, e, version)) if can else None

    def _takes(self, stage: Stage, epoch: int) -> bool:
        return stage.on and (stage.epoch == epoch or self.bug == "no_fence")

    def _may_start(self, stage: Stage, epoch: int) -> bool:
        if self.bug == "dup_start":
            return stage.epoch == epoch
        return stage.epoch == epoch and stage.began < epoch

    def _vote(self, s: State, i: int, e: int, lineage: Lineage) -> Iterator[tuple[str, State | None]]:
        """The log of stage i goes to disk, and its vote upward; stage 0 decides."""
        stage = s.stages[i]
        if self.bug != "no_sync":
            stage = stage._replace(log=lineage, vote=True)
        if self.bug == "naive" and i > 0:
            after = (*lineage, (e, COMMIT))
            stage = stage._replace(cur=after, log=after, vote=False)
        elif i > 0:
            stage = stage._replace(voted=True)
        if i > 0:
            yield f"vote {i}", self._put(s, i, stage)._replace(net=s.net | {("votes", e, lineage, i - 1)})
            return
        for outcome in (COMMIT, SKIP) if s.skips < self.SKIPS else (COMMIT,):
            new = (*lineage, (e, outcome))
            log = lineage if self.bug == "late_decide" else new
            decided = self._saved(stage._replace(cur=new, told=False, log=log, vote=False))
            yield outcome, self._put(s, 0, decided)._replace(skips=s.skips + (outcome == SKIP))

    def _saved(self, stage: Stage) -> Stage:
        """A checkpoint where it is due, and the log from it on; what was written before it is synced."""
        assert stage.cur is not None
        tick = len(stage.cur)
        if tick % self.C or self.bug == "late_decide":
            return stage
        keep = 1 if self.bug in ("ckpt_gc", "turn_first") else self.KEEP + 1
        bases = (*(b for b in stage.bases if b < tick), tick)[-keep:]
        if self.bug == "turn_first":  # the shard is written beside the next ticks, and the log does not wait for it
            return stage._replace(bases=bases, log=stage.cur, vote=False, saving=tick)
        return stage._replace(bases=bases, log=stage.cur, vote=False)

    def _held(
        self, s: State, e: int, i: int, born: int, versions: Any, knows: bool
    ) -> Iterator[tuple[str, State | None]]:
        a = s.anchor
        if e != a.epoch or not a.fenced or a.born[i] != born or any(its[0] == i for its in a.held):
            return
        held = tuple(sorted((*a.held, (i, versions, knows)), key=lambda its: its[0]))
        if len(held) < self.S:
            yield f"held {i}", s._replace(anchor=a._replace(held=held))
            return
        version = newest([its[1] for its in held])
        if version is None:
            yield "NO COMMON VERSION", None
            return
        after = a._replace(fenced=False, held=())
        heard = max(s.heard, version, key=len)  # all are told
        yield "START", s._replace(anchor=after, heard=heard, net=s.net | {("start", e, version, a.born, held[0][2])})

    def _restarted(self, stage: Stage, e: int, version: Lineage) -> Stage:
        """Rebuilt at a version that it holds, or by the decision of a tick that it voted on; on disk before it links up."""
        bases = tuple(b for b in stage.bases if b <= len(version)) or stage.bases
        return stage._replace(
            began=e, worked=e, on=True, cur=version, voted=False, told=True, log=version, vote=False, bases=bases
        )

    def _disasters(self, s: State) -> Iterator[tuple[str, State | None]]:
        a = s.anchor
        for i, stage in enumerate(s.stages):
            if stage.saving:
                yield f"saved {i}", self._put(s, i, stage._replace(saving=0))
            if s.deaths < self.DEATHS and stage.cur is not None:
                dead = stage._replace(born=stage.born + 1, epoch=0, began=0, on=False, cur=None, voted=False, told=True)
                if stage.saving:
                    dead = dead._replace(bases=(), saving=0)
                kept = dead._replace(log=stage.cur, vote=stage.voted)
                for after in {dead, kept}:
                    yield f"DEATH {i}", self._put(s, i, after)._replace(deaths=s.deaths + 1)
            if a.born[i] != stage.born:
                born = (*a.born[:i], stage.born, *a.born[i + 1 :])
                if a.fenced:
                    its = a._replace(born=born, held=tuple(said for said in a.held if said[0] != i))
                    yield f"join {i}", s._replace(anchor=its, net=s.net | {("fence", a.epoch, i, stage.born)})
                elif a.epoch < self.EPOCHS:
                    yield f"join {i}", self._fenced(s, born)
        if a.epoch < self.EPOCHS:
            yield "FENCE", self._fenced(s, a.born)

    def _fenced(self, s: State, born: tuple[int, ...]) -> State:
        e = s.anchor.epoch + 1
        fences = {("fence", e, i, born[i]) for i in range(self.S)}
        return s._replace(anchor=Anchor(e, True, born), net=s.net | fences)

    def wrong(self, s: State) -> str:
        """What is broken in this state, in words."""
        version = newest([reach(stage, i == 0) for i, stage in enumerate(s.stages)])
        if version is None:
            return "no version can be reached by all"
        if version[: len(s.heard)] != s.heard:
            return "a tick that was heard of can be lost"
        on = [stage for stage in s.stages if stage.on and stage.cur is not None]
        for x in on:
            for y in on:
                if x.epoch == y.epoch and x.cur is not None and y.cur is not None:
                    both = min(len(x.cur), len(y.cur))
                    if x.cur[:both] != y.cur[:both]:
                        return "two lineages in one epoch"
                    if abs(len(x.cur) - len(y.cur)) > 1:
                        return "versions in one epoch differ by more than one tick"
        if any(len(stage.bases) > self.KEEP + 1 for stage in s.stages):
            return "the log is not bounded"
        return ""

    def step_is_wrong(self, s: State, t: State) -> str:
        """What only a step shows: who begins an epoch for a second time."""
        for before, after in zip(s.stages, t.stages, strict=True):
            if not before.on and after.on and after.began <= before.worked:
                return "a stage works in an epoch for a second time"
            if before.on and after.on and before.cur != after.cur and len(after.cur or ()) <= len(before.cur or ()):
                return "a stage that works goes back"
        return ""


def search(limit: int = 2_000_000, live: bool = False, **configuration: Any) -> tuple[str, str, int, list[str]]:
    """(OK, VIOLATION or LIMIT; what is wrong; states; the steps that lead there). `live`: the run can always end."""
    model = Model(**configuration)
    first = model.start()
    came: dict[State, tuple[State, str] | None] = {first: None}
    back: dict[State, list[State]] = {}
    queue, ended = deque([first]), []

    def trace(s: State) -> list[str]:
        steps = []
        while (origin := came[s]) is not None:
            s, what = origin
            steps.append(what)
        return steps[::-1]

    seen = 0
    while queue:
        s = queue.popleft()
        seen += 1
        if problem := model.wrong(s):
            return "VIOLATION", problem, seen, trace(s)
        if seen > limit:
            return "LIMIT", "", seen, []
        if len(s.heard) >= model.STEPS:
            ended.append(s)
        for what, t in model.steps(s):
            problem = what if t is None else model.step_is_wrong(s, t)
            if t is None or problem:
                return "VIOLATION", problem, seen, [*trace(s), what]
            if live:
                back.setdefault(t, []).append(s)
            if t not in came:
                came[t] = (s, what)
                queue.append(t)
    if live:
        fine = set(ended)
        while ended:
            for s in back.get(ended.pop(), ()):
                if s not in fine:
                    fine.add(s)
                    ended.append(s)
        for s in came:
            if s not in fine and s.anchor.epoch < model.EPOCHS:
                return "VIOLATION", "no way to the end, even with another epoch", seen, trace(s)
    return "OK", "", seen, []


# Each with the smallest configuration that shows it.
BUGS: dict[str, dict[str, Any]] = {
    "naive": {"S": 2, "STEPS": 1, "EPOCHS": 1},  # a stage steps when it votes
    "dup_start": {"S": 2},  # a START is taken twice in an epoch
    "no_fence": {"S": 2, "EPOCHS": 3},  # frames of an epoch that is over are taken
    "ckpt_gc": {"S": 2, "C": 1},  # only the newest checkpoint is kept
    "turn_first": {"S": 2, "C": 1},  # the log goes on from a checkpoint that is not whole yet
    "no_sync": {"S": 2},  # a vote leaves before the log is on disk
    "late_decide": {"S": 2, "STEPS": 1},  # a decision leaves before it is on disk
}
SMALL: list[dict[str, Any]] = [
    {"S": 1, "live": True},
    {"S": 2, "live": True},
    {"S": 2, "C": 2, "STEPS": 3, "EPOCHS": 2},
]
FULL: list[dict[str, Any]] = [
    {"S": 3, "live": True},
    {"S": 2, "EPOCHS": 3, "live": True},
    {"S": 2, "STEPS": 4, "SKIPS": 2, "C": 2},
    {"S": 2, "DEATHS": 2, "EPOCHS": 3},
    {"S": 3, "DEATHS": 2, "STEPS": 3},
    {"S": 4},
    {"S": 3, "EPOCHS": 3, "STEPS": 1},
]


def main() -> int:
    """Everything, with its figures: `python tests/simulation/step_commit_model.py`."""
    failures = 0
    cases = [({"bug": bug, **smallest}, "VIOLATION") for bug, smallest in BUGS.items()]
    for configuration, expected in cases + [(case, "OK") for case in SMALL + FULL]:
        began = time.perf_counter()
        got, what, states, steps = search(**configuration)
        failures += got != expected
        print(
            f"wanted {expected}, got {got}: {configuration} {what} | {states} states, {time.perf_counter() - began:.1f} s"
        )
        if steps:
            print("    ", " > ".join(steps), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
