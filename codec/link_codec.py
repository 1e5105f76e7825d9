"""Rows to packets and back: the one place where tensors and bytes meet; no peer, tick or configuration here.

    encode:  x_NH --carry--> numbers_NC --as bytes--> packet          (the sender)
    decode:  packet --checked--> numbers_NC --rebuild--> x'_NH        (the receiver)
    project: x_NH --carry--> numbers_NC --rebuild--> x'_NH            (what the receiver will see, without the bytes)

Shape legend: N rows (valid tokens; padding never crosses a link), H hidden width, R rank, C numbers sent per row.
"""

import sys
from typing import Final

import torch
from torch import Tensor

from codec.basis import Basis, matmul_fp32
from codec.errors import NonFiniteError, PacketError, SpecError
from codec.header import Element
from codec.packet import BytesLike, Contents, pack, unpack
from codec.spec import Direction, LinkSpec, payload_bytes
from codec.zstd_auto import ZstdAuto

if sys.byteorder != "little":
    raise ImportError(
        f"codec packets are little-endian and written without swapping; this host is {sys.byteorder}-endian"
    )

TORCH_DTYPE: Final = {Element.BF16: torch.bfloat16, Element.FP32: torch.float32, Element.FP64: torch.float64}

# |Y Q^T| <= max|y| sqrt(R) for orthonormal Q, and sqrt(R) <= 256 as R <= H <= MAX_WIDTH: coefficients within this limit
# can always be rebuilt in fp32 without overflow, so that one look at them settles it for both ends.
LARGEST_COEFFICIENT: Final = 1e36


