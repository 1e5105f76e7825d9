"""What the anchor keeps on its volume of snapshots, slices and corrections. Files in, files out; no stream, no replay.

    replay/000012-00000221-LINEAGE/    the pair of snapshot 12, as taken in tick 221 of that history
        stage-01.safetensors           weights of stage 1, whole
        slice.pb, logprobs.pb          what the tick consumed, from the first and the last stage
        bases.safetensors              the basis version its batch was pinned to
    replay/incoming/stage-01.part      the packet that is arriving
    replay/base/stage-01.safetensors   the newest version that is whole: what the next delta is against
    replay/made/000012/                the correction of snapshot 12: stage-01.pb, and state.safetensors to go on from

Everything is written under another name and renamed, so that a file, and a correction, is whole or absent. Weights are
stored as they are and not as deltas: a replay reads one stage at a time, and a pair can go without the others noticing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from codec import weight_delta
from codec.basis import Basis
from codec.errors import CodecError
from codec.spec import Direction
from swarm_core.learning.replay_ring import Part
from swarm_core.wire.bases import Key
from swarm_core.wire.corrections import digest_of
from swarm_core.wire.messages import Correction, Slice, Snapshot, from_bytes, to_bytes

FOLDER = "replay"
SLICE, LOGPROBS, BASES = "slice.pb", "logprobs.pb", "bases.safetensors"
PART_OF: dict[str, Part] = {SLICE: "slice", LOGPROBS: "logprobs"}  # files of a pair; a stage's part is its number
MADE, STATE = "made", "state.safetensors"
Shape = tuple[int, ...]
Identity = tuple[int, int, int]  # version, the tick it was taken in, lineage of the history before that tick


class SnapshotRefused(Exception):
    """A snapshot that cannot be kept; the message says why. Training goes on, without a correction made of it."""


class ReplayStore:
    """The files of one run. `shapes` are those of each stage's tensors; `dtype` what snapshots travel in.

    One thread calls it, but for `decode`, which touches the incoming packet and the base of its stage alone.
    """

    def __init__(self, out: Path, shapes: Sequence[Sequence[Shape]], dtype: torch.dtype) -> None:
        self._root = out / FOLDER
        self._shapes, self._dtype = shapes, dtype
        self._arriving: dict[int, Snapshot] = {}  # without its bytes, by stage
        self._bases: dict[int, Identity] = {}  # what is in base/, by stage; read from the files once

    # Snapshots in ------------------------------------------------------------------------------------------------------

    def part(self, stage: int, message: Snapshot) -> int:
        """Take a part of a packet; returns how many of its bytes are here. Raises SnapshotRefused.

        Parts come in order. One that does not continue what is here is not taken: the sender is told how far it is.
        """
        most = weight_delta.largest_bytes(self._shapes[stage], self._dtype)
        if not 0 < message.total_bytes <= most:
            raise SnapshotRefused(f"a packet of {message.total_bytes} bytes; wanted at most {most}")
        if not message.part or message.offset + len(message.part) > message.total_bytes:
            raise SnapshotRefused(f"{len(message.part)} bytes at {message.offset} of {message.total_bytes}")
        file = self._incoming(stage)
        about = Snapshot(**{**vars(message), "offset": 0, "part": b""})
        if self._arriving.get(stage) != about:
            self._arriving[stage] = about
            file.unlink(missing_ok=True)
        held = file.stat().st_size if file.exists() else 0
        if message.offset == held:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as out:
                out.write(message.part)
            held += len(message.part)
        return held

    def decode(self, stage: int) -> Identity:
        """All parts are here: decode and check them; what comes out is the base of the next delta. Raises SnapshotRefused.

        Slow: on a thread, one call a stage at a time, and no `part` of that stage meanwhile.
        """
        about, file = self._arriving.pop(stage), self._incoming(stage)
        packet = file.read_bytes()
        file.unlink()
        if digest_of(packet) != about.digest:
            raise SnapshotRefused("the digest does not match: damaged on the way")
        base, path = None, self._base(stage)
        if about.base:
            held = _identity(path)[0]
            if held != about.base:
                raise SnapshotRefused(f"a delta against version {about.base}; here is {held or 'none'}")
            base = _tensors(path)
        try:
            weights = weight_delta.decode(packet, base, self._shapes[stage], self._dtype)
        except CodecError as error:
            raise SnapshotRefused(str(error)) from None
        if not all(bool(torch.isfinite(t).all()) for t in weights):
            raise SnapshotRefused("weights that are not finite")
        tensors = {f"{i:06d}": t for i, t in enumerate(weights)}
        identity = (about.version, about.tick, about.lineage)
        words = {"identity": " ".join(map(str, identity))}
        _renamed(path, lambda to: save_file(tensors, to, metadata=words))
        return identity

    def place(self, stage: int, identity: Identity) -> int:
        """What `decode` has left becomes a part of its pair, without a copy. Returns its bytes."""
        path = self._pair(identity) / self._base(stage).name
        _renamed(path, lambda to: os.link(self._base(stage), to))
        self._bases[stage] = identity
        return path.stat().st_size

    def base(self, stage: int) -> Identity:
        """The newest weights of a stage that are here whole: (version, tick, lineage); version 0: none."""
        if stage not in self._bases:
            self._bases[stage] = _identity(self._base(stage))
        return self._bases[stage]

    # Slices and bases --------------------------------------------------------------------------------------------------

    def keep_slice(self, message: Slice, bases: Mapping[Key, Basis] | None) -> dict[Part, int]:
        """Keep what a tick consumed, and with stage 0's part the bases that its batch was pinned to; returns the parts
        that it makes, with sizes. A stage alone sends both parts in one."""
        pair = self._pair((message.version, message.tick, message.lineage))
        data, sizes = to_bytes(message), dict[Part, int]()
        for name in ([SLICE] if message.prompt_ids else []) + ([LOGPROBS] if message.scored else []):
            if name == SLICE and bases is not None:
                _renamed(pair / BASES, lambda to: _save_bases(to, bases))
            _renamed(pair / name, lambda to: to.write_bytes(data))
            sizes[PART_OF[name]] = _size(pair / name)
        return sizes

    def slice(self, version: int) -> tuple[Slice, Slice]:
        """What stage 0 and what the last stage sent of a pair's slice."""
        pair = self._folder(version)
        first, last = (from_bytes(Slice, (pair / name).read_bytes()) for name in (SLICE, LOGPROBS))
        return first, last

    def bases(self, version: int) -> dict[Key, Basis] | None:
        """The bases of a pair; None where it has none."""
        path = self._folder(version) / BASES
        if not path.exists():
            return None
        bases: dict[Key, Basis] = {}
        with safe_open(path, framework="pt") as file:
            for name, text in (file.metadata() or {}).items():
                boundary, direction = name.split(".")
                number, step = text.split()
                encoder, decoder = file.get_tensor(f"{name}.encoder"), file.get_tensor(f"{name}.decoder")
                bases[(int(boundary), Direction(int(direction)))] = Basis(int(number), encoder, decoder, float(step))
        return bases

    # Pairs -------------------------------------------------------------------------------------------------------------

    def weights(self, version: int, stage: int) -> list[Tensor]:
        """One stage's weights of a pair, in parameter order, as they travelled."""
        return _tensors(self._folder(version) / self._base(stage).name)

    def pairs(self) -> dict[Identity, dict[Part, int]]:
        """What is here, by (version, tick, lineage): the parts, with sizes in bytes. What is torn is deleted, and so are
        folders without a part."""
        found: dict[Identity, dict[Part, int]] = {}
        for folder in sorted(self._root.glob("[0-9]*-*-*")):
            for torn in folder.glob("*.tmp"):
                torn.unlink()
            sizes: dict[Part, int] = {_part(file): _size(file) for file in folder.iterdir() if file.name != BASES}
            if not sizes:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            version, tick, lineage = folder.name.split("-")
            found[(int(version), int(tick), int(lineage, 16))] = sizes
        return found

    def drop(self, version: int) -> None:
        """Whatever is here of this version's pair, of whatever history."""
        for folder in self._root.glob(f"{version:06d}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def others(self, identity: Identity) -> bool:
        """Whether something is here of this version's pair as another tick or history had it."""
        return any(folder != self._pair(identity) for folder in self._root.glob(f"{identity[0]:06d}-*"))

    # Corrections -------------------------------------------------------------------------------------------------------

    def keep_made(self, version: int, corrections: Mapping[int, Correction], state: Mapping[str, Tensor]) -> None:
        """The correction of every stage, and what the next one goes on from: all of it at once, or nothing."""
        folder = self._root / MADE / f"{version:06d}"
        temporary = folder.with_name(folder.name + ".tmp")
        for old in (temporary, folder):
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)
        for stage, correction in corrections.items():
            (temporary / f"stage-{stage:02d}.pb").write_bytes(to_bytes(correction))
        if state:
            save_file({name: t.contiguous() for name, t in state.items()}, temporary / STATE)
        temporary.rename(folder)

    def made(self) -> dict[int, dict[int, Correction]]:
        """The corrections that are kept: by version, then stage."""
        found: dict[int, dict[int, Correction]] = {}
        for folder in sorted((self._root / MADE).glob("[0-9]*")):
            if folder.suffix == ".tmp":
                shutil.rmtree(folder, ignore_errors=True)
                continue
            files = {int(f.stem.split("-")[1]): f for f in folder.glob("stage-*.pb")}
            found[int(folder.name)] = {stage: from_bytes(Correction, f.read_bytes()) for stage, f in files.items()}
        return found

    def state(self) -> dict[str, Tensor]:
        """What the newest correction has left for the next one."""
        files = sorted((self._root / MADE).glob(f"[0-9]*/{STATE}"))
        if not files:
            return {}
        with safe_open(files[-1], framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    def drop_made(self, version: int) -> None:
        shutil.rmtree(self._root / MADE / f"{version:06d}", ignore_errors=True)

    def drop_base(self, stage: int) -> None:
        """The weights that a stage's next delta would be against go: it will send all of them."""
        self._base(stage).unlink(missing_ok=True)
        self._bases.pop(stage, None)
        self._arriving.pop(stage, None)

    # Paths -------------------------------------------------------------------------------------------------------------

    def _pair(self, identity: Identity) -> Path:
        version, tick, lineage = identity
        return self._root / f"{version:06d}-{tick:08d}-{lineage:016x}"

    def _folder(self, version: int) -> Path:
        """The one folder of a version: whoever adds to a pair drops those of other histories first."""
        return next(self._root.glob(f"{version:06d}-*"))

    def _base(self, stage: int) -> Path:
        return self._root / "base" / f"stage-{stage:02d}.safetensors"

    def _incoming(self, stage: int) -> Path:
        return self._root / "incoming" / f"stage-{stage:02d}.part"


def _part(file: Path) -> Part:
    return PART_OF[file.name] if file.name in PART_OF else int(file.stem.split("-")[1])


def _size(file: Path) -> int:
    """Of a part's file; the bases count with the slice that they came with."""
    bases = file.with_name(BASES)
    return file.stat().st_size + (bases.stat().st_size if file.name == SLICE and bases.exists() else 0)


def _identity(path: Path) -> Identity:
    if not path.exists():
        return 0, 0, 0
    with safe_open(path, framework="pt") as file:
        version, tick, lineage = map(int, (file.metadata() or {})["identity"].split())
    return version, tick, lineage


def _tensors(path: Path) -> list[Tensor]:
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(name) for name in sorted(file.keys())]


def _save_bases(to: Path, bases: Mapping[Key, Basis]) -> None:
    tensors, words = {}, {}
    for (boundary, direction), basis in bases.items():
        name = f"{boundary}.{int(direction)}"
        tensors |= {f"{name}.encoder": basis.encoder_HR, f"{name}.decoder": basis.decoder_RH}
        words[name] = f"{basis.version} {basis.step!r}"
    save_file({name: t.contiguous() for name, t in tensors.items()}, to, metadata=words)


def _renamed(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    write(temporary)
    temporary.rename(path)
