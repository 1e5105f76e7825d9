"""Rows in a basis, as integers with scales and the outliers beside: made of rows, made of a payload, made back to rows.

Here the arithmetic (`quantise`), the bytes (`layout`) and the references (`reuse`) of one packet of format 2 meet. No
header and no zstd.

Shape legend: N rows, H hidden width, R rank, S = R + 1.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codec import layout, products
from codec import quantise as quantisers
from codec.basis import Basis
from codec.entropy import Reader
from codec.errors import NonFiniteError, PacketError
from codec.header import Direction, Element, Header
from codec.layout import Outliers
from codec.quantise import LARGEST, LARGEST_CODE, LARGEST_COEFFICIENT, NOT_FINITE
from codec.reuse import NO_ROW, References, ReuseRows
from codec.spec import LinkSpec, most_outliers


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What one packet carries. `numbers` is the buffer int16 [R + 1, N] of `quantise`, or bf16 [N, R], on the device of
    the rows; `host` the same memory on the CPU. Outliers have the code `NO_ROW` there, and zeros."""

    spec: LinkSpec
    element: Element
    step: float
    numbers: Tensor
    host: NDArray[Any]
    outliers: Outliers
    one_scale: bool  # for all rows of the packet

    @property
    def rows(self) -> int:
        """N."""
        return len(self.host) if self.element == Element.BF16 else len(self.host.T)

    def changes_fit(self, references: References) -> bool:
        """Whether the changes from these references can travel."""
        return layout.changes_fit(self.host[:-1], references)

    def parts(self, references: References | None) -> list[memoryview]:
        """The payload, in parts of one statistic each. `references` are those of all rows."""
        parts = self.outliers.parts()
        if self.element == Element.BF16:
            return [*parts, layout.view_bytes(self.host)]
        if self.element != Element.UNIFORM:
            return [*parts, *layout.integer_parts(self.host, self.element)]
        return [*parts, *layout.uniform_parts(self.host, _without(references, self.outliers), self.one_scale)]

    def rebuild(self, direction: Direction, basis: Basis) -> Tensor:
        """The rows x'_NH in fp32, on the basis' device."""
        _, decoder_RH = coding_pair(self.spec, direction, basis)
        numbers = self.numbers.to(decoder_RH.device, non_blocking=True)
        if self.element == Element.BF16:
            x_NH = products.rows(self.rows, decoder_RH, lambda part: numbers[part].to(torch.float32))
        else:
            scale_N = quantisers.row_scales(numbers[-1], self.element, self.step)
            x_NH = products.rows(
                self.rows, decoder_RH, lambda part: numbers[:-1, part].to(torch.float32).mul_(scale_N[part]).T
            )
        if len(self.outliers.places_O):
            places = torch.from_numpy(self.outliers.places_O).to(x_NH.device)
            x_NH[places] = torch.from_numpy(self.outliers.rows_OH.copy()).to(x_NH.device)
        return x_NH

    def stage(self, rows: ReuseRows, version: int) -> None:
        """Remember the integers, for the next pass over these rows."""
        rows.stage(version, self.host[:-1], self.host[-1])


def quantise(
    spec: LinkSpec, x_NH: Tensor, direction: Direction, basis: Basis, references: References | None, seed: int
) -> Coefficients:
    """The coefficients of rows; rows with a reference take its scale. Raises `NonFiniteError`."""
    element, step = spec.element(direction), step_of(spec, direction, basis)
    encoder_RH, _ = coding_pair(spec, direction, basis)
    x_NH, wants_norms = x_NH.detach(), element == Element.UNIFORM or spec.has_outliers(direction)
    y_RN, norms_N = products.coefficients(x_NH, encoder_RH, wants_norms)
    outliers, places = _choose_outliers(spec, direction, x_NH, norms_N)
    y_RN[:, places] = 0.0
    if element == Element.BF16:
        numbers = y_RN.to(torch.bfloat16).T.contiguous()
    elif element == Element.UNIFORM:
        assert norms_N is not None
        norms_N[places] = 0.0
        k_N = _codes(spec, direction, norms_N, references)
        numbers = quantisers.uniform(y_RN, k_N, step, _generator(spec, direction, seed, y_RN.device))
    else:
        numbers = quantisers.scaled(y_RN, element)
    if element != Element.BF16:
        numbers[-1, places] = int(NO_ROW)
    coded = Coefficients(spec, element, step, numbers, _on_host(numbers), outliers, has_one_scale(spec, direction))
    bad_N = _out_of_range(coded)
    if bad_N is not None:
        raise not_sendable(spec, direction, x_NH.to(torch.float32), torch.from_numpy(bad_N).to(x_NH.device)[:, None])
    return coded


