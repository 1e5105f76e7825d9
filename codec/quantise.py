"""Coefficients to small integers with scales, and back: arithmetic on tensors, on their own device; no bytes here.

All quantisers give one int16 buffer [R + 1, N]: the integers with one coefficient a line, and each row's scale, as a
code, in the last line. One buffer, so that a GPU's numbers come to the host in one copy; a code beyond all scales says
that a row was not finite, so that nobody has to ask the device before.

    uniform    s = 2^(k/4) next to the row's rms, q = round(y / (s step)), |q| <= 32767; the code is k.
    int8, int4 s = max|y| / 127 (or 7), q = round(y / s); the code is s in bf16, rounded up so that |q| stays in range.
               bf16, because fp16 has not the range of gradients, and a power of two costs up to a bit of q.

Shape legend: N rows, H hidden width, R coefficients a row.
"""

import functools
from typing import Final

import torch
from torch import Tensor

from codec.header import Element

LARGEST_INTEGER: Final = 32767
LARGEST: Final = {Element.INT8: 127, Element.INT4: 7, Element.UNIFORM: LARGEST_INTEGER}
# |y' D| <= max|y'| R max||D_r||, with R <= 2^16 and ||D_r|| <= 2^10 (`basis.LONGEST`): coefficients within this limit
# can always be rebuilt in fp32 without overflow, so that one look at them settles it for both ends.
LARGEST_COEFFICIENT: Final = 1e30
# Codes k of the uniform scale: 2^-100 <= s <= 2^100, so that s, 1 / s and s times any sane step are normal in fp32.
SMALLEST_CODE, LARGEST_CODE = -400, 400
NOT_FINITE: Final = 32767  # a row's code if it holds NaN or Inf, or is beyond the largest scale


def rms_codes(norms_N: Tensor, width: int) -> Tensor:
    """int16 codes k_N of the scales 2^(k/4) next to the rows' rms, within a factor 2^(1/8) and at least 2^-100;
    `NOT_FINITE` where there is none."""
    k_N = (4.0 * torch.log2(norms_N / width**0.5)).round_()
    k_N = torch.where(k_N <= LARGEST_CODE, k_N.clamp(min=SMALLEST_CODE), NOT_FINITE)  # NaN compares false
    return k_N.to(torch.int16)


def packet_code(norms_N: Tensor, width: int) -> Tensor:
    """The code of the rms of all rows together, once for each row."""
    if not norms_N.numel():
        return norms_N.to(torch.int16)
    largest = norms_N.amax().clamp(min=torch.finfo(torch.float32).tiny)
    together = torch.linalg.vector_norm(norms_N / largest) * largest / norms_N.numel() ** 0.5
    return rms_codes(together[None], width).expand(norms_N.shape)


def scales(k_N: Tensor) -> Tensor:
    """2^(k/4), fp32, the same on every machine: a power of two put together from its bits, times one of four roots."""
    k_N = k_N.clamp(SMALLEST_CODE, LARGEST_CODE).to(torch.int32)
    return ((k_N >> 2) + 127 << 23).view(torch.float32) * _roots(k_N.device)[k_N & 3]


@functools.lru_cache
def _roots(device: torch.device) -> Tensor:
    """Kept, as moving them to a device waits for it."""
    return torch.tensor([2.0 ** (i / 4) for i in range(4)], dtype=torch.float32, device=device)


def uniform(y_RN: Tensor, k_N: Tensor, step: float, generator: torch.Generator | None = None) -> Tensor:
    """The buffer of q = round(y / (s step)), ties to even; with a generator up or down at random, with the right mean.

    Overwrites `y_RN`.
    """
    q_RN = y_RN.mul_(torch.reciprocal(scales(k_N) * step))
    if generator is None:
        q_RN = q_RN.round_()
    else:
        q_RN = q_RN.add_(torch.rand(q_RN.shape, generator=generator, device=q_RN.device)).floor_()
    return _buffer(q_RN.clamp_(-LARGEST_INTEGER, LARGEST_INTEGER), k_N)


def scaled(y_RN: Tensor, element: Element) -> Tensor:
    """The buffer of the int8 or int4 quantiser. Overwrites `y_RN`."""
    if not y_RN.numel():
        return _buffer(y_RN, y_RN.new_zeros(y_RN.shape[1], dtype=torch.int16))
    largest_N = torch.maximum(y_RN.amax(dim=0), -y_RN.amin(dim=0))
    finite_N = largest_N <= LARGEST_COEFFICIENT  # false for NaN, too
    exact_N = (largest_N / LARGEST[element]).clamp_(min=2.0**-100)
    bits_N = exact_N.view(torch.int32) + 0xFFFF >> 16  # up to the next bf16
    scale_N = (bits_N << 16).view(torch.float32)
    return _buffer(y_RN.div_(scale_N).round_(), torch.where(finite_N, bits_N, NOT_FINITE))


def row_scales(code_N: Tensor, element: Element, step: float) -> Tensor:
    """What each row's integers are multiples of: s step, or s."""
    if element == Element.UNIFORM:
        return scales(code_N) * step
    return (code_N.to(torch.int32) << 16).view(torch.float32)


def _buffer(q_RN: Tensor, code_N: Tensor) -> Tensor:
    buffer_SN = torch.empty(q_RN.shape[0] + 1, q_RN.shape[1], dtype=torch.int16, device=q_RN.device)
    buffer_SN[:-1] = q_RN
    buffer_SN[-1] = code_N
    return buffer_SN