class LinkCodec:
    """Both directions of one boundary, for either end of it.

    What arrives (h' for a row h; u = 2^-8 is the rounding of bf16):
      identity   h' = h, bit for bit.
      none       h' = h rounded to bf16 (nearest, ties to even): |h' - h| <= u |h| elementwise, for |h| >= 1.2e-38.
      lowrank    h' = bf16(h Q) Q^T: ||h' - h Q Q^T|| <= u ||h Q|| + 1e-5 ||h||, for ||h|| >= 1e-30, and so
                 ||h' - h|| <= ||h - h Q Q^T|| + u ||h Q|| + 1e-5 ||h||. The last term is the fp32 products.
    Backward, `straight_through` takes the same with Q_b; `exact` is, up to that rounding, the gradient of the network
    that has h -> h Q_f Q_f^T at this boundary: dL/dh = (g Q_f) Q_f^T for g = dL/dh'.

    Values never depend on zstd. `encode` remembers, per direction, whether zstd pays, so one thread at a time encodes a
    direction, and a frame that is sent again is *kept* and not encoded again. `decode` and `project` remember nothing.
    """

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        self._zstd = {direction: ZstdAuto() for direction in Direction} if spec.zstd == "auto" else None

    def encode(self, x_NH: Tensor, direction: Direction, basis: Basis | None = None) -> bytes:
        """The packet for `x_NH`: any float dtype, device or strides; N = 0 is fine. Never more than `packet_bytes`.

        Raises `NonFiniteError` for NaN, Inf, or values that leave the range on the way (by rounding to bf16, or as
        coefficients beyond 1e36), and `SpecError` for a tensor or basis that does not fit the link.
        """
        numbers_NC = self._carry(x_NH, direction, basis).cpu().contiguous()
        raw = _bytes_of(numbers_NC)
        shrunk = self._zstd[direction].shrink(raw) if self._zstd is not None else None
        return pack(self._contents(len(x_NH), direction, basis), raw, shrunk)

    def decode(self, packet: BytesLike, rows: int, direction: Direction, basis: Basis | None = None) -> Tensor:
        """The rows `x'_NH` of a packet: fp32 (fp64 for an fp64 link), on the basis' device, else on the CPU.

        `rows` is the N that the receiver knows from the microbatch's layout. Raises `PacketError` for anything
        malformed, damaged or unexpected (before allocating for it), `BasisMismatch` for a sound packet of another
        version, and `SpecError` for a basis that does not fit the link.
        """
        self._check_basis(direction, basis)
        contents = self._contents(rows, direction, basis)
        raw = unpack(packet, contents)
        numbers_NC = torch.empty(rows, contents.columns, dtype=TORCH_DTYPE[contents.element])
        _bytes_of(numbers_NC)[:] = raw
        if not self._in_range(numbers_NC):
            raise PacketError(
                "values", "NaN, Inf or out of range", "finite values, which is all that a sender may send"
            )
        return self._rebuild(numbers_NC, direction, basis)

    def project(self, x_NH: Tensor, direction: Direction, basis: Basis | None = None) -> Tensor:
        """`decode(encode(x_NH))` without the bytes, on x's device: what the receiver will see. Raises as `encode`."""
        return self._rebuild(self._carry(x_NH, direction, basis), direction, basis)

    def _carry(self, x_NH: Tensor, direction: Direction, basis: Basis | None) -> Tensor:
        """The numbers that travel, [N, C] in the link's element type."""
        self._check_rows(x_NH)
        self._check_basis(direction, basis)
        x_NH = x_NH.detach()
        rows_NC = matmul_fp32(x_NH, self._q(direction, basis)) if self.spec.kind == "lowrank" else x_NH
        numbers_NC = rows_NC.to(TORCH_DTYPE[self.spec.element])
        if not self._in_range(numbers_NC):
            raise self._not_sendable(x_NH, numbers_NC, direction)
        return numbers_NC

    def _rebuild(self, numbers_NC: Tensor, direction: Direction, basis: Basis | None) -> Tensor:
        """What the numbers mean: the rows [N, H], in fp32, or as they are for an identity link."""
        if self.spec.kind == "identity":
            return numbers_NC
        if self.spec.kind == "none":
            return numbers_NC.to(torch.float32)
        q_HR = self._q(direction, basis)
        return matmul_fp32(numbers_NC.to(q_HR.device), q_HR.T)

    def _contents(self, rows: int, direction: Direction, basis: Basis | None) -> Contents:
        payload_bytes(self.spec, direction, rows)  # refuses rows that one packet cannot hold
        return Contents(
            kind=self.spec.wire_kind,
            direction=direction,
            element=self.spec.element,
            rows=rows,
            columns=self.spec.columns(direction),
            basis_version=basis.version if basis is not None and self.spec.kind == "lowrank" else None,
        )

    def _q(self, direction: Direction, basis: Basis | None) -> Tensor:
        if basis is None:
            raise SpecError(
                "basis", None, f"the link's {self._basis_name(direction)}", "calibrate one before the first batch"
            )
        return basis.q_HR

    def _in_range(self, numbers_NC: Tensor) -> bool:
        """One pass without a copy. Written so that NaN, which compares false with everything, is out of range."""
        if numbers_NC.numel() == 0:
            return True
        largest = LARGEST_COEFFICIENT if self.spec.kind == "lowrank" else torch.finfo(numbers_NC.dtype).max
        low, high = torch.aminmax(numbers_NC)
        return bool((low >= -largest) & (high <= largest))

    def _not_sendable(self, x_NH: Tensor, numbers_NC: Tensor, direction: Direction) -> NonFiniteError:
        """The error that says where. If the rows themselves are finite, it was their image that left the range."""
        largest = LARGEST_COEFFICIENT if self.spec.kind == "lowrank" else torch.finfo(numbers_NC.dtype).max
        bad_NH = ~torch.isfinite(x_NH)
        if not bad_NH.any():
            bad_NH = ~(numbers_NC.abs() <= largest)
        bad_rows_N = bad_NH.any(dim=1)
        return NonFiniteError(
            what=f"{self.spec.kind} {direction.name.lower()} rows",
            bad_values=int(bad_NH.sum()),
            bad_rows=int(bad_rows_N.sum()),
            first_row=int(bad_rows_N.to(torch.int8).argmax()),
        )

    def _check_rows(self, x_NH: Tensor) -> None:
        if x_NH.ndim != 2 or x_NH.shape[1] != self.spec.width or not x_NH.is_floating_point():
            raise SpecError(
                "rows",
                f"{x_NH.dtype} {list(x_NH.shape)}",
                f"a float tensor [N, {self.spec.width}]",
                "pack valid rows only",
            )
        if self.spec.kind == "identity" and x_NH.dtype == torch.float64 and self.spec.dtype != "fp64":
            raise SpecError("rows", "float64", "at most float32, to stay lossless", "set the link's dtype to fp64")

    def _check_basis(self, direction: Direction, basis: Basis | None) -> None:
        if basis is None or self.spec.kind != "lowrank":
            return
        wanted = (self.spec.width, self.spec.columns(direction))
        if (basis.width, basis.rank) != wanted:
            name = self._basis_name(direction)
            raise SpecError("basis shape", [basis.width, basis.rank], f"{list(wanted)}, the link's {name}")

    def _basis_name(self, direction: Direction) -> str:
        return "Q_f" if self.spec.basis_direction(direction) == Direction.FORWARD else "Q_b"


def _bytes_of(numbers_NC: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, row-major, as writable bytes: no copy."""
    return numbers_NC.view(torch.uint8).flatten().numpy().data
