"""What both ends of a link remember of a batch's rows, so that its next pass sends only changes; no packet, no tick.

On the second pass over a rollout batch the same tokens cross the link with slightly moved weights. Both ends then hold
the integers q of the pass before, and what travels is q_new - q_old (the activation deltas of AQ-SGD, Wang et al. 2022,
but as integers: the receiver has exactly what it would have without, and errors cannot add up). A row keeps the scale
that its first pass gave it. Samples are known by a key, so that other microbatches may hold them on the next pass.

The same packets in the same order give the same store on both ends; the order matters only where a key is in two of
them, and then the later one counts. What one end lost, the checksum over the references of a packet tells, and the rows are sent whole (`LinkCodec.encode_whole`).

Shape legend: N rows of a packet, T rows of a sample, R coefficients a row.
"""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codec.errors import SpecError
from codec.header import NO_REFERENCES

NO_ROW = np.int16(-32768)  # the code of a row that is no reference, as it was sent exactly


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows of one sample as they last crossed, integers and scale codes: a byte a coefficient, or two if any of
    them needs two, and two bytes a row."""

    version: int
    q_RT: NDArray[np.int8] | NDArray[np.int16]
    code_T: NDArray[np.int16]

    @property
    def bytes(self) -> int:
        return self.q_RT.nbytes + self.code_T.nbytes

    def checksum(self, key: int) -> int:
        head = struct.pack("<qIII", key, self.version & 0xFFFFFFFF, *self.q_RT.shape)
        return zlib.crc32(self.q_RT.data, zlib.crc32(self.code_T.data, zlib.crc32(head)))


@dataclass(frozen=True, slots=True)
class References:
    """What a packet's rows are coded against. Rows without a reference have code `NO_ROW` and integers 0."""

    q_RN: NDArray[np.int16]
    code_N: NDArray[np.int16]
    checksum: int  # over all samples that have references; never NO_REFERENCES

    @property
    def held_N(self) -> NDArray[np.bool_]:
        held_N: NDArray[np.bool_] = self.code_N != NO_ROW
        return held_N


class ReuseStore:
    """The references of one end of a link. Knows no tick; one thread calls it.

    `encode` and `decode` stage what crossed; `settle` makes it the references of the next pass or drops it, so that a
    skipped or retried tick leaves the references as they were. `limit_bytes` bounds all that is held, by a rule of
    keys and sizes alone: a third each for references, for what is staged (the smallest keys), and for the packets that
    `encode_whole` may be asked about. Samples that do not fit are not kept, and travel whole the next time; rows whose
    packet of changes does not fit travel whole at once.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise SpecError("reuse limit_bytes", limit_bytes, "at least 0")
        self.limit_bytes = limit_bytes
        self._kept: dict[int, tuple[Sample, int]] = {}  # with their checksums
        self._staged: dict[int, Sample] = {}
        self._first_dropped: float = math.inf  # keys from here on did not fit among those staged
        self._sent: dict[tuple[tuple[int, int], ...], bytes] = {}
        self._kept_bytes = self._staged_bytes = self._sent_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Of references, staged rows and packets. At most `limit_bytes`."""
        return self._kept_bytes + self._staged_bytes + self._sent_bytes

    def rows(self, samples: Sequence[tuple[int, int]]) -> "ReuseRows":
        """The (key, number of rows) of the samples that a packet holds, in the order of its rows."""
        return ReuseRows(self, tuple((int(key), int(rows)) for key, rows in samples))

    def settle(self, keep: bool) -> None:
        """What was staged since the last call becomes the references of its samples, or is dropped."""
        staged, self._staged, self._staged_bytes, self._first_dropped = self._staged, {}, 0, math.inf
        self._sent, self._sent_bytes = {}, 0
        if keep:
            for key in sorted(staged):
                self._keep(key, staged[key])

    def forget(self) -> None:
        """The batch is over, or another epoch or basis begins: nothing is a reference any more."""
        self.settle(keep=False)
        self._kept, self._kept_bytes = {}, 0

    def state(self) -> dict[str, Tensor]:
        """The references, for a checkpoint: tensors by name. What is staged is not among them."""
        tensors = {}
        for key, (sample, _) in self._kept.items():
            tensors[f"{key}.{sample.version}.q"] = torch.from_numpy(sample.q_RT.copy())
            tensors[f"{key}.{sample.version}.code"] = torch.from_numpy(sample.code_T.copy())
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, instead of all that is held."""
        self.forget()
        for name in sorted(tensors):
            key, version, field = name.split(".")
            if field == "q":
                code_T = tensors[f"{key}.{version}.code"].numpy().copy()
                self._keep(int(key), Sample(int(version), tensors[name].numpy().copy(), code_T))

    def _keep(self, key: int, sample: Sample) -> None:
        old = self._kept.pop(key, None)
        self._kept_bytes -= old[0].bytes if old is not None else 0
        if self._kept_bytes + sample.bytes <= self.limit_bytes // 3:
            self._kept[key] = sample, sample.checksum(key)
            self._kept_bytes += sample.bytes

    def _stage(self, key: int, sample: Sample) -> None:
        """The samples of the smallest keys that fit together, in whatever order they come. One too large to be alone
        stands in nobody's way."""
        if key >= self._first_dropped or sample.bytes > self.limit_bytes // 3:
            return
        self._unstage(key)
        self._staged[key] = sample
        self._staged_bytes += sample.bytes
        while self._staged_bytes > self.limit_bytes // 3:
            self._first_dropped = max(self._staged)
            self._unstage(max(self._staged))

    def _unstage(self, key: int) -> None:
        old = self._staged.pop(key, None)
        self._staged_bytes -= old.bytes if old is not None else 0


