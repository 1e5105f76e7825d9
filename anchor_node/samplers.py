"""The samplers of a run at the anchor: who is there, who may come back, who is told to start. Nothing of a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarm_core.wire.errors import BadFrame, StageTaken
from swarm_core.wire.messages import FrameKind, Hello, Report, Stop, from_bytes
from swarm_core.wire.outbox import Outbox
from swarm_core.wire.streams import FrameStream

if TYPE_CHECKING:
    from anchor_node.service import AnchorService

EVALUATION = "evaluation"  # what a sampler owes when the run has finished


class Samplers:
    """Those of one run, by the number that each drew for itself. A run needs one, and goes on while it has rollouts."""

    def __init__(self, anchor: AnchorService) -> None:
        self._anchor = anchor
        self.boxes: dict[int, Outbox] = {}
        self._unstarted: set[int] = set()

    @property
    def expected(self) -> bool:
        """Whether there is one, or one that may come back."""
        return bool(self.boxes) or any(number in self._anchor.absent for number in self._anchor.memory.samplers())

    async def attend(self, stream: FrameStream, hello: Hello) -> None:
        """One stream of a sampler, to its end. Raises BadFrame, ManifestMismatch, StageTaken."""
        anchor, number = self._anchor, hello.member
        anchor.roster.greet(hello, "sampler")
        if hello.at_work and str(number) not in anchor.memory.booked:
            raise StageTaken("this sampler is at work, but for another start of the run: start it again")
        stream.name("anchor-sampler", "down")
        stream.peer = "the sampler"
        async with anchor.outbox(stream) as box:
            anchor.post(box, FrameKind.WELCOME, anchor.welcome(hello))
            self.boxes[number] = box  # from now on it is told when the run ends, also while it loads
            if hello.at_work:
                anchor.memory.enter(number, "sampler")
                anchor.back(hello, box)
            else:
                self._unstarted.add(number)
                if anchor.roster.started:
                    self.start()
            try:
                while (frame := await stream.receive()) is not None:
                    match frame.header.kind:
                        case FrameKind.READY:
                            anchor.event("ready", "a sampler")
                        case FrameKind.REPORT:
                            self._take(number, box, anchor.read_report(frame))
                        case FrameKind.STOP:
                            anchor.drain(from_bytes(Stop, frame.payload).reason)
                        case kind:
                            raise BadFrame(f"a sampler sent {kind.name}")
            finally:
                if self.boxes.get(number) is box:  # and no newer stream of the same sampler
                    del self.boxes[number]
                    self._unstarted.discard(number)
                    self._left(number)

    def _take(self, number: int, box: Outbox, report: Report) -> None:
        self._anchor.book(number, box, report)
        if report.words.get("event") in ("failed", "lost"):
            self._anchor.memory.leave(number)  # it does not come back

    def start(self) -> None:
        """The run is at work: whoever has waited for that begins."""
        anchor = self._anchor
        for number in sorted(self._unstarted):
            anchor.memory.enter(number, "sampler")
            anchor.slow.post_bases(self.boxes[number])
            anchor.post(self.boxes[number], FrameKind.START, anchor.epochs.start_message())
        self._unstarted.clear()

    def start_again(self) -> None:
        """Another epoch begins: those at work link up with its stages."""
        for number, box in self.boxes.items():
            if number not in self._unstarted:
                self._anchor.post(box, FrameKind.START, self._anchor.epochs.start_message())

    def carry_on(self) -> None:
        """This anchor has taken over the run: those who were at work are expected back."""
        for number in self._anchor.memory.samplers():
            if number not in self.boxes:
                self._expect(number)
        self.start()

    def _expect(self, number: int) -> None:
        self._anchor.absent.add(number, lambda: self._without(number), patient=False)

    def _left(self, number: int) -> None:
        """Its stream has ended: if it only broke, it comes back, and its evaluation with it."""
        anchor = self._anchor
        if anchor.over.done():
            return
        if anchor.owed is None:
            anchor.event("sampler", "a sampler went away; ticks go on while there are rollouts")
        if str(number) in anchor.memory.roles:
            self._expect(number)
        else:
            self._without(number)

    def _without(self, number: int) -> None:
        """It does not come back."""
        self._anchor.memory.leave(number)
        self.ask()
        if not self.expected:
            self._anchor.settle(EVALUATION)  # nobody is left to make it

    def ask(self) -> None:
        """Say how to go on while the swarm has no sampler; called again and again, as nothing else will happen."""
        anchor = self._anchor
        if anchor.roster.started and not self.expected and anchor.owed is None and not anchor.over.done():
            anchor.event("waiting", f"for a sampler; start: swarm_worker sample --anchor {anchor.address}")
