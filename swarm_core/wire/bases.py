"""Bases and sketches as their frames carry them: tensors to BasisMatrix and back, checked; no stream and no fit."""

from __future__ import annotations

import torch
from torch import Tensor

from codec.basis import Basis
from codec.errors import CodecError
from codec.spec import Direction, LinkSpec
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BasisMatrix

Key = tuple[int, Direction]


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
    most = spec.rank_forward if matrix.direction == Direction.FORWARD else spec.rank_backward
    name = f"basis version {version} of boundary {matrix.boundary}"
    rows, columns = matrix.rows, matrix.columns
    if rows != spec.width or not 1 <= columns <= most:
        raise BadFrame(f"{name} is {rows} x {columns}; the manifest wants {spec.width} x 1..{most}")
    encoder_HR = _tensor(matrix.values, rows, columns, name)
    decoder_RH = _tensor(matrix.decoder, columns, rows, name) if matrix.decoder else None
    try:
        return Basis.from_wire(version, encoder_HR, decoder_RH, matrix.step)
    except CodecError as error:
        raise BadFrame(f"{name}: {error}") from None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(values: bytes, rows: int, columns: int, name: str) -> Tensor:
    if len(values) != 2 * rows * columns:
        raise BadFrame(f"{name}: got {len(values)} bytes for {rows} x {columns} in bf16, wanted {2 * rows * columns}")
    return torch.frombuffer(bytearray(values), dtype=torch.bfloat16).view(rows, columns)
