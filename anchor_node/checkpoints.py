"""Checkpoint folders as the anchor keeps them: index over the stages' shards, marker last, old ones pruned."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from swarm_core.durable import replace
from swarm_core.errors import UserError
from swarm_core.manifest import OUTSIDE_DIGEST, Manifest
from swarm_core.run_folder import CHECKPOINT_INDEX as INDEX
from swarm_core.run_folder import CHECKPOINTS, MANIFEST_FILE
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BasisSet, Saved, from_bytes, to_bytes

BASES = "bases.pb"  # as it was broadcast: rounded again, it would be another basis
log = logging.getLogger(__name__)
MARKER = "COMPLETE"
ASIDE = "SET_ASIDE"  # what the marker becomes when a run goes back to an earlier checkpoint


class CheckpointError(UserError):
    """No usable checkpoint; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    tick: int
    manifest_digest: str
    shards: dict[int, Saved]

    @property
    def name(self) -> str:
        return self.folder.name


def complete(
    out: Path,
    name: str,
    manifest_digest: str,
    shards: dict[int, Saved],
    keep: int,
    bases: BasisSet | None,
) -> Checkpoint:
    """Write the anchor's own part (`bases`: the newest version), the index, then the marker; then prune.

    All but the newest `keep` complete checkpoints go.
    """
    folder = out / CHECKPOINTS / name
    folder.mkdir(parents=True, exist_ok=True)
    if bases is not None:
        replace(folder / BASES, to_bytes(bases))
    tick = shards[0].tick
    index = {
        "tick": tick,
        "manifest_digest": manifest_digest,
        "stages": len(shards),
        "shards": {str(stage): asdict(saved) for stage, saved in sorted(shards.items())},
    }
    replace(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    replace(folder / MARKER, f"{tick}\n".encode())
    for old in found(out)[:-keep] if keep else []:
        # The marker goes first: a half-deleted checkpoint must not look complete.
        (old.folder / MARKER).unlink()
        shutil.rmtree(old.folder)
    return Checkpoint(folder, tick, manifest_digest, shards)


def found(out: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run folder, oldest first. Torn ones are passed over."""
    checkpoints = []
    for marker in (out / CHECKPOINTS).glob(f"*/{MARKER}"):
        try:
            index = json.loads((marker.parent / INDEX).read_text())
            shards = {int(stage): Saved(**saved) for stage, saved in index["shards"].items()}
            checkpoints.append(Checkpoint(marker.parent, int(index["tick"]), index["manifest_digest"], shards))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is passed over: its index cannot be read (%s)", marker.parent, error)
    return sorted(checkpoints, key=lambda c: c.tick)


def latest(out: Path) -> Checkpoint:
    """The newest complete checkpoint; raises CheckpointError when there is none."""
    checkpoints = found(out)
    if not checkpoints:
        raise CheckpointError(f"no complete checkpoint below {out / CHECKPOINTS}: nothing to continue or export")
    return checkpoints[-1]


def resumable(out: Path, manifest: Manifest, name: str = "") -> Checkpoint:
    """The checkpoint to continue from: the newest, or the one of that name (a path to it will do).

    Raises CheckpointError when there is none, or when it was written under knobs that train other weights.
    """
    chosen = latest(out)
    if name:
        named = {checkpoint.name: checkpoint for checkpoint in found(out)}
        if Path(name).name not in named:
            raise CheckpointError(
                f"{out / CHECKPOINTS / Path(name).name} is no complete checkpoint; there are: {', '.join(named)}"
            )
        chosen = named[Path(name).name]
    digest = manifest.digest()
    if chosen.manifest_digest != digest:
        changed = changed_knobs(out, chosen, manifest)
        raise CheckpointError(
            f"{chosen.folder} was written under other knobs ("
            + (", ".join(changed) or f"manifest {chosen.manifest_digest[:12]}..., now {digest[:12]}...")
            + "): resume with the run file of that run, run.toml in its folder; only run.name, run.ticks, threads, device, "
            "the probes of the links, where files lie, and the sampler and checkpoint sections may differ"
        )
    return chosen


def candidates(out: Path, manifest: Manifest, name: str = "") -> list[Checkpoint]:
    """The checkpoints that a run may go on from, newest first; the named one alone, where one is. Raises as `resumable`."""
    chosen = resumable(out, manifest, name)
    older = [c for c in found(out) if c.tick < chosen.tick and c.manifest_digest == chosen.manifest_digest]
    return [chosen, *([] if name else reversed(older))]


def changed_knobs(out: Path, checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """`section.knob old -> new` for whatever makes the two digests differ; [] when the old manifest is not at hand."""
    try:
        old = json.loads((out / MANIFEST_FILE).read_text())
        if old["digest"] != checkpoint.manifest_digest:
            return []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    new = json.loads(manifest.to_json())
    scheduled = manifest.config.optimizer.schedule != "constant"
    changed = []
    for section, knobs in new["config"].items():
        outside = OUTSIDE_DIGEST.get(section, ()) or (knobs if section in OUTSIDE_DIGEST else ())
        for knob, value in knobs.items():
            before = old["config"].get(section, {}).get(knob)
            if before != value and (knob not in outside or (section, knob) == ("run", "ticks") and scheduled):
                changed.append(f"{section}.{knob} {json.dumps(before)} -> {json.dumps(value)}")
    if old.get("model_fingerprint") != manifest.model_fingerprint:
        changed.append("the files at model.path")
    return changed


def set_later_aside(out: Path, tick: int) -> None:
    """Checkpoints after the tick that a run goes back to are of a future that it leaves: their markers are renamed.

    They would be taken for the newest otherwise, and be overwritten shard by shard while they look complete.
    """
    for checkpoint in found(out):
        if checkpoint.tick > tick:
            (checkpoint.folder / MARKER).rename(checkpoint.folder / ASIDE)
            log.warning("%s is set aside: the run goes on from tick %d", checkpoint.folder, tick)


def load_bases(checkpoint: Checkpoint) -> BasisSet:
    """The bases as the anchor held them at a checkpoint. Raises CheckpointError."""
    path = checkpoint.folder / BASES
    try:
        return from_bytes(BasisSet, path.read_bytes())
    except (OSError, BadFrame) as error:
        raise CheckpointError(f"{path}: the bases cannot be read ({error}); they are needed to resume") from None