class ReuseRows:
    """The rows of one packet, by sample."""

    def __init__(self, store: ReuseStore, samples: tuple[tuple[int, int], ...]) -> None:
        if any(rows < 0 for _, rows in samples) or len({key for key, _ in samples}) != len(samples):
            raise SpecError("reuse samples", samples, "each key once, with its number of rows")
        self._store = store
        self.samples = samples
        self.count = sum(rows for _, rows in samples)

    def references(self, version: int, rank: int) -> References | None:
        """The references held for these rows under this basis; None if there are none."""
        q_RN = np.zeros((rank, self.count), np.int16)
        code_N = np.full(self.count, NO_ROW)
        checksum, at = NO_REFERENCES, 0
        for key, rows in self.samples:
            sample, its_checksum = self._store._kept.get(key, (None, 0))
            if sample is not None and sample.version == version and sample.q_RT.shape == (rank, rows):
                q_RN[:, at : at + rows], code_N[at : at + rows] = sample.q_RT, sample.code_T
                checksum = zlib.crc32(struct.pack("<II", its_checksum, at), checksum) or 1
            at += rows
        return None if checksum == NO_REFERENCES else References(q_RN, code_N, checksum)

    def stage(self, version: int, q_RN: NDArray[np.int16], code_N: NDArray[np.int16]) -> None:
        """What crossed: integers and scale codes of all rows (0 and `NO_ROW` for those sent exactly)."""
        at, all_small = 0, max(q_RN.max(initial=0), -q_RN.min(initial=0)) <= np.iinfo(np.int8).max
        for key, rows in self.samples:
            of, at = slice(at, at + rows), at + rows
            q_RT = q_RN[:, of]
            small = all_small or max(q_RT.max(initial=0), -q_RT.min(initial=0)) <= np.iinfo(np.int8).max
            kept_RT = q_RT.astype(np.int8, order="C") if small else q_RT.copy(order="C")
            self._store._stage(key, Sample(version, kept_RT, code_N[of].copy()))

    def hold(self, packet: bytes | None) -> bool:
        """Keep the packet that changes of these rows were sent in until the store is settled (None: they were sent
        whole). Whether there is room; if not, or for None, none is held."""
        store = self._store
        store._sent_bytes -= len(store._sent.pop(self.samples, b""))
        if packet is None or store._sent_bytes + len(packet) > store.limit_bytes // 3:
            return False
        store._sent[self.samples] = packet
        store._sent_bytes += len(packet)
        return True

    def held(self) -> bytes | None:
        """The packet that `hold` keeps."""
        return self._store._sent.get(self.samples)
