"""Who is in the swarm, when it may start, and when a checkpoint is complete. Sans-I/O: plain calls, no stream, no file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from swarm_core.run_folder import checkpoint_name
from swarm_core.wire.errors import BadAddress, BadFrame, ManifestMismatch, StageOutOfRange, StageTaken
from swarm_core.wire.messages import PROTOCOL, Hello, Ready, Saved
from swarm_core.wire.streams import split_address

MOST_INCOMPLETE = 64  # checkpoints that wait for a stage; one that is away brings the few newest when it comes back
LONGEST_ADDRESS = 300  # a host name has at most 253 letters
_FILE = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)


@dataclass
class Member:
    """One stage worker."""

    stage: int
    address: str
    versions: dict[str, str] = field(default_factory=dict)
    ready: Ready | None = None
    number: int = 0  # that it drew for itself
    at_work: bool = False
    away: bool = False  # its stream broke: it may come back, or another process take its place
    fit: bool = False  # at work in the epoch that this anchor knows of


class Roster:
    """Membership of one epoch. A stage has one worker here; replicas come as a list per stage."""

    def __init__(self, stages: int, digest: str, fingerprint: str, known: set[int] | None = None) -> None:
        """`known`: the members that an anchor before this one has left at work, if it has."""
        self.known = known
        self.stages = stages
        self.digest = digest
        self.fingerprint = fingerprint
        self.epoch = 1
        self.members: dict[int, Member] = {}
        self.started = False
        self._saved: dict[str, dict[int, Saved]] = {}

    def greet(self, hello: Hello, role: str) -> None:
        """Check what is common to every role. Raises BadFrame, ManifestMismatch."""
        if hello.role != role:
            raise BadFrame(f"a {hello.role or 'nameless'} came where a {role} attends")
        if hello.protocol != PROTOCOL:
            raise ManifestMismatch(
                f"the worker speaks protocol {hello.protocol}, this anchor {PROTOCOL}: install the same version on both"
            )
        if hello.manifest_digest and hello.manifest_digest != self.digest:
            raise ManifestMismatch(
                f"the manifest's digest is {self.digest[:12]}..., the worker wants {hello.manifest_digest[:12]}...: "
                "it belongs to another run; give it this run's --out folder, or leave --expect-digest out"
            )

    def join(self, hello: Hello) -> Member:
        """A stage worker wants its place. Raises StageOutOfRange, StageTaken, ManifestMismatch."""
        self.greet(hello, "stage")
        if hello.stage >= self.stages:
            raise StageOutOfRange(
                f"stage {hello.stage} does not exist: this run has stages 0 to {self.stages - 1} (run.toml: swarm.stages)"
            )
        _check_address(hello.address)
        held = self.members.get(hello.stage)
        if held is not None and hello.at_work and 0 < hello.member == held.number:
            held.away = False  # the same process on a new stream
            held.fit = not hello.stalled and hello.epoch == self.epoch
            return held
        # The same process, on a new stream before it was ready, is not in its own way.
        if held is not None and not held.away and not 0 < hello.member == held.number:
            holder = self.members[hello.stage].address
            free = [i for i in range(self.stages) if i not in self.members]
            raise StageTaken(
                f"stage {hello.stage} is already held by {holder}; "
                + (f"free: {', '.join(map(str, free))}" if free else "every stage is held")
            )
        if hello.at_work and not self.started and (self.known is None or hello.member not in self.known):
            raise StageTaken(
                f"stage {hello.stage} is at work at tick {hello.tick}, but this anchor does not know it: only an anchor with "
                "--resume and the --out of that run takes up what is at work"
            )
        if hello.at_work and self.started:
            raise StageTaken(
                f"stage {hello.stage} was given up, and another process took its place: start this one anew"
            )
        member = Member(hello.stage, hello.address, hello.versions, number=hello.member, at_work=hello.at_work)
        member.fit = hello.at_work and not hello.stalled and hello.epoch == self.epoch
        if hello.at_work:
            member.ready = Ready(model_fingerprint=self.fingerprint)
        self.members[hello.stage] = member
        return member

    def taken_over(self) -> bool:
        """Whether every stage is there for an anchor that did not start the run, some of them at work; true once."""
        members = self.members.values()
        complete = not self.started and not self.missing() and any(m.at_work for m in members)
        self.started = self.started or complete
        return complete

    @property
    def unbroken(self) -> bool:
        """Whether everybody is at work in the epoch that this anchor knows of, so that it need not end."""
        return all(member.fit for member in self.members.values())

    @property
    def at_work(self) -> bool:
        """Whether somebody here is at work."""
        return self.started or any(member.at_work for member in self.members.values())

    def is_ready(self, member: Member, ready: Ready) -> bool:
        """The worker has loaded its layers. True when the swarm is complete. Raises ManifestMismatch."""
        if member.ready is not None:
            raise BadFrame(f"stage {member.stage} is ready already")
        if ready.model_fingerprint != self.fingerprint:
            raise ManifestMismatch(
                f"stage {member.stage} has loaded another checkpoint: fingerprint {ready.model_fingerprint[:12]}..., "
                f"the anchor's is {self.fingerprint[:12]}...: point --model at the same files"
            )
        member.ready = ready
        return not self.missing()

    def start(self) -> None:
        """Everybody here is at work from now on."""
        self.started = True
        for member in self.members.values():
            member.at_work = member.fit = True

    def leave(self, member: Member) -> None:
        if self.members.get(member.stage) is member:
            del self.members[member.stage]

    def addresses(self) -> list[str]:
        return [self.members[i].address for i in range(self.stages)]

    def missing(self) -> list[int]:
        """Stages that nobody holds, or that are still loading."""
        return [i for i in range(self.stages) if i not in self.members or self.members[i].ready is None]

    def saved(self, stage: int, saved: Saved) -> dict[int, Saved] | None:
        """Note a stage's shard; all shards of the checkpoint once every stage has written its own."""
        if saved.checkpoint != checkpoint_name(saved.tick) or not _FILE.fullmatch(saved.file):
            raise BadFrame(f"stage {stage} names a checkpoint {saved.checkpoint[:99]!r}/{saved.file[:99]!r}")
        shards = self._saved.setdefault(saved.checkpoint, {})
        while len(self._saved) > MOST_INCOMPLETE:
            del self._saved[min(self._saved)]
        shards[stage] = saved
        if len(shards) < self.stages:
            return None
        del self._saved[saved.checkpoint]
        return shards

    def forget_saved(self, tick: int) -> None:
        """Shards of later ticks are of a future that the run has left."""
        self._saved = {name: shards for name, shards in self._saved.items() if name <= checkpoint_name(tick)}


def _check_address(address: str) -> None:
    """What others will dial, and people read in logs. Raises BadFrame."""
    try:
        split_address(address)
        if len(address) <= LONGEST_ADDRESS and address.isprintable() and " " not in address:
            return
    except BadAddress:
        pass
    raise BadFrame(f"a worker says that it is at {address[:99]!r}, which is no address")
