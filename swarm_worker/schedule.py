"""What one stage does next: 1F1B over the microbatches of a round, then vote, then apply. Sans-I/O: events in, commands out.

No tensor, socket, clock or thread lives here. The shell (worker.py) turns frames and finished computations into events
and carries the commands out; a simulation can do the same under a virtual clock.

A *round* is a tick (mode TRAIN), a forward-only pass over a batch (SCORE, REFERENCE), or a probe (PROBE): two
microbatches forward and backward as in a tick, then a comparison of the two in place of vote and decision. Rounds queue
up in the order stage 0 began them; only the first is worked on, but frames of later ones may already arrive.

An activation of a tick may refer to rows that the receiver no longer holds. It then counts as not arrived, and the
sender is asked for it whole, once. Only ticks need this: a probe and a reference pass refer to nothing, and the score
pass makes a batch's first references. So the sender is still in that round and holds what it needs: the gradient of
that microbatch cannot have come back, nor a vote of the receiver.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Decide, Mode, Outcome

# A probe's microbatches are the same few sequences twice: over the links as they are, and over exact ones.
COMPRESSED, DENSE = 0, 1
CROSSINGS = 2


class ProtocolError(BadFrame):
    """A peer did what the protocol does not allow; the message says what came and what was expected."""


@dataclass(frozen=True)
class Stamp:
    """Identity of a round and everything stage 0 decided about it."""

    epoch: int = 0
    tick: int = 0
    attempt: int = 0
    lineage: int = 0
    mode: Mode = Mode.TRAIN
    batch: int = 0
    pass_: int = 0
    slice: int = 0
    microbatches: int = 0
    basis_version: int = 0
    correction: int = 0
    step: int = 0

    @property
    def key(self) -> tuple[int, int, int, Mode, int]:
        return (self.epoch, self.tick, self.attempt, self.mode, self.batch)

    @property
    def with_gradients(self) -> bool:
        """Whether microbatches go backward, too."""
        return self.mode in (Mode.TRAIN, Mode.PROBE)


class Op(enum.Enum):
    """A piece of work for the compute thread."""

    FORWARD = "forward"
    LOSS = "loss"  # last stage: forward, loss and backward of one microbatch
    BACKWARD = "backward"
    SCORE = "score"
    RESEND = "resend"  # the activation of a microbatch once more, without references
    COMPARE = "compare"  # end of a probe: the two gradients, and on the last stage the two forwards
    TALLY = "tally"  # check the accumulated gradient, merge the correction, take the norms
    APPLY = "apply"  # step, or skip, or only save


# Events ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begun:
    stamp: Stamp


@dataclass(frozen=True)
class ActivationCame:
    key: tuple[int, int, int, Mode, int]
    microbatch: int


@dataclass(frozen=True)
class GradientCame:
    key: tuple[int, int, int, Mode, int]
    microbatch: int


@dataclass(frozen=True)
class VoteCame:
    """The vote of all stages downstream."""

    key: tuple[int, int, int, Mode, int]


@dataclass(frozen=True)
class Decided:
    """Stage 0 has decided; `key` is the tick's. A HOLD is about no tick."""

    decide: Decide
    key: tuple[int, int, int, Mode, int] | None = None


@dataclass(frozen=True)
class Computed:
    """The compute thread is free again."""


@dataclass(frozen=True)
class Lost:
    """The compute thread is free again, and has done nothing: the activation refers to rows that are not held here."""


@dataclass(frozen=True)
class ResendAsked:
    """The next stage has lost what this activation refers to."""

    key: tuple[int, int, int, Mode, int]
    microbatch: int


@dataclass(frozen=True)
class Sent:
    """The link has taken one activation off our hands."""


Event = Begun | ActivationCame | GradientCame | VoteCame | Decided | Computed | Lost | ResendAsked | Sent


# Commands --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    op: Op
    stamp: Stamp
    microbatch: int = 0
    decide: Decide | None = None


@dataclass(frozen=True)
class AskAgain:
    """Ask the stage before for this activation, whole."""

    stamp: Stamp
    microbatch: int


@dataclass(frozen=True)
class CastVote:
    """Own tally and everything downstream are in: vote upstream (stage 0: decide)."""

    stamp: Stamp


@dataclass(frozen=True)
class Finished:
    """The round is over on this stage."""

    stamp: Stamp


