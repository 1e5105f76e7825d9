"""Lossless deltas between two versions of a list of weight tensors: snapshots for the anchor; no file and no version.

At RL learning rates most bf16 weights do not change between two versions, and those that do by a step or two of their
last bit (PULSE). So a *change* is the difference of two bit patterns as integers, in zigzag order (0, -1, 1, -2 ...):
with up to half of bf16 weights changed 0.70-0.82 of their XOR's bytes, and 0.2-0.3 of those of the new values.
Each block of a tensor travels in the smallest of

    gaps     the changes other than 0, and the gaps between their places
    mask     the changes other than 0, and a bit for each weight that says where they are
    whole    the weights as they are: without a base, or where that is smaller

all in byte planes (`planes`) through zstd. Bit for bit: NaNs keep their payloads and zeros their signs.

A packet (`sections`, format 4) has form 0 (whole) or 1 (against a base); its first section has the BLAKE2b digests of
the base's bytes (zeros without one) and of the result's, so that a wrong base is refused and what comes out is known to
be what went in. Then each tensor's blocks of `BLOCK` weights, in order. The largest gap fits 3 bytes.

Memory beside the weights and the base: the packet, never more than the weights, and a few blocks (10 MB for bf16).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codec import planes, sections
from codec.entropy import Reader
from codec.errors import PacketError, SpecError
from codec.packet import BytesLike

__all__ = ["decode", "encode", "largest_bytes"]

Shape: TypeAlias = tuple[int, ...]
Bits = NDArray[Any]  # of one of the unsigned integer types below

FORMAT: Final = 4
BLOCK: Final = 1 << 20
_WHOLE, _DELTA = 0, 1  # of a packet
_GAPS, _MASK, _ALL = 0, 1, 2  # of a section
_GAP_BYTES: Final = planes.gap_bytes(BLOCK)
_DIGEST_BYTES: Final = 16
_MASK_SHARE: Final = 0.2  # changed weights; below it gaps are smaller than the mask, above it larger (measured)
_DOUBTFUL_SHARE: Final = 0.5  # of a block's bytes: weights as they are never pack better than to 0.6 (measured)
_BITS: Final[dict[torch.dtype, tuple[torch.dtype, Any]]] = {
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float32: (torch.int32, np.uint32),
    torch.float64: (torch.int64, np.uint64),
}


def largest_bytes(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """The most bytes that a packet of such tensors has. Raises `SpecError` for a type that cannot travel."""
    _check_dtype(dtype)
    blocks = [part.stop - part.start for shape in shapes for part in _blocks(math.prod(shape))]
    return sections.largest_bytes([2 * _DIGEST_BYTES, *(size * dtype.itemsize for size in blocks)])


def encode(new: Sequence[Tensor], base: Sequence[Tensor] | None) -> bytes:
    """The packet from which whoever has `base` (bit for bit) makes `new`; None: it needs nothing.

    All tensors are of one type (bf16, fp32, fp64) and on the CPU. Raises `SpecError`, also for a base of other shapes.
    """
    dtype = new[0].dtype if new else torch.float32
    shapes = [tuple(tensor.shape) for tensor in new]
    bits = _bits(new, shapes, dtype)
    held = None if base is None else _bits(base, shapes, dtype)
    form = _WHOLE if held is None else _DELTA
    writer = sections.SectionWriter(FORMAT, form, len(shapes), _layout(shapes, dtype))
    writer.add(sections.pack([np.frombuffer(_digest(held) + _digest(bits), np.uint8)]))
    for index, weights in enumerate(bits):
        for part in _blocks(len(weights)):
            writer.add(_packed(weights[part], None if held is None else held[index][part]))
    return writer.close()


def decode(
    packet: BytesLike, base: Sequence[Tensor] | None, shapes: Sequence[Shape], dtype: torch.dtype
) -> list[Tensor]:
    """The tensors that `encode` was given, bit for bit, on the CPU. A packet that needs no base ignores it.

    Raises `PacketError` for a packet that is damaged, of other tensors, or made against another base than this (field
    `base`), and `SpecError` for a base that does not have these shapes.
    """
    _check_dtype(dtype)
    reader = sections.SectionReader(packet, FORMAT, [_WHOLE, _DELTA], len(shapes), _layout(shapes, dtype))
    _, digests = reader.take(2 * _DIGEST_BYTES)
    if len(digests) != 2 * _DIGEST_BYTES:
        raise PacketError("digests", f"{len(digests)} bytes", 2 * _DIGEST_BYTES)
    base_digest, result_digest = bytes(digests[:_DIGEST_BYTES]), bytes(digests[_DIGEST_BYTES:])
    held = None if base is None or reader.form == _WHOLE else _bits(base, shapes, dtype)
    if (ours := _digest(held)) != base_digest:
        have = "none is held" if held is None else f"{ours.hex()} is held"
        raise PacketError("base", base_digest.hex(), have, "ask the sender for the weights as a whole")
    tensors = []
    for index, shape in enumerate(shapes):
        tensor = torch.empty(shape, dtype=dtype)
        weights = _view(tensor)
        for part in _blocks(len(weights)):
            _unpack(reader, weights[part], None if held is None else held[index][part])
        tensors.append(tensor)
    reader.close()
    if (ours := _digest(_bits(tensors, shapes, dtype))) != result_digest:
        raise PacketError("result", ours.hex(), result_digest.hex())
    return tensors


def rounded(weights: Tensor, mantissa_bits: int) -> Tensor:
    """fp32 weights to the nearest number with so many mantissa bits (7 is bf16, 23 all), ties to even; fp32 still.

    The bits that are cut are zeros in every version, and cost a delta nothing. Inf and NaN stay what they are.
    """
    drop = 23 - mantissa_bits
    if weights.dtype != torch.float32 or not 1 <= drop <= 22:
        raise SpecError("rounding", f"{weights.dtype} to {mantissa_bits} bits", "fp32 to 1..22 bits")
    bits = weights.view(torch.int32)
    nearest = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop << drop
    return torch.where(torch.isfinite(weights), nearest.view(torch.float32), weights)


def _packed(new: Bits, held: Bits | None) -> sections.Packed:
    """One block, in its smallest form."""
    if held is None:
        return sections.pack(planes.split(new, new.itemsize), _ALL)
    difference = (new - held).view(new.dtype.str.replace("u", "i"))
    changed = difference != 0
    places = np.flatnonzero(changed)
    if len(places) < _MASK_SHARE * len(new):
        where, form = planes.split(planes.gaps(places), _GAP_BYTES), _GAPS
    else:
        where, form = [np.packbits(changed)], _MASK
    change = difference.take(places)  # by a mask it takes ten times as long
    folded = (change << 1 ^ change >> 8 * new.itemsize - 1).view(new.dtype)
    packed = sections.pack([*where, *planes.split(folded, new.itemsize)], form)
    if packed.stored_bytes <= _DOUBTFUL_SHARE * new.nbytes:
        return packed
    return min(packed, sections.pack(planes.split(new, new.itemsize), _ALL), key=lambda each: each.stored_bytes)


def _unpack(reader: sections.SectionReader, out: Bits, held: Bits | None) -> None:
    """Fills `out` with the next block. Raises `PacketError` for what `_packed` cannot have written."""
    size, width = len(out), out.itemsize
    mask_bytes = -(-size // 8)
    form, raw = reader.take(mask_bytes + out.nbytes)
    block = Reader(raw)
    if form == _ALL:
        out[:] = planes.join(block.take(out.nbytes), size, out.dtype)
        block.close()
        return
    if held is None or form not in (_GAPS, _MASK):
        raise PacketError("block form", form, f"{_ALL}" if held is None else f"{_GAPS}..{_ALL}")
    count, odd = divmod(len(raw), _GAP_BYTES + width) if form == _GAPS else divmod(len(raw) - mask_bytes, width)
    if odd or not 0 <= count <= size:
        raise PacketError("block", f"{len(raw)} bytes", f"a whole number of changes, at most {size}")
    if form == _GAPS:
        places = planes.places(block.take(_GAP_BYTES * count), count, size)
    else:
        places = np.flatnonzero(np.unpackbits(block.take(mask_bytes), count=size).view(np.bool_))
        if len(places) != count:
            raise PacketError("block", f"{count} changes", f"{len(places)}, which is what its mask has")
    folded = planes.join(block.take(width * count), count, out.dtype)
    one = out.dtype.type(1)
    out[:] = held
    out[places] = held.take(places) + (folded >> one ^ -(folded & one))


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def _bits(tensors: Sequence[Tensor], shapes: Sequence[Shape], dtype: torch.dtype) -> list[Bits]:
    """The tensors' bit patterns: the same memory, where they are contiguous."""
    _check_dtype(dtype)
    if [tuple(tensor.shape) for tensor in tensors] != [tuple(shape) for shape in shapes]:
        raise SpecError("weights", [list(tensor.shape) for tensor in tensors][:4], f"{len(shapes)} tensors of the "
                        "shapes asked for")  # fmt: skip
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            raise SpecError("weights", f"{tensor.dtype} on {tensor.device}", f"{dtype} on the CPU, as all others")
    return [_view(tensor.detach().contiguous()) for tensor in tensors]


def _view(tensor: Tensor) -> Bits:
    signed, unsigned = _BITS[tensor.dtype]
    return tensor.reshape(-1).view(signed).numpy().view(unsigned)


def _digest(bits: Sequence[Bits] | None) -> bytes:
    if bits is None:
        return bytes(_DIGEST_BYTES)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for each in bits:
        digest.update(each.data)
    return digest.digest()


def _layout(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    return sections.checksum(str(dtype), [tuple(shape) for shape in shapes])


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _BITS:
        raise SpecError("weights", dtype, "bfloat16, float32 or float64")
