"""Wire forms of a stage's correction, one tensor a weight of it: tensors to a packet and back; no merger and no age.

A correction is M, a dense gradient, or a difference of gradients: as large as the stage in fp32, so it travels in a form
that keeps what its merger needs (METHOD section 2). x is a number that was sent, x' what arrives:

    sign      x' = sign(x) exactly, sign(0) = 0: what `signed_ema` uses of M, in 1 bit a weight
    lowrank   PowerSGD factors of each matrix (`powersgd`): x' = P P^T x, where P and Q = x^T P are rounded to bf16
              first: |x' - (P Q^T)| <= 2^-7 (|P| |Q|^T) and fp32's rounding; vectors, and matrices of which factors
              would have as many numbers, as bf16
    topk      the ceil(share n) largest |x| of each tensor (of equal ones the first) as bf16, x' = 0 for all others
    bf16      |x' - x| <= 2^-8 |x|, or 2^-134 where that is more

Tensors of two dimensions and more are matrices [first dimension, all others]. A section (`sections`) holds:

    sign      bits, of a byte the highest first; the section's form says which lists there are: 1 rows with any number
              other than 0 (a bit a row), as a gradient of an embedding has none for tokens that did not occur; 2 those
              numbers of these rows (a bit a number); then always x > 0 of the numbers left (a bit a number)
    lowrank   P's bf16 planes (`planes`), row-major, then Q's
    topk      the gaps between places, in planes of as many bytes as n needs, then bf16 planes
    bf16      bf16 planes

Shape legend: R rows, C columns, K rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codec import planes, powersgd, sections
from codec.coefficients import in_range
from codec.entropy import Reader
from codec.errors import NonFiniteError, PacketError, SpecError
from codec.header import UINT32_MAX
from codec.packet import BytesLike
from codec.topk import largest_places

__all__ = ["CorrectionEncoder", "CorrectionSpec", "Shape", "decode", "largest_bytes"]

Shape: TypeAlias = tuple[int, ...]
Form = Literal["sign", "lowrank", "topk", "bf16"]
Float32 = NDArray[np.float32]

FORMAT: Final = 3
_ROWS, _ZEROS = 1, 2  # the lists that a section of signs may have


@dataclass(frozen=True, slots=True)
class CorrectionSpec:
    """How corrections travel. `rank` means something for `lowrank` alone, `share` for `topk`. Raises `SpecError`."""

    form: Form
    rank: int = 4
    share: float = 0.02

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise SpecError("correction form", repr(self.form), "one of " + ", ".join(get_args(Form)))
        if self.rank < 1:
            raise SpecError("correction rank", self.rank, "an integer >= 1")
        if not 0 < self.share <= 1:
            raise SpecError("correction share", self.share, "a number above 0 and at most 1")

    @property
    def number(self) -> int:
        """The form on the wire."""
        return get_args(Form).index(self.form)

    def layout(self, shapes: Sequence[Shape]) -> int:
        """A checksum over all that both ends must agree on."""
        setting = {"lowrank": self.rank, "topk": float(self.share)}.get(self.form)
        return sections.checksum(self.form, setting, [tuple(shape) for shape in shapes])

    def rank_of(self, shape: Shape) -> int:
        """Columns of the factors of a tensor; 0 where it travels as bf16."""
        return powersgd.rank_of(*_matrix(shape), self.rank) if self.form == "lowrank" and len(shape) > 1 else 0

    def kept(self, count: int) -> int:
        """How many of so many numbers `topk` keeps. 0.07 x 100 is 7.000000000000001 to a computer, and 7 to us."""
        return min(count, max(1, math.ceil(round(self.share * count, 6))))

    def raw_bytes(self, shape: Shape) -> int:
        """Bytes of a tensor's section before zstd: exact, but the most for `sign`, whose zeros cost."""
        count = math.prod(shape)
        if self.form == "sign":
            return -(-_matrix(shape)[0] // 8) + 2 * -(-count // 8)
        if rank := self.rank_of(shape):
            return 2 * rank * sum(_matrix(shape))
        return self.kept(count) * (2 + planes.gap_bytes(count)) if self.form == "topk" else 2 * count


def largest_bytes(spec: CorrectionSpec, shapes: Sequence[Shape]) -> int:
    """The most bytes that a packet of such tensors has. Raises `SpecError` for a tensor that one section cannot hold."""
    if spec.form == "topk" and (most := max(map(math.prod, shapes), default=0)) > UINT32_MAX:
        raise SpecError("correction tensor", f"{most} numbers", f"at most {UINT32_MAX} for topk")
    return sections.largest_bytes([spec.raw_bytes(shape) for shape in shapes])


class CorrectionEncoder:
    """One stage's corrections, as packets. `lowrank` starts from the factors of the call before, which are state: after
    `state`, `load` into a new encoder continues bit for bit. One instance belongs to one stage and one thread."""

    def __init__(self, spec: CorrectionSpec, shapes: Sequence[Shape], seed: int = 0) -> None:
        """`seed` is for the directions that `lowrank` starts from. Raises `SpecError` for shapes too large."""
        self.spec, self.shapes, self._seed = spec, [tuple(shape) for shape in shapes], seed
        self.largest_bytes = largest_bytes(spec, self.shapes)
        self._starts: dict[int, Tensor] = {}  # q_CK by tensor

    def encode(self, tensors: Sequence[Tensor]) -> bytes:
        """The packet. Float tensors on any device; they are taken one at a time.

        Raises `NonFiniteError` for NaN, Inf or what bf16 cannot hold, in the tensors or their factors, and `SpecError`
        for other shapes than announced; the state is then as it was.
        """
        if len(tensors) != len(self.shapes):
            raise SpecError("correction", f"{len(tensors)} tensors", len(self.shapes))
        writer = sections.SectionWriter(FORMAT, self.spec.number, len(self.shapes), self.spec.layout(self.shapes))
        starts: dict[int, Tensor] = {}
        for index, (tensor, shape) in enumerate(zip(tensors, self.shapes, strict=True)):
            m_RC = _on_host(tensor, shape, index)
            if self.spec.form == "sign":
                writer.add(_signs(m_RC.numpy()))
            elif self.spec.rank_of(shape):
                p_RK, q_CK, starts[index] = self._factors(m_RC, index)
                writer.add(sections.pack([*_bf16_planes(p_RK, index), *_bf16_planes(q_CK, index)]))
            elif self.spec.form == "topk":
                x = m_RC.reshape(-1)
                places = largest_places(x.numpy(), self.spec.kept(len(x)))
                gap_planes = planes.split(planes.gaps(places), planes.gap_bytes(len(x)))
                writer.add(sections.pack([*gap_planes, *_bf16_planes(x[torch.from_numpy(places)], index)]))
            else:
                writer.add(sections.pack(_bf16_planes(m_RC, index)))
        self._starts |= starts
        return writer.close()

    def _factors(self, m_RC: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """P, Q and the next start."""
        first_CK = powersgd.first_start(m_RC.shape[1], self.spec.rank_of(self.shapes[index]), self._seed + index)
        start_CK = self._starts.get(index)
        steps = powersgd.FIRST_STEPS if start_CK is None else 1
        start_CK = first_CK if start_CK is None else start_CK
        p_RK, q_CK = powersgd.factors(m_RC, start_CK, steps)
        return p_RK, q_CK, powersgd.next_start(q_CK, start_CK, first_CK)

    def state(self) -> dict[str, Tensor]:
        """What the next packet depends on besides its tensors, by name; empty for all forms but `lowrank`."""
        return {f"start.{index}": start_CK.clone() for index, start_CK in self._starts.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from another's `state`. Raises `SpecError` if it is not one of such a stage."""
        known = {f"start.{index}": index for index, shape in enumerate(self.shapes) if self.spec.rank_of(shape)}
        starts = {}
        for name, start_CK in tensors.items():
            index = known.get(name, -1)
            shape = (_matrix(self.shapes[index])[1], self.spec.rank_of(self.shapes[index])) if index >= 0 else None
            if start_CK.shape != shape or start_CK.dtype != torch.float32 or not torch.isfinite(start_CK).all():
                raise SpecError("correction state", f"{name} {start_CK.dtype} {list(start_CK.shape)}",
                                f"finite float32 {shape}", "begin without it")  # fmt: skip
            starts[index] = start_CK.detach().clone()
        self._starts = starts


def decode(packet: BytesLike, spec: CorrectionSpec, shapes: Sequence[Shape]) -> list[Tensor]:
    """The tensors x' of a packet, fp32 on the CPU; one at a time is unpacked beside them.

    Raises `PacketError` for a packet that is damaged, of another spec or stage, or holds what no sender may send.
    """
    reader = sections.SectionReader(packet, FORMAT, [spec.number], len(shapes), spec.layout(shapes))
    tensors = []
    for shape in shapes:
        wanted = spec.raw_bytes(shape)
        form, raw = reader.take(wanted)
        if spec.form != "sign" and (form or len(raw) != wanted):
            raise PacketError("section", f"form {form}, {len(raw)} bytes", f"form 0, {wanted} bytes")
        if spec.form == "sign":
            x = _from_signs(form, Reader(raw), *_matrix(shape))
        elif rank := spec.rank_of(shape):
            x = _from_factors(Reader(raw), *_matrix(shape), rank)
        elif spec.form == "topk":
            x = _from_largest(Reader(raw), math.prod(shape), spec.kept(math.prod(shape)))
        else:
            x = _from_bf16(Reader(raw), math.prod(shape))
        tensors.append(torch.from_numpy(x).reshape(shape))
    reader.close()
    return tensors


def _matrix(shape: Shape) -> tuple[int, int]:
    """(R, C); a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _on_host(tensor: Tensor, shape: Shape, index: int) -> Tensor:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise SpecError(f"correction tensor {index}", f"{tensor.dtype} {list(tensor.shape)}", f"floats {list(shape)}")
    m_RC = tensor.detach().to("cpu", torch.float32).contiguous().reshape(_matrix(shape))
    _check_range(m_RC, index)
    return m_RC


def _check_range(x: Tensor, index: int) -> None:
    if in_range(x, torch.finfo(x.dtype).max):
        return
    bad_RC = ~torch.isfinite(x if x.ndim > 1 else x[None])
    bad_R = bad_RC.any(dim=1)
    raise NonFiniteError(f"correction tensor {index}", int(bad_RC.sum()), int(bad_R.sum()), int(bad_R.int().argmax()))


def _signs(m_RC: Float32) -> sections.Packed:
    positive, present, form, lists = m_RC > 0, m_RC != 0, 0, []
    if not present.all():
        rows_R = present.any(axis=1)
        if not rows_R.all():
            form |= _ROWS
            lists.append(np.packbits(rows_R))
            positive, present = positive[rows_R], present[rows_R]
        if not present.all():
            form |= _ZEROS
            lists.append(np.packbits(present))
            positive = positive.take(np.flatnonzero(present))  # a mask as index takes ten times as long
    return sections.pack([*lists, np.packbits(positive)], form)


def _from_signs(form: int, reader: Reader, rows: int, columns: int) -> Float32:
    if form > _ROWS | _ZEROS:
        raise PacketError("section form", form, f"0..{_ROWS | _ZEROS}")
    rows_R = _bits(reader, rows) if form & _ROWS else np.ones(rows, np.bool_)
    left = int(np.count_nonzero(rows_R)) * columns
    present = _bits(reader, left) if form & _ZEROS else None
    positive = _bits(reader, left if present is None else int(np.count_nonzero(present)))
    reader.close()
    signs = positive.astype(np.int8)
    signs *= 2
    signs -= 1
    if present is not None:
        sparse, signs = signs, np.zeros(left, np.int8)
        signs[np.flatnonzero(present)] = sparse
    x_RC = np.zeros((rows, columns), np.float32)
    x_RC[slice(None) if form & _ROWS == 0 else rows_R] = signs.reshape(-1, columns) if left else 0
    return x_RC


def _bits(reader: Reader, count: int) -> NDArray[np.bool_]:
    return np.unpackbits(reader.take(-(-count // 8)), count=count).view(np.bool_)


def _bf16_planes(x: Tensor, index: int) -> list[NDArray[np.uint8]]:
    rounded = x.to(torch.bfloat16)
    _check_range(rounded, index)
    return planes.split(rounded.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1), 2)


def _from_bf16(reader: Reader, count: int) -> Float32:
    bits = planes.join(reader.take(2 * count), count, np.uint32)
    bits <<= 16
    x: Float32 = bits.view(np.float32)
    return _finite(x)


def _from_factors(reader: Reader, rows: int, columns: int, rank: int) -> Float32:
    p_RK, q_CK = (torch.from_numpy(_from_bf16(reader, size * rank)).reshape(size, rank) for size in (rows, columns))
    x_RC: Float32 = (p_RK @ q_CK.T).numpy()
    return _finite(x_RC)


def _from_largest(reader: Reader, size: int, count: int) -> Float32:
    places = planes.places(reader.take(planes.gap_bytes(size) * count), count, size)
    x = np.zeros(size, np.float32)
    x[places] = _from_bf16(reader, count)
    return x


def _finite(x: Float32) -> Float32:
    if not in_range(torch.from_numpy(x), torch.finfo(torch.float32).max):
        raise PacketError("values", "NaN or Inf", "finite values, which is all that a sender may send")
    return x
