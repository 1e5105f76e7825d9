"""Bases and sketches as their frames carry them: tensors to BasisMatrix and back, checked; no stream and no fit.

A basis set goes whole, or, to a member that holds the version before, as `as_changes` packs it: every encoder and
decoder a packet of codec/weight_delta.py, against the same matrix of that version where it has the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from codec import weight_delta
from codec.basis import Basis
from codec.errors import CodecError
from codec.spec import Direction, LinkSpec
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BasisMatrix, BasisSet

BESIDE_BYTES = 1 << 10  # of a basis set, and of each of its matrices, beside their numbers
Key = tuple[int, Direction]
Shape = tuple[int, int]


def key_of(matrix: BasisMatrix, boundaries: int) -> Key:
    """(boundary, direction). Raises BadFrame for one that does not exist."""
    if matrix.direction not in (0, 1) or not 0 <= matrix.boundary < boundaries:
        raise BadFrame(f"a matrix of boundary {matrix.boundary}, direction {matrix.direction}: there is no such link")
    return matrix.boundary, Direction(matrix.direction)


def matrix_of(key: Key, values_HR: Tensor, decoder_RH: Tensor | None = None, step: float = 0.0) -> BasisMatrix:
    """A sketch, or a basis as `Basis.to_wire` gives it, in bf16."""
    decoder = b"" if decoder_RH is None else _bytes(decoder_RH)
    rows, columns = values_HR.shape
    return BasisMatrix(key[0], int(key[1]), rows, columns, _bytes(values_HR), decoder, step)


def sketch_of(matrix: BasisMatrix, height: int, columns: int) -> Tensor:
    """V (H x R, fp32) of a sketch. Raises BadFrame for any other shape."""
    if (matrix.rows, matrix.columns, len(matrix.decoder)) != (height, columns, 0):
        raise BadFrame(f"a sketch of {matrix.rows} x {matrix.columns}; wanted {height} x {columns}")
    return _tensor(matrix.values, height, columns, "a sketch").float()


def basis_of(matrix: BasisMatrix, version: int, spec: LinkSpec) -> Basis:
    """The basis that everybody makes of this matrix. Raises BadFrame for one that does not fit the link or is none."""
    name = _fitting(matrix, version, spec)
    rows, columns = matrix.rows, matrix.columns
    encoder_HR = _tensor(matrix.values, rows, columns, name)
    decoder_RH = _tensor(matrix.decoder, columns, rows, name) if matrix.decoder else None
    try:
        return Basis.from_wire(version, encoder_HR, decoder_RH, matrix.step)
    except CodecError as error:
        raise BadFrame(f"{name}: {error}") from None


# A set as changes ---------------------------------------------------------------------------------------------------


def largest_set_bytes(spec: LinkSpec, boundaries: int) -> int:
    """The most that a BASIS frame of these links has: encoders and decoders of all boundaries, whole."""
    ranks = [spec.columns(direction) for direction in Direction if spec.basis_direction(direction) is direction]
    return BESIDE_BYTES + boundaries * sum(2 * 2 * spec.width * rank + BESIDE_BYTES for rank in ranks)


def as_changes(new: BasisSet, base: BasisSet) -> BasisSet:
    """`new`, whole, for a member that holds `base`, whole: as packets against it, or as it is where that is no larger."""
    held = _by_place(base)
    packed = [_each(m, held.get((m.boundary, m.direction)), _packed) for m in new.matrices]
    if _value_bytes(packed) >= _value_bytes(new.matrices):
        return new
    return replace(new, matrices=packed, base=base.version, delta=True)


def as_whole(message: BasisSet, held: BasisSet | None, spec: LinkSpec) -> BasisSet:
    """The set that a BASIS frame stands for, bit for bit as its sender has it; `held` is the last one that came, whole.

    Raises BadFrame for changes of a version that is not held, for matrices that do not fit the link (before anything
    is allocated for them), and for damaged packets.
    """
    if not message.delta:
        return message
    if held is None or held.version != message.base:
        have = "no version" if held is None else f"version {held.version}"
        raise BadFrame(
            f"basis version {message.version} came as changes of version {message.base}, here is {have}: whoever "
            "holds another version must be sent it whole"
        )
    bases, matrices = _by_place(held), []
    for matrix in message.matrices:
        name = _fitting(matrix, message.version, spec)
        try:
            matrices.append(_each(matrix, bases.get((matrix.boundary, matrix.direction)), _unpacked))
        except CodecError as error:
            raise BadFrame(f"{name}, as changes of version {message.base}: {error}") from None
    return BasisSet(message.version, message.tick, matrices)


def _packed(new: bytes, base: list[Tensor] | None, shape: Shape) -> bytes:
    return weight_delta.encode([_tensor(new, *shape, "a basis")], base)


def _unpacked(packet: bytes, base: list[Tensor] | None, shape: Shape) -> bytes:
    (tensor,) = weight_delta.decode(packet, base, [shape], torch.bfloat16)
    return _bytes(tensor)


def _each(
    matrix: BasisMatrix, base: BasisMatrix | None, turn: Callable[[bytes, list[Tensor] | None, Shape], bytes]
) -> BasisMatrix:
    """`matrix` with its encoder and its decoder, if any, turned into other bytes: beside those of `base` where it has
    them in the same shape (the steering changes ranks, and a pair may become orthonormal or cease to be)."""
    like = base if base is not None and (base.rows, base.columns) == (matrix.rows, matrix.columns) else BasisMatrix()

    def one(new: bytes, old: bytes, shape: Shape) -> bytes:
        return turn(new, [_tensor(old, *shape, "a basis")] if old else None, shape) if new else b""

    encoder, decoder = (matrix.rows, matrix.columns), (matrix.columns, matrix.rows)
    return replace(
        matrix, values=one(matrix.values, like.values, encoder), decoder=one(matrix.decoder, like.decoder, decoder)
    )


def _by_place(bases: BasisSet) -> dict[tuple[int, int], BasisMatrix]:
    return {(m.boundary, m.direction): m for m in bases.matrices}


def _value_bytes(matrices: list[BasisMatrix]) -> int:
    return sum(len(m.values) + len(m.decoder) for m in matrices)


def _fitting(matrix: BasisMatrix, version: int, spec: LinkSpec) -> str:
    """Its name, for errors. Raises BadFrame for a shape that the link cannot have."""
    most = spec.rank_forward if matrix.direction == Direction.FORWARD else spec.rank_backward
    name = f"basis version {version} of boundary {matrix.boundary}"
    if matrix.rows != spec.width or not 1 <= matrix.columns <= most:
        raise BadFrame(f"{name} is {matrix.rows} x {matrix.columns}; the manifest wants {spec.width} x 1..{most}")
    return name


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(values: bytes, rows: int, columns: int, name: str) -> Tensor:
    if len(values) != 2 * rows * columns:
        raise BadFrame(f"{name}: got {len(values)} bytes for {rows} x {columns} in bf16, wanted {2 * rows * columns}")
    return torch.frombuffer(bytearray(values), dtype=torch.bfloat16).view(rows, columns)