def from_payload(
    spec: LinkSpec, header: Header, raw: memoryview, direction: Direction, basis: Basis, references: References | None
) -> Coefficients:
    """The coefficients that a payload holds. Raises `PacketError` for what no sender can have written."""
    element, reader = spec.element(direction), Reader(raw)
    outliers = layout.read_outliers(reader, header.outliers, header.rows, spec.width)
    if element == Element.BF16:
        host = reader.take(2 * header.rows * basis.rank).view(np.int16).reshape(-1, basis.rank).copy()
        host[outliers.places_O] = 0
        numbers = torch.from_numpy(host).view(torch.bfloat16)
    else:
        if element == Element.UNIFORM:
            references = _without(references, outliers)
            host = layout.read_uniform(reader, basis.rank, header.rows, references, has_one_scale(spec, direction))
        else:
            host = layout.read_integers(reader, element, basis.rank, header.rows)
        host[:, outliers.places_O] = 0
        host[-1, outliers.places_O] = NO_ROW
        numbers = torch.from_numpy(host)
    reader.close()
    step, one_scale = step_of(spec, direction, basis), has_one_scale(spec, direction)
    coded = Coefficients(spec, element, step, numbers, host, outliers, one_scale)
    if _out_of_range(coded) is not None:
        raise bad_values()
    return coded


def has_one_scale(spec: LinkSpec, direction: Direction) -> bool:
    """Whether the step is relative to the packet's rms, and not to each row's."""
    return spec.gradient_scale == "packet" and direction == Direction.BACKWARD


def step_of(spec: LinkSpec, direction: Direction, basis: Basis) -> float:
    """The uniform quantiser's step. Gradients that go back on the activations' basis (`exact`) have the link's own one,
    relative to the rms length of D's rows, which are not of length 1 in an oblique pair."""
    if spec.basis_direction(direction) == direction:
        return basis.step
    return spec.exact_step * basis.decoder_rms


def coding_pair(spec: LinkSpec, direction: Direction, basis: Basis) -> tuple[Tensor, Tensor]:
    """(E^T, D), both R x H and contiguous: what the sender and the receiver multiply by. `exact` sends gradients the way
    back."""
    encoder_RH, decoder_RH = basis.encoder_RH, basis.decoder_RH.contiguous()
    return (encoder_RH, decoder_RH) if spec.basis_direction(direction) == direction else (decoder_RH, encoder_RH)


def not_sendable(spec: LinkSpec, direction: Direction, x_NH: Tensor, bad_NC: Tensor) -> NonFiniteError:
    """The error that says where. If the rows are finite, it was their image that left the range: `bad_NC`."""
    bad_NH = ~torch.isfinite(x_NH)
    if not bad_NH.any():
        bad_NH = bad_NC
    bad_rows_N = bad_NH.any(dim=1)
    return NonFiniteError(
        what=f"{spec.kind} {direction.name.lower()} rows",
        bad_values=int(bad_NH.sum()),
        bad_rows=int(bad_rows_N.sum()),
        first_row=int(bad_rows_N.to(torch.int8).argmax()),
    )


def bad_values() -> PacketError:
    """For numbers that can be read but mean nothing that may be sent."""
    return PacketError("values", "NaN, Inf or out of range", "finite values, which is all that a sender may send")


