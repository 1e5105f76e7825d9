"""Who is in the swarm, when it may start, and when a checkpoint is complete. Sans-I/O: plain calls, no stream, no file."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarm_core.wire.errors import BadFrame, ManifestMismatch, StageOutOfRange, StageTaken
from swarm_core.wire.messages import PROTOCOL, Hello, Ready, Saved


@dataclass
class Member:
    """One stage worker."""

    stage: int
    address: str
    versions: dict[str, str] = field(default_factory=dict)
    ready: Ready | None = None


class Roster:
    """Membership of one epoch. A stage has one worker here; replicas come as a list per stage."""

    def __init__(self, stages: int, digest: str, fingerprint: str) -> None:
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
        if hello.stage in self.members:
            holder = self.members[hello.stage].address
            free = [i for i in range(self.stages) if i not in self.members]
            raise StageTaken(
                f"stage {hello.stage} is already held by {holder}; "
                + (f"free: {', '.join(map(str, free))}" if free else "every stage is held")
            )
        member = Member(hello.stage, hello.address, hello.versions)
        self.members[hello.stage] = member
        return member

    def is_ready(self, member: Member, ready: Ready) -> bool:
        """The worker has loaded its layers. True when the swarm is complete with it. Raises ManifestMismatch."""
        if ready.model_fingerprint != self.fingerprint:
            raise ManifestMismatch(
                f"stage {member.stage} has loaded another checkpoint: fingerprint {ready.model_fingerprint[:12]}..., "
                f"the anchor's is {self.fingerprint[:12]}...: point --model at the same files"
            )
        member.ready = ready
        complete = len(self.members) == self.stages and all(m.ready for m in self.members.values())
        self.started = self.started or complete
        return complete

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
        if not saved.checkpoint or "/" in saved.checkpoint or "/" in saved.file or saved.checkpoint.startswith("."):
            raise BadFrame(f"stage {stage} names a checkpoint {saved.checkpoint!r}/{saved.file!r}")
        shards = self._saved.setdefault(saved.checkpoint, {})
        shards[stage] = saved
        if len(shards) < self.stages:
            return None
        del self._saved[saved.checkpoint]
        return shards
