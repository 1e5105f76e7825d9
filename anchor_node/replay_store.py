"""What the anchor keeps on its volume of snapshots, slices and corrections. Files in, files out; no stream, no replay.

    replay/000012/stage-01.safetensors   weights of stage 1 as tick s(12) began, whole
    replay/000012/slice.pb, logprobs.pb  what that tick consumed, from the first and the last stage
    replay/000012/bases.safetensors      the basis version its batch was pinned to
    replay/incoming/stage-01.part        the packet that is arriving
    replay/base/stage-01.safetensors     the newest version that is whole: what the next delta is against
    replay/made/stage-01.pb              the newest correction, for a member that comes back

Everything is written under another name and renamed, so that a file is whole or absent. Weights are stored as they are and
not as deltas: a replay reads one stage at a time, and a pair can go without the others noticing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from codec import weight_delta
from codec.basis import Basis
from codec.errors import CodecError
from codec.spec import Direction
from swarm_core.wire.bases import Key
from swarm_core.wire.corrections import digest_of
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Correction, Slice, Snapshot, from_bytes, to_bytes

FOLDER = "replay"
SLICE, LOGPROBS = "slice.pb", "logprobs.pb"
Shape = tuple[int, ...]


class SnapshotRefused(Exception):
    """A snapshot that cannot be kept; the message says why. Training goes on, without a correction made of it."""


class ReplayStore:
    """The files of one run. `shapes` are those of each stage's tensors; `dtype` what snapshots travel in."""

    def __init__(self, out: Path, shapes: Sequence[Sequence[Shape]], dtype: torch.dtype) -> None:
        self._root = out / FOLDER
        self._shapes, self._dtype = shapes, dtype
        self._arriving: dict[int, Snapshot] = {}  # without its bytes, by stage
        self._whole: dict[int, int] = {}  # the newest version that is here whole, by stage; read from the files once

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

    def finish(self, stage: int) -> int:
        """All parts are here: decode, check and keep them. Returns the bytes of the weights. Raises SnapshotRefused.

        Slow; one call a stage at a time, on a thread.
        """
        about, file = self._arriving.pop(stage), self._incoming(stage)
        packet = file.read_bytes()
        file.unlink()
        if digest_of(packet) != about.digest:
            raise SnapshotRefused("the digest does not match: damaged on the way")
        base = None
        if about.base:
            held, base = self._base(stage)
            if held != about.base:
                raise SnapshotRefused(f"a delta against version {about.base}; here is {held or 'none'}")
        try:
            weights = weight_delta.decode(packet, base, self._shapes[stage], self._dtype)
        except CodecError as error:
            raise SnapshotRefused(str(error)) from None
        if not all(bool(torch.isfinite(t).all()) for t in weights):
            raise SnapshotRefused("weights that are not finite")
        tensors = {f"{i:06d}": t for i, t in enumerate(weights)}
        path = self._weights(about.version, stage)
        _renamed(path, lambda to: save_file(tensors, to, metadata={"version": str(about.version)}))
        newest = self._root / "base" / path.name
        _renamed(newest, lambda to: os.link(path, to))
        self._whole[stage] = about.version
        return path.stat().st_size

    def base_version(self, stage: int) -> int:
        """The newest version of a stage's weights that is here whole; 0: none."""
        if stage not in self._whole:
            self._whole[stage] = self._base(stage, read=False)[0]
        return self._whole[stage]

    def _base(self, stage: int, *, read: bool = True) -> tuple[int, list[Tensor] | None]:
        path = self._root / "base" / f"stage-{stage:02d}.safetensors"
        if not path.exists():
            return 0, None
        with safe_open(path, framework="pt") as file:
            version = int((file.metadata() or {}).get("version", 0))
            return version, [file.get_tensor(name) for name in sorted(file.keys())] if read else None

    # Slices and bases --------------------------------------------------------------------------------------------------

    def keep_slice(self, message: Slice) -> dict[str, int]:
        """Keep what a tick consumed; returns the files it makes, with sizes. A stage alone sends both parts in one."""
        parts = ([SLICE] if message.prompt_ids else []) + ([LOGPROBS] if message.scored else [])
        data = to_bytes(message)
        for name in parts:
            _renamed(self._pair(message.version) / name, lambda to: to.write_bytes(data))
        return dict.fromkeys(parts, len(data))

    def slice(self, version: int) -> tuple[Slice, Slice]:
        """What stage 0 and what the last stage sent of a pair's slice."""
        first, last = (from_bytes(Slice, (self._pair(version) / name).read_bytes()) for name in (SLICE, LOGPROBS))
        return first, last

    def keep_bases(self, version: int, bases: dict[Key, Basis]) -> None:
        """Keep the bases of a pair: its batch was pinned to a version that will be gone when it is replayed."""
        tensors, steps = {}, {}
        for (boundary, direction), basis in bases.items():
            name = f"{boundary}.{int(direction)}"
            tensors |= {f"{name}.encoder": basis.encoder_HR, f"{name}.decoder": basis.decoder_RH}
            steps[name] = f"{basis.version} {basis.step!r}"
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        _renamed(self._pair(version) / "bases.safetensors", lambda to: save_file(tensors, to, metadata=steps))

    def bases(self, version: int) -> dict[Key, Basis] | None:
        """The bases of a pair; None where it has none."""
        path = self._pair(version) / "bases.safetensors"
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
        with safe_open(self._weights(version, stage), framework="pt") as file:
            return [file.get_tensor(name) for name in sorted(file.keys())]

    def pairs(self) -> dict[int, dict[str, int]]:
        """What is here, by version: the size in bytes of each part, a stage's number or the file's name."""
        found: dict[int, dict[str, int]] = {}
        for folder in sorted(self._root.glob("[0-9]*")):
            sizes = {f.name: f.stat().st_size for f in folder.iterdir() if not f.name.endswith(".tmp")}
            found[int(folder.name)] = sizes
        return found

    def drop(self, version: int) -> None:
        shutil.rmtree(self._pair(version), ignore_errors=True)

    def forget(self, later: Callable[[int], bool]) -> None:
        """What is `later` than where the run starts again goes: weights that deltas are against, corrections, and what
        they left behind. The same numbers will come again, for other weights."""
        for path in (self._root / "base").glob("stage-*.safetensors"):
            stage = int(path.stem.split("-")[1])
            if later(self._base(stage, read=False)[0]):
                path.unlink()
                self._whole.pop(stage, None)
        self._arriving = {}
        for path in (self._root / "made").glob("stage-*.pb"):
            made = self.made(int(path.stem.split("-")[1]))
            if made is None or later(made.version):
                path.unlink()
                (self._root / "made" / "state.safetensors").unlink(missing_ok=True)

    # Corrections -------------------------------------------------------------------------------------------------------

    def keep_made(self, stage: int, correction: Correction) -> None:
        """The newest correction of a stage."""
        _renamed(self._root / "made" / f"stage-{stage:02d}.pb", lambda to: to.write_bytes(to_bytes(correction)))

    def made(self, stage: int) -> Correction | None:
        """The newest correction of a stage, if there is one."""
        path = self._root / "made" / f"stage-{stage:02d}.pb"
        try:
            return from_bytes(Correction, path.read_bytes()) if path.exists() else None
        except BadFrame:
            return None

    def keep_state(self, tensors: dict[str, Tensor]) -> None:
        """What the next correction goes on from: warm starts and means."""
        if tensors:
            tensors = {name: t.contiguous() for name, t in tensors.items()}
            _renamed(self._root / "made" / "state.safetensors", lambda to: save_file(tensors, to))

    def state(self) -> dict[str, Tensor]:
        path = self._root / "made" / "state.safetensors"
        if not path.exists():
            return {}
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    # Paths -------------------------------------------------------------------------------------------------------------

    def _pair(self, version: int) -> Path:
        return self._root / f"{version:06d}"

    def _weights(self, version: int, stage: int) -> Path:
        return self._pair(version) / f"stage-{stage:02d}.safetensors"

    def _incoming(self, stage: int) -> Path:
        return self._root / "incoming" / f"stage-{stage:02d}.part"


def _renamed(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    write(temporary)
    temporary.rename(path)
