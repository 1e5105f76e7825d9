"""What the anchor keeps on its volume so that another one can carry on: where the books stand, who is at work, the bases.

    OUT/anchor/state.json   one file, replaced whole after every booking, before the booking is acknowledged
    OUT/anchor/bases.pb     the newest version as it is broadcast, written before it is

No decision is made here, and no file of the books is opened.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from swarm_core.durable import replace
from swarm_core.wire.messages import BasisSet, from_bytes, to_bytes

FOLDER, STATE, BASES = "anchor", "state.json", "bases.pb"
log = logging.getLogger(__name__)


@dataclass
class Memory:
    """The state of one start of a run. Members are named by the number that each draws for itself (`Hello.member`)."""

    digest: str = ""
    at_work: bool = False  # started, and nobody has been told to leave yet
    closing: str = ""  # why it ends, once that is settled
    epoch: int = 1
    start_id: int = 0  # drawn when the run began from a checkpoint or from the model
    tick: int = 0
    began: float = 0.0  # wall clock at which the run's seconds began
    roles: dict[str, str] = field(default_factory=dict)  # member -> "stage 0", "sampler"
    booked: dict[str, int] = field(default_factory=dict)  # member -> number of its newest report in the books
    finished: dict[str, str] = field(default_factory=dict)  # words of the event, once stage 0 has reported the end
    evaluated: int = -1  # the weights that a sampler has last answered an evaluation for
    metrics_bytes: int | None = None  # length of metrics.jsonl with everything that is booked; None: not known
    ledger_bytes: int | None = None
    totals: dict[str, list[int]] = field(default_factory=dict)  # kind -> dense, packet, message
    link_bytes: dict[str, list[int]] = field(default_factory=dict)  # tick -> dense, packet

    def enter(self, member: int, role: str) -> None:
        """A member is started: from now on it is known, and its reports are numbered from 1."""
        self.roles[str(member)] = role
        self.booked.setdefault(str(member), 0)

    def leave(self, member: int) -> None:
        """Nobody waits for it any more. What it has reported stays known: it may come back after all."""
        self.roles.pop(str(member), None)

    def samplers(self) -> list[int]:
        return [int(member) for member, role in self.roles.items() if role == "sampler"]

    def begin(self, digest: str, epoch: int, start_id: int, tick: int, began: float) -> None:
        """A start with members that all come anew: whoever was at work before is not known any more."""
        self.roles, self.booked, self.finished = {}, {}, {}
        self.digest, self.epoch, self.start_id, self.tick, self.began = digest, epoch, start_id, tick, began
        self.at_work, self.closing, self.evaluated = True, "", -1

    def save(self, out: Path, *, sync: bool = False) -> None:
        """Replace the file in one step: kill -9 leaves the old or the new one. Without `sync` a power cut may lose rows."""
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        replace(out / FOLDER / STATE, json.dumps(asdict(self)).encode(), synced=sync)


def recall(out: Path, digest: str) -> Memory | None:
    """The state of a run that an anchor left at work in this folder; None when there is none under this manifest."""
    path = out / FOLDER / STATE
    try:
        found = json.loads(path.read_text())
        memory = Memory(**{item.name: found[item.name] for item in fields(Memory)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is passed over: it cannot be read (%s)", path, error)
        return None
    return memory if memory.at_work and memory.digest == digest else None


def keep_bases(out: Path, bases: BasisSet) -> None:
    """Write a version before it is broadcast: no other one may ever bear its number."""
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    replace(out / FOLDER / BASES, to_bytes(bases))


def kept_bases(out: Path) -> BasisSet:
    """The version that was broadcast last. Raises BadFrame, OSError."""
    return from_bytes(BasisSet, (out / FOLDER / BASES).read_bytes())
