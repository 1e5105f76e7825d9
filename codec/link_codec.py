"""Rows to packets and back: the one place where tensors and bytes meet; no peer, tick or configuration here.

    encode:  x_NH --quantise--> numbers --as bytes--> packet          (the sender)
    decode:  packet --checked--> numbers --rebuild--> x'_NH           (the receiver)
    project: x_NH --quantise--> numbers --rebuild--> x'_NH            (what the receiver will see, without the bytes)

`identity`, `none` and plain bf16 coefficients are numbers as they are, in packets of format 1; all else goes through
`coefficients`.

Shape legend: N rows (valid tokens; padding never crosses a link), H hidden width, R rank, C numbers sent per row.
"""

import sys
from typing import Final

import torch
from torch import Tensor

from codec import products
from codec.basis import Basis
from codec.coefficients import (
    Coefficients,
    bad_values,
    coding_pair,
    from_payload,
    in_range,
    not_sendable,
    quantise,
    step_of,
)
from codec.errors import PacketError, ReferenceMismatch, SpecError
from codec.header import NO_REFERENCES, Element, Header
from codec.packet import BytesLike, Contents, Expected, pack, unpack
from codec.quantise import LARGEST_COEFFICIENT
from codec.reuse import References, ReuseRows
from codec.spec import Direction, LinkSpec, most_outliers, payload_bytes
from codec.zstd_auto import ZstdAuto

if sys.byteorder != "little":
    raise ImportError(
        f"codec packets are little-endian and written without swapping; this host is {sys.byteorder}-endian"
    )

TORCH_DTYPE: Final = {Element.BF16: torch.bfloat16, Element.FP32: torch.float32, Element.FP64: torch.float64}
# Steps within these, and scales within 2^+-100, keep everything that quantising multiplies normal in fp32.
SMALLEST_STEP, LARGEST_STEP = 1e-5, 1e5


