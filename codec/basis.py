"""The basis of a low-rank link: what it is and how it travels; how one is fitted or kept fresh lives in codec/fit.py.

A basis is a pair: the encoder E (H x R) makes R coefficients of a row, y = h E, and the decoder D (R x H) makes a row
of them, h' = y D, with D E = I, so that h -> h E D is a projection. An orthonormal Q is the case E = Q, D = Q^T; a pair
fitted in the loss' metric is oblique. Columns stand in eigenvalue order, so that any prefix is a good smaller basis.

Shape legend: H hidden width, R rank.
"""

import hashlib
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Self

import torch
from torch import Tensor

from codec.errors import SpecError
from codec.header import NO_BASIS

# Rounding to fp32 leaves |D E - I| below 1e-6 for an orthonormal pair, and a thousand times the product of the norms'
# 6e-8 for the most oblique one admitted; a pair off by more than this never was one.
PAIR_TOLERANCE: Final = 1e-4
# Longest column of E and row of D. A fit stays below 100; a stranger's pair must not drive coefficients or rows, which
# are bounded on their way in, out of fp32 on their way out.
LONGEST: Final = 1024.0
# Rounding to bf16 moves an entry by up to 2^-9 of itself. A decoder that is the pseudo-inverse within that needs no
# bytes of its own.
_BF16_ROUNDING: Final = 2.0**-8