Command = Compute | AskAgain | CastVote | Finished


@dataclass
class _Round:
    stamp: Stamp
    activations: set[int] = field(default_factory=set)
    gradients: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)  # activations asked for again
    asked: set[int] = field(default_factory=set)  # activations that the next stage has asked for again
    to_resend: deque[int] = field(default_factory=deque)
    forwarded: int = 0
    backwarded: int = 0
    tallied: bool = False
    downstream_voted: bool = False
    voted: bool = False
    decide: Decide | None = None


class Schedule:
    """One stage's schedule. `handle(event)` returns the commands that follow from it."""

    def __init__(self, stage: int, stages: int) -> None:
        self.stage = stage
        self.stages = stages
        self.credit = 2 * stages  # activations computed but not yet taken by the link; 1F1B alone keeps a tick below it
        self._unsent = 0
        self._rounds: deque[_Round] = deque()
        self._running: Compute | None = None

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def idle(self) -> bool:
        """Nothing begun is unfinished."""
        return not self._rounds

    def waiting_for(self) -> str:
        """What the stage waits for, in words; empty while it computes or has nothing to do."""
        if self._running is not None or not self._rounds:
            return ""
        r = self._rounds[0]
        where = f"tick {r.stamp.tick} {r.stamp.mode.name.lower()}"
        if r.voted or r.tallied and r.downstream_voted:
            return f"{where}: the decision of stage 0"
        if r.tallied:
            return f"{where}: the vote of stage {self.stage + 1}"
        if r.forwarded < r.stamp.microbatches and r.forwarded not in r.activations:
            return f"{where}: activation {r.forwarded} of stage {self.stage - 1}"
        if not r.stamp.with_gradients:
            return f"{where}: the link to stage {self.stage + 1}, to take an activation"
        return f"{where}: gradient {r.backwarded} of stage {self.stage + 1}"

    def handle(self, event: Event) -> list[Command]:
        commands: list[Command] = []
        match event:
            case Begun(stamp):
                self._begin(stamp)
            case ActivationCame(key, microbatch):
                r = self._find(key)
                self._note(r.activations, microbatch, r.stamp.microbatches, key, "activation")
            case GradientCame(key, microbatch):
                r = self._find(key)
                sent = r.forwarded if r.stamp.with_gradients else 0
                self._note(r.gradients, microbatch, sent, key, "gradient")
            case VoteCame(key):
                self._vote_came(self._find(key))
            case Decided(decide, key):
                self._decided(decide, key)
            case Computed():
                commands += self._computed()
            case Lost():
                commands.append(self._lost())
            case ResendAsked(key, microbatch):
                self._resend_asked(self._find(key), microbatch)
            case Sent():
                self._unsent -= 1
        if self._rounds:
            r = self._rounds[0]
            if r.tallied and not r.voted and (r.downstream_voted or self.last) and r.decide is None:
                r.voted = True
                commands.append(CastVote(r.stamp))
        if self._running is None and self._rounds:
            self._running = self._next(self._rounds[0])
            if self._running is not None:
                commands.append(self._running)
        return commands

    def _begin(self, stamp: Stamp) -> None:
        if any(r.stamp.key == stamp.key for r in self._rounds):
            raise ProtocolError(f"round {stamp.key} was begun twice")
        if stamp.mode is not Mode.TRAIN and stamp.microbatches < 1:
            raise ProtocolError(f"round {stamp.key} was begun without a microbatch; only a tick may be empty")
        r = _Round(stamp)
        if self.first:
            r.activations.update(range(stamp.microbatches))  # stage 0 holds the token ids
        self._rounds.append(r)

    def _find(self, key: tuple[int, int, int, Mode, int]) -> _Round:
        for r in self._rounds:
            if r.stamp.key == key:
                return r
        raise ProtocolError(f"a frame of round {key} arrived; open are {[r.stamp.key for r in self._rounds]}")

    def _note(self, seen: set[int], microbatch: int, due: int, key: object, what: str) -> None:
        """Note a tensor that came; those below `due` may come, each once."""
        if microbatch in seen:
            raise ProtocolError(f"{what} {microbatch} of round {key} came twice")
        if not 0 <= microbatch < due:
            raise ProtocolError(f"{what} {microbatch} of round {key} came; only those below {due} are expected")
        seen.add(microbatch)

    def _vote_came(self, r: _Round) -> None:
        if r.stamp.mode is not Mode.TRAIN or len(r.gradients) < r.stamp.microbatches:
            missing = r.stamp.microbatches - len(r.gradients)
            raise ProtocolError(f"a vote on round {r.stamp.key} came before {missing} of its gradients")
        if r.downstream_voted:
            raise ProtocolError(f"the vote on round {r.stamp.key} came twice")
        r.downstream_voted = True

    def _decided(self, decide: Decide, key: tuple[int, int, int, Mode, int] | None) -> None:
        if decide.outcome not in (Outcome.HOLD, Outcome.COMMIT, Outcome.SKIP):
            raise ProtocolError(f"outcome {decide.outcome} came; a stage knows how to hold, commit and skip")
        if decide.outcome == Outcome.HOLD:
            self._rounds.append(_Round(Stamp(), tallied=True, voted=True, decide=decide))
            return
        for r in self._rounds:
            if r.voted and r.decide is None and (key is None or r.stamp.key == key):
                r.decide = decide
                return
        raise ProtocolError(f"{Outcome(decide.outcome).name} came, but no tick of stage {self.stage} has voted")

    def _lost(self) -> AskAgain:
        done = self._ended()
        r = self._rounds[0]
        if self.first or r.stamp.mode is not Mode.TRAIN or done.op not in (Op.FORWARD, Op.LOSS):
            raise ProtocolError(f"{done.op.value} {done.microbatch} of round {r.stamp.key} refers to what is not held")
        if done.microbatch in r.lost:
            raise ProtocolError(f"activation {done.microbatch} of round {r.stamp.key} was lost again; it came whole")
        r.lost.add(done.microbatch)
        r.activations.discard(done.microbatch)
        return AskAgain(r.stamp, done.microbatch)

    def _resend_asked(self, r: _Round, microbatch: int) -> None:
        due = r.forwarded if r.stamp.mode is Mode.TRAIN and not self.last else 0
        self._note(r.asked, microbatch, due, r.stamp.key, "a request for activation")
        if microbatch in r.gradients:
            raise ProtocolError(f"activation {microbatch} of round {r.stamp.key} was asked for after its gradient came")
        r.to_resend.append(microbatch)

    def _ended(self) -> Compute:
        done, self._running = self._running, None
        if done is None:
            raise ProtocolError("a computation ended that was never started")
        return done

    def _computed(self) -> list[Command]:
        done = self._ended()
        r = self._rounds[0]
        match done.op:
            case Op.FORWARD | Op.SCORE:
                r.forwarded += 1
                self._unsent += not self.last
            case Op.RESEND:
                self._unsent += 1
            case Op.LOSS:
                r.forwarded += 1
                r.backwarded += 1
            case Op.BACKWARD:
                r.backwarded += 1
            case Op.TALLY:
                r.tallied = True
        scored = not r.stamp.with_gradients and r.forwarded == r.stamp.microbatches
        if done.op in (Op.APPLY, Op.COMPARE) or scored:
            self._rounds.popleft()
            return [Finished(r.stamp)]
        return []

    def _next(self, r: _Round) -> Compute | None:
        s = r.stamp
        if r.to_resend:  # first: a stage has nothing else to do until it comes
            return Compute(Op.RESEND, s, r.to_resend.popleft())
        ready = r.forwarded < s.microbatches and r.forwarded in r.activations
        forward_ready = ready and self._unsent < self.credit
        if not s.with_gradients:
            return Compute(Op.SCORE, s, r.forwarded) if forward_ready else None
        if r.tallied:
            return Compute(Op.APPLY, s, decide=r.decide) if r.decide is not None else None
        if r.backwarded == s.microbatches:
            return Compute(Op.TALLY if s.mode is Mode.TRAIN else Op.COMPARE, s)
        if self.last:
            return Compute(Op.LOSS, s, r.forwarded) if forward_ready else None
        # 1F1B: a backward whenever one is there; at most stages - stage microbatches are between the two.
        if r.backwarded < r.forwarded and r.backwarded in r.gradients:
            return Compute(Op.BACKWARD, s, r.backwarded)
        if forward_ready and r.forwarded - r.backwarded < self.stages - self.stage:
            return Compute(Op.FORWARD, s, r.forwarded)
        return None