def _choose_outliers(
    spec: LinkSpec, direction: Direction, x_NH: Tensor, norms_N: Tensor | None
) -> tuple[Outliers, Tensor | slice]:
    """The outliers, and their places as an index on the rows' device."""
    most = most_outliers(spec, direction, len(x_NH))
    if most and norms_N is not None:
        eligible_N = torch.isfinite(norms_N) & (norms_N > spec.outliers * norms_N.median())
        places = torch.nonzero(eligible_N)[:, 0]
        if len(places) > most:
            places = places[norms_N[places].topk(most).indices].sort().values
        if len(places):
            return Outliers(places.cpu().numpy(), x_NH[places].to(torch.float32).cpu().numpy()), places
    return Outliers(np.empty(0, np.int64), np.empty((0, spec.width), np.float32)), slice(0, 0)


def _codes(spec: LinkSpec, direction: Direction, norms_N: Tensor, references: References | None) -> Tensor:
    if has_one_scale(spec, direction):
        return quantisers.packet_code(norms_N, spec.width)
    k_N = quantisers.rms_codes(norms_N, spec.width)
    if references is None:
        return k_N
    held_N = torch.from_numpy(references.code_N).to(k_N.device, non_blocking=True)
    return torch.where((held_N != int(NO_ROW)) & (k_N != NOT_FINITE), held_N, k_N)


def _generator(spec: LinkSpec, direction: Direction, seed: int, device: torch.device) -> torch.Generator | None:
    if not spec.stochastic or direction != Direction.BACKWARD:
        return None
    return torch.Generator(device).manual_seed(seed)


def _without(references: References | None, outliers: Outliers) -> References | None:
    """The references of the rows that travel as coefficients."""
    if references is None or not len(outliers.places_O):
        return references
    code_N = references.code_N.copy()
    code_N[outliers.places_O] = NO_ROW
    return replace(references, code_N=code_N)


def _on_host(numbers: Tensor) -> NDArray[Any]:
    numbers = numbers.cpu().contiguous()
    host: NDArray[Any] = (numbers.view(torch.int16) if numbers.dtype == torch.bfloat16 else numbers).numpy()
    return host


def _out_of_range(coded: Coefficients) -> NDArray[np.bool_] | None:
    """Which rows hold what cannot be sent: NaN, Inf, or coefficients beyond 1e30. None if none do."""
    host = coded.host
    if not host.size:
        return None
    if coded.element == Element.BF16:
        numbers_NR = torch.from_numpy(host).view(torch.bfloat16)
        if in_range(numbers_NR, LARGEST_COEFFICIENT):
            return None
        bad_N: NDArray[np.bool_] = (~(numbers_NR.abs() <= LARGEST_COEFFICIENT)).any(dim=1).numpy()
        return bad_N
    limit = 1.01 * LARGEST_COEFFICIENT  # the sender's products and roundings are not the receiver's
    most: Any = layout.largest(host[:-1]) if coded.element == Element.UNIFORM else LARGEST[coded.element]
    if coded.element == Element.UNIFORM:
        highest = int(host[-1].max())
        if highest <= LARGEST_CODE and most * 2.0 ** (highest / 4) * coded.step <= limit:
            return None
        most = np.maximum(host[:-1].max(axis=0), -host[:-1].min(axis=0))  # not all may stand in the row of that scale
    scale_N = quantisers.row_scales(torch.from_numpy(host[-1]), coded.element, coded.step).double().numpy()
    fine_N: NDArray[np.bool_] = (host[-1] != NOT_FINITE) & (most * scale_N <= limit) & (scale_N >= 0)
    return None if fine_N.all() else ~fine_N


def in_range(numbers: Tensor, largest: float) -> bool:
    """One pass without a copy. Written so that NaN, which compares false with everything, is out of range."""
    if numbers.numel() == 0:
        return True
    low, high = torch.aminmax(numbers)
    return bool((low >= -largest) & (high <= largest))