@dataclass(frozen=True, eq=False)
class Basis:
    """One version of a boundary's basis in one direction: `encoder_HR` and `decoder_RH`, fp32, R <= H, D E = I.

    `step` is the uniform quantiser's step, in coefficients of a row of rms 1; 0 where that quantiser is not used.
    Both ends of a link hold the same version or the packet is refused. Two bases are the same if their `digest`s are.
    Raises `SpecError` for tensors that are no such thing.
    """

    version: int
    encoder_HR: Tensor
    decoder_RH: Tensor
    step: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.version, bool) or not isinstance(self.version, int) or not 0 <= self.version < NO_BASIS:
            raise SpecError("basis version", self.version, f"an integer in 0..{NO_BASIS - 1}")
        e_HR, d_RH = self.encoder_HR, self.decoder_RH
        if e_HR.ndim != 2 or e_HR.dtype != torch.float32 or not 1 <= e_HR.shape[1] <= e_HR.shape[0]:
            raise SpecError("basis encoder", f"{e_HR.dtype} {list(e_HR.shape)}", "torch.float32 [H, R], 1 <= R <= H")
        if d_RH.dtype != torch.float32 or d_RH.shape != e_HR.T.shape:
            raise SpecError("basis decoder", f"{d_RH.dtype} {list(d_RH.shape)}", f"torch.float32 {list(e_HR.T.shape)}")
        if not 0.0 <= self.step < float("inf"):
            raise SpecError("basis step", self.step, "a finite number >= 0")
        longest = float(torch.maximum(e_HR.norm(dim=0), d_RH.norm(dim=1)).max())
        if not longest <= LONGEST:  # written so that NaN is refused too
            raise SpecError("longest column of a basis", longest, f"<= {LONGEST}", "fit it with a larger ridge")
        error = pair_error(e_HR, d_RH)
        if not error <= PAIR_TOLERANCE:
            raise SpecError("basis max |D E - I|", error, f"<= {PAIR_TOLERANCE}", "make it with from_wire or fit_pair")

    @classmethod
    def orthonormal(cls, version: int, q_HR: Tensor, step: float = 0.0) -> Self:
        """E = Q, D = Q^T."""
        return cls(version, q_HR, q_HR.T.contiguous(), step)

    @classmethod
    def from_wire(cls, version: int, encoder_HR: Tensor, decoder_RH: Tensor | None, step: float = 0.0) -> Self:
        """The basis that each end makes of the bf16 tensors that travel: the same E, and the same D to fp32 rounding.

        bf16 leaves D E off the identity, so D is corrected: D <- (D E)^-1 D in fp64; without one, D = pinv(E).
        Raises `SpecError`, also where D E cannot be inverted.
        """
        e_HR = encoder_HR.detach().to("cpu", torch.float64)
        d_RH = e_HR.T if decoder_RH is None else decoder_RH.detach().to("cpu", torch.float64)
        if e_HR.ndim != 2 or d_RH.shape != e_HR.T.shape:
            raise SpecError("basis tensors", f"{list(e_HR.shape)} and {list(d_RH.shape)}", "[H, R] and [R, H]")
        gram_RR = d_RH @ e_HR
        solved_RH, info = torch.linalg.solve_ex(gram_RR, d_RH)
        if int(info) != 0:
            raise SpecError("basis D E", "a singular matrix", "one near the identity", "keep the version before")
        return cls(version, e_HR.to(torch.float32), solved_RH.to(torch.float32), step)

    def to_wire(self) -> tuple[Tensor, Tensor | None]:
        """(E, D) in bf16; None for a D that is the pseudo-inverse of E within that rounding.

        Not idempotent: who hands a version on hands on the tensors it came in, and uses `from_wire` of them itself.
        """
        encoder_HR = self.encoder_HR.detach().cpu().to(torch.bfloat16)
        inverse_RH = torch.linalg.pinv(self.encoder_HR.detach().to("cpu", torch.float64))
        decoder_RH = self.decoder_RH.detach().cpu()
        off = (decoder_RH - inverse_RH).abs().max()
        plain = off <= _BF16_ROUNDING * inverse_RH.abs().max()
        return encoder_HR, None if plain else decoder_RH.to(torch.bfloat16)

    def prefix(self, rank: int) -> Self:
        """The first `rank` columns, the best that can be kept of this basis at that rank; same version and step."""
        if not 1 <= rank <= self.rank:
            raise SpecError("basis prefix", rank, f"an integer in 1..{self.rank}")
        return replace(self, encoder_HR=self.encoder_HR[:, :rank], decoder_RH=self.decoder_RH[:rank])

    def to(self, device: torch.device | str) -> Self:
        """The same basis with its tensors on `device`."""
        return replace(self, encoder_HR=self.encoder_HR.to(device), decoder_RH=self.decoder_RH.to(device))

    @property
    def width(self) -> int:
        return self.encoder_HR.shape[0]

    @property
    def rank(self) -> int:
        return self.encoder_HR.shape[1]

    @cached_property
    def encoder_RH(self) -> Tensor:
        """E^T, contiguous: how a sender multiplies by it."""
        return self.encoder_HR.T.contiguous()

    @cached_property
    def decoder_rms(self) -> float:
        """The rms length of D's rows: 1 for an orthonormal pair."""
        return float(self.decoder_RH.norm() / self.rank**0.5)

    def digest(self) -> str:
        """SHA-256, in hex, over version, shape, step and the little-endian fp32 bytes: equal if and only if they are."""
        digest = hashlib.sha256(struct.pack("<IIId", self.version, self.width, self.rank, self.step))
        for tensor in (self.encoder_HR, self.decoder_RH):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 whatever the inputs' float type, without a graph and untouched by a surrounding autocast."""
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        return a.to(torch.float32) @ b.to(torch.float32)


def pair_error(encoder_HR: Tensor, decoder_RH: Tensor) -> float:
    """Largest entry of |D E - I|, in fp64; NaN if the pair holds one."""
    product_RR = decoder_RH.detach().to(torch.float64) @ encoder_HR.detach().to(torch.float64)
    return float((product_RR - torch.eye(len(product_RR), dtype=torch.float64, device=product_RR.device)).abs().max())


def orthonormality_error(q_HR: Tensor) -> float:
    """Largest entry of |Q^T Q - I|, in fp64; NaN if Q holds one."""
    return pair_error(q_HR, q_HR.T)