class LinkCodec:
    """Both directions of one boundary, for either end of it.

    What arrives (h' for a row h; u = 2^-8 is the rounding of bf16):
      identity   h' = h, bit for bit.
      none       h' = h rounded to bf16 (nearest, ties to even): |h' - h| <= u |h| elementwise, for |h| >= 1.2e-38.
      lowrank    h' = y' D for y = h E, and by the quantiser, elementwise,
        bf16     |y' - y| <= u |y|
        int8     |y' - y| <= s / 2,  s <= 1.008 max|y| / 127, or s = 2^-100 if that is more; int4 the same with 7
        uniform  |y' - y| <= s step / 2,  s within 2^(+-1/8) of rms(h), or 2^-100 if that is more; twice that if
                 `stochastic`. With gradient_scale `packet` rms(h) is that of all rows together; with `reuse`, that of
                 the row when it first crossed. A |y| beyond 32767 s step arrives as that (never for an orthonormal
                 basis and a step above sqrt(H) / 30000, or, with `packet`, sqrt(N H) / 30000).
      each plus 1e-5 ||h|| ||E_r|| for the fp32 products, and the rebuilt row as much again times ||D||.
      outliers   h' = h, rounded to fp32.
    Backward, `straight_through` takes the same with Q_b; `exact` sends g D^T and applies E^T: up to the rounding it is
    the gradient of the network that has h -> h E D at this boundary.

    Values never depend on zstd. `encode` remembers, per direction, whether zstd pays, so one thread at a time encodes a
    direction, and a frame that is sent again is *kept* and not encoded again. `decode` and `project` remember nothing
    but what they stage with `rows`.

    `encode` and `decode` need at most the packet and twice the rows in fp32 (measured; above H / 2 columns with
    references, `encode` needs a third of the rows more). References take what `reuse.ReuseStore` says.

    On a GPU all arithmetic is done there; `encode` waits for it once, for the numbers that travel (with outliers on,
    again for which rows they are).
    """

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        self._zstd = {direction: ZstdAuto() for direction in Direction} if spec.zstd == "auto" else None

    def encode(
        self,
        x_NH: Tensor,
        direction: Direction,
        basis: Basis | None = None,
        *,
        rows: ReuseRows | None = None,
        seed: int = 0,
    ) -> bytes:
        """The packet for `x_NH`: any float dtype, device or strides; N = 0 is fine. Never more than `packet_bytes`.

        `rows` are the samples that the rows belong to, on a link with `reuse`: what crosses is staged there. `seed`
        decides stochastic rounding. Raises `NonFiniteError` for NaN, Inf, or values that leave the range on the way (by
        rounding to bf16, as coefficients beyond 1e30, or as rows of an rms beyond 2^100), with nothing staged, and
        `SpecError` for a tensor, basis or rows that do not fit the link.
        """
        self._check_rows(x_NH)
        self._check_reuse(rows, len(x_NH), direction)
        if self.spec.format(direction) == 1:
            numbers_NC = self._plain(x_NH, direction, basis).cpu().contiguous()
            self._check_range(x_NH, numbers_NC, direction)
            return self._sealed(_bytes_of(numbers_NC), self._contents(len(x_NH), direction, basis))
        basis = self._fitting(direction, basis)
        references = rows.references(basis.version, basis.rank) if rows is not None else None
        coded = quantise(self.spec, x_NH, direction, basis, references, seed)
        if references is not None and not coded.changes_fit(references):
            references, coded = None, quantise(self.spec, x_NH, direction, basis, None, seed)
        packet = self._packet(coded, direction, basis, references)
        if rows is not None:
            if not rows.hold(packet if references is not None else None) and references is not None:
                packet = self._packet(coded, direction, basis, None)  # as `encode_whole` could not make it later
            coded.stage(rows, basis.version)
        return packet

    def decode(
        self,
        packet: BytesLike,
        n_rows: int,
        direction: Direction,
        basis: Basis | None = None,
        *,
        rows: ReuseRows | None = None,
    ) -> Tensor:
        """The rows `x'_NH` of a packet: fp32 (fp64 for an fp64 link), on the basis' device, else on the CPU.

        `n_rows` is the N that the receiver knows from the microbatch's layout, `rows` their samples as at the sender.
        Raises `PacketError` for anything malformed, damaged or unexpected (before allocating for it), `BasisMismatch`
        for a sound packet of another version, `ReferenceMismatch` for one of other references, and `SpecError` for a
        basis or rows that do not fit the link. Whatever it raises, nothing is staged.
        """
        self._check_basis(direction, basis)
        self._check_reuse(rows, n_rows, direction)
        header, raw = unpack(packet, self._expected(n_rows, direction, basis))
        if self.spec.format(direction) == 1:
            element = self.spec.element(direction)
            numbers_NC = torch.empty(n_rows, header.columns, dtype=TORCH_DTYPE[element])
            _bytes_of(numbers_NC)[:] = raw
            if not in_range(numbers_NC, self._largest(numbers_NC)):
                raise bad_values()
            return self._rebuild(numbers_NC, direction, basis)
        basis = self._needed(direction, basis)
        coded = self._read(header, raw, direction, basis, rows)
        x_NH = coded.rebuild(direction, basis)
        if rows is not None:
            coded.stage(rows, basis.version)
        return x_NH

    def project(self, x_NH: Tensor, direction: Direction, basis: Basis | None = None, *, seed: int = 0) -> Tensor:
        """`decode(encode(x_NH))` without the bytes or references, on x's device: what the receiver will see.

        Raises as `encode`.
        """
        self._check_rows(x_NH)
        if self.spec.format(direction) == 1:
            numbers_NC = self._plain(x_NH, direction, basis)
            self._check_range(x_NH, numbers_NC, direction)
            return self._rebuild(numbers_NC, direction, basis)
        basis = self._fitting(direction, basis)
        return quantise(self.spec, x_NH, direction, basis, None, seed).rebuild(direction, basis)

    def encode_whole(self, rows: ReuseRows, basis: Basis | None) -> bytes:
        """The same values as the packet with changes that `encode` last made of these rows, without references.

        For a receiver that has lost its references. Only until the store is settled; stages nothing. Raises
        `SpecError` where there is no such packet.
        """
        basis, packet = self._needed(Direction.FORWARD, basis), rows.held()
        if packet is None:
            raise SpecError(
                "rows", "no packet with changes held", "rows encoded since the last settle", "retry the tick"
            )
        header, raw = unpack(packet, self._expected(rows.count, Direction.FORWARD, basis))
        coded = self._read(header, raw, Direction.FORWARD, basis, rows)
        return self._packet(coded, Direction.FORWARD, basis, None)

    def _packet(self, coded: Coefficients, direction: Direction, basis: Basis, references: References | None) -> bytes:
        parts = coded.parts(references)
        contents = self._contents(coded.rows, direction, basis, len(coded.outliers.places_O), references)
        return self._sealed(parts, contents)

    def _read(
        self, header: Header, raw: memoryview, direction: Direction, basis: Basis, rows: ReuseRows | None
    ) -> Coefficients:
        references = None
        if header.references != NO_REFERENCES:
            if not self.spec.reuse or direction != Direction.FORWARD:
                raise PacketError(
                    "references", f"{header.references:#010x}", "none, on a link or direction without reuse"
                )
            references = rows.references(basis.version, basis.rank) if rows is not None else None
            if references is None or references.checksum != header.references:
                raise ReferenceMismatch(header.references, references.checksum if references is not None else 0)
        return from_payload(self.spec, header, raw, direction, basis, references)

    def _sealed(self, raw: memoryview | list[memoryview], contents: Contents) -> bytes:
        shrunk = self._zstd[contents.direction].shrink(raw) if self._zstd is not None else None
        return pack(contents, raw, shrunk)

    def _plain(self, x_NH: Tensor, direction: Direction, basis: Basis | None) -> Tensor:
        """The numbers that travel in format 1, [N, C] in the link's element type."""
        x_NH, dtype = x_NH.detach(), TORCH_DTYPE[self.spec.element(direction)]
        if self.spec.kind != "lowrank":
            return x_NH.to(dtype)
        y_RN, _ = products.coefficients(x_NH, coding_pair(self.spec, direction, self._fitting(direction, basis))[0])
        return y_RN.to(dtype).T.contiguous()

    def _rebuild(self, numbers_NC: Tensor, direction: Direction, basis: Basis | None) -> Tensor:
        """What the numbers of format 1 mean: the rows [N, H], in fp32, or as they are for an identity link."""
        if self.spec.kind == "identity":
            return numbers_NC
        if self.spec.kind == "none":
            return numbers_NC.to(torch.float32)
        decoder_RH = coding_pair(self.spec, direction, self._needed(direction, basis))[1]
        numbers_NC = numbers_NC.to(decoder_RH.device, non_blocking=True)
        return products.rows(len(numbers_NC), decoder_RH, lambda part: numbers_NC[part].to(torch.float32))

    def _contents(
        self,
        rows: int,
        direction: Direction,
        basis: Basis | None,
        outliers: int = 0,
        references: References | None = None,
    ) -> Contents:
        columns = basis.rank if basis is not None and self.spec.kind == "lowrank" else None
        payload_bytes(self.spec, direction, rows, columns, outliers)  # refuses rows that one packet cannot hold
        return Contents(
            kind=self.spec.wire_kind,
            direction=direction,
            element=self.spec.element(direction),
            rows=rows,
            columns=self.spec.columns(direction) if columns is None else columns,
            basis_version=basis.version if basis is not None and self.spec.kind == "lowrank" else None,
            format=self.spec.format(direction),
            outliers=outliers,
            references=NO_REFERENCES if references is None else references.checksum,
        )

    def _expected(self, rows: int, direction: Direction, basis: Basis | None) -> Expected:
        own = self._contents(rows, direction, basis)
        return Expected(
            kind=own.kind,
            direction=direction,
            element=own.element,
            rows=rows,
            columns=own.columns,
            basis_version=own.basis_version,
            payload_bytes=lambda columns, outliers: payload_bytes(self.spec, direction, rows, columns, outliers),
            format=own.format,
            exact=own.element != Element.UNIFORM,
            most_columns=self.spec.columns(direction),
            most_outliers=most_outliers(self.spec, direction, rows),
        )

    def _needed(self, direction: Direction, basis: Basis | None) -> Basis:
        if basis is None:
            name = self._basis_name(direction)
            raise SpecError("basis", None, f"the link's {name}", "calibrate one before the first batch")
        return basis

    def _fitting(self, direction: Direction, basis: Basis | None) -> Basis:
        basis = self._needed(direction, basis)
        self._check_basis(direction, basis)
        return basis

    def _largest(self, numbers_NC: Tensor) -> float:
        return LARGEST_COEFFICIENT if self.spec.kind == "lowrank" else torch.finfo(numbers_NC.dtype).max

    def _check_range(self, x_NH: Tensor, numbers_NC: Tensor, direction: Direction) -> None:
        """Raises `NonFiniteError`. If the rows themselves are finite, it was their image that left the range."""
        largest = self._largest(numbers_NC)
        if not in_range(numbers_NC, largest):
            bad_NC = ~(numbers_NC.abs() <= largest)
            raise not_sendable(self.spec, direction, x_NH, bad_NC.to(x_NH.device))

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
        most = self.spec.columns(direction)
        if basis.width != self.spec.width or basis.rank > most:
            name = self._basis_name(direction)
            wanted = f"{self.spec.width} rows and at most {most} columns, the link's {name}"
            raise SpecError("basis shape", [basis.width, basis.rank], wanted)
        if self.spec.element(direction) == Element.UNIFORM:
            step = step_of(self.spec, direction, basis)
            if not SMALLEST_STEP <= step <= LARGEST_STEP:
                own = self.spec.basis_direction(direction) == direction
                advice = "fit the basis with a step" if own else "set the link's exact_step"
                raise SpecError("basis step", step, f"{SMALLEST_STEP}..{LARGEST_STEP}", advice)

    def _check_reuse(self, rows: ReuseRows | None, count: int, direction: Direction) -> None:
        if rows is None:
            return
        if not self.spec.reuse or self.spec.kind != "lowrank" or direction != Direction.FORWARD:
            raise SpecError("rows", "samples to reuse", "none, on a link or direction without reuse")
        if rows.count != count:
            raise SpecError("rows", f"samples of {rows.count} rows", f"{count}, as there are")

    def _basis_name(self, direction: Direction) -> str:
        return "Q_f" if self.spec.basis_direction(direction) == Direction.FORWARD else "Q_b"


def _bytes_of(numbers_NC: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, row-major, as writable bytes: no copy."""
    return numbers_NC.view(-1).view(torch.uint8).numpy().data
