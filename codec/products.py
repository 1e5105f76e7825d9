"""The two products of a low-rank link, rows to coefficients and back; no quantiser, no bytes.

Taken in parts of a few hundred rows: a part's norms and its product then read it from the cache, rows in another type
are never held as a whole in fp32, and MKL is as fast on such parts as on all rows at once (measured). A GPU takes all
rows at once.

Shape legend: N rows, H hidden width, R rank.
"""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

_PART_BYTES: Final = 3 << 20  # of fp32 rows: measured; half or twice as much is within 5 %
# Squares of an fp32 norm outside this range, or parts of them, may have left fp32 on the way.
_TRUSTED_NORMS: Final = (1e-14, 1e14)


def coefficients(x_NH: Tensor, encoder_RH: Tensor, norms: bool = False) -> tuple[Tensor, Tensor | None]:
    """(y_RN = (x E)^T from E^T, and if asked for the rows' norms), fp32, of rows in any float type and strides."""
    y_RN = x_NH.new_empty(len(encoder_RH), len(x_NH), dtype=torch.float32)
    norms_N = x_NH.new_empty(len(x_NH), dtype=torch.float32) if norms else None
    with torch.no_grad(), torch.autocast(x_NH.device.type, enabled=False):
        for part in _parts(x_NH):
            part_NH = x_NH[part].to(torch.float32).contiguous()
            if norms_N is not None:
                norms_N[part] = row_norms(part_NH)
            y_RN[:, part] = encoder_RH @ part_NH.T
    return y_RN, norms_N


def rows(count: int, decoder_RH: Tensor, coefficients_NR: Callable[[slice], Tensor]) -> Tensor:
    """x_NH = y D, fp32, of the fp32 coefficients that the caller gives for a slice of the rows."""
    x_NH = torch.empty(count, decoder_RH.shape[1], device=decoder_RH.device)
    with torch.no_grad(), torch.autocast(x_NH.device.type, enabled=False):
        for part in _parts(x_NH):
            torch.mm(coefficients_NR(part), decoder_RH, out=x_NH[part])
    return x_NH


def row_norms(x_NH: Tensor) -> Tensor:
    """||x_i|| of fp32 rows, right for all finite rows that have one in fp32; NaN or Inf for the others."""
    norms_N: Tensor = torch.linalg.vector_norm(x_NH, dim=1)
    low, high = _TRUSTED_NORMS
    if not norms_N.numel():
        return norms_N
    if x_NH.device.type == "cpu":  # elsewhere asking would wait for the device; there it is always done over
        smallest, largest = torch.aminmax(norms_N)
        if smallest > low and largest < high:
            return norms_N
    suspect_N = ~((norms_N > low) & (norms_N < high))
    if x_NH.device.type == "cpu":
        norms_N[suspect_N] = _careful_norms(x_NH[suspect_N])
        return norms_N
    return torch.where(suspect_N, _careful_norms(x_NH), norms_N)


def _careful_norms(x_NH: Tensor) -> Tensor:
    """Norms of rows scaled to a largest entry of 1, scaled back."""
    largest_N = torch.linalg.vector_norm(x_NH, ord=float("inf"), dim=1).clamp_(min=torch.finfo(torch.float32).tiny)
    norms_N: Tensor = torch.linalg.vector_norm(x_NH / largest_N[:, None], dim=1) * largest_N
    return norms_N


def _parts(x_NH: Tensor) -> Iterator[slice]:
    count, width = x_NH.shape
    size = max(16, _PART_BYTES // (4 * width)) if x_NH.device.type == "cpu" else max(count, 1)
    for start in range(0, count, size):
        yield slice(start, start + size)
