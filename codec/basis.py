"""The basis of a low-rank link: what it is, how it is fitted, how it is kept fresh; no bytes on the wire here.

A basis Q (H x R, orthonormal columns in eigenvalue order) spans the R directions of the hidden stream that cross the
link. It is fitted once with `calibrate`. Later each sender accumulates `sketch`es, V = sum_i w_i h_i (h_i^T Q) = C Q
with C the weighted second moment, and `orthonormalise(V)` is the next basis: one step of subspace iteration, warm-
started from the current basis, at the price of H x R numbers (the power iteration of PowerSGD, Vogels et al. 2019,
applied to activations).

Shape legend: N rows (tokens), H hidden width, R rank. Everything is deterministic, on one machine, given its arguments.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from codec.errors import SpecError
from codec.header import NO_BASIS

# Rounding fp64 columns to fp32 leaves |Q^T Q - I| near 1e-7; a basis off by more than this was never orthonormal.
ORTHONORMAL_TOLERANCE: Final = 1e-4
# A sketch column comes in fp32 (eps 1.2e-7). What is left of it outside the columns before it, if less than this share
# of its length, is rounding noise and no direction.
_INDEPENDENT_SHARE: Final = 1e-6


@dataclass(frozen=True, eq=False)
class Basis:
    """One version of a boundary's basis in one direction: `q_HR`, fp32, orthonormal columns, R <= H.

    Both ends of a link hold the same version or the packet is refused. Two bases are the same if their `digest`s are.
    Raises `SpecError` for a tensor that is no such thing.
    """

    version: int
    q_HR: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.version, bool) or not isinstance(self.version, int) or not 0 <= self.version < NO_BASIS:
            raise SpecError("basis version", self.version, f"an integer in 0..{NO_BASIS - 1}")
        q_HR = self.q_HR
        if q_HR.ndim != 2 or q_HR.dtype != torch.float32 or not 1 <= q_HR.shape[1] <= q_HR.shape[0]:
            raise SpecError("basis tensor", f"{q_HR.dtype} {list(q_HR.shape)}", "torch.float32 [H, R] with 1 <= R <= H")
        error = orthonormality_error(q_HR)
        if not error <= ORTHONORMAL_TOLERANCE:  # written so that NaN is refused too
            raise SpecError(
                "basis max |Q^T Q - I|", error, f"<= {ORTHONORMAL_TOLERANCE}", "pass it through orthonormalise"
            )

    @property
    def width(self) -> int:
        return self.q_HR.shape[0]

    @property
    def rank(self) -> int:
        return self.q_HR.shape[1]

    def digest(self) -> str:
        """SHA-256, in hex, over version, shape and the little-endian fp32 bytes: equal exactly if the bases are."""
        head = struct.pack("<III", self.version, self.width, self.rank)
        body = self.q_HR.detach().cpu().contiguous().numpy()
        return hashlib.sha256(head + body.tobytes()).hexdigest()


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 whatever the inputs' float type, without a graph and untouched by a surrounding autocast."""
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        return a.to(torch.float32) @ b.to(torch.float32)


def orthonormality_error(q_HR: Tensor) -> float:
    """Largest entry of |Q^T Q - I|, in fp64; NaN if Q holds one."""
    q_HR = q_HR.detach().to(torch.float64)
    gram_RR = q_HR.T @ q_HR
    return float((gram_RR - torch.eye(gram_RR.shape[0], dtype=torch.float64, device=gram_RR.device)).abs().max())


def orthonormalise(v_HR: Tensor) -> Tensor:
    """The next basis `q_HR` (fp32, on v's device) from an accumulated sketch `v_HR`.

    Columns come in descending order of V's singular values, which for V = C Q tend to the eigenvalues of C (the order
    matters to quantisers: an arbitrary rotation of the same span costs them half as many bytes again). Each column's
    sign is fixed by its largest entry, so that versions can be compared by eye. Where V has fewer than R independent
    columns, the rest is completed with coordinate axes, orthogonalised. Computed in fp64 on the CPU.

    Raises `SpecError` for a V that is not finite or not [H, R] with 1 <= R <= H.
    """
    if v_HR.ndim != 2 or not v_HR.is_floating_point() or not 1 <= v_HR.shape[1] <= v_HR.shape[0]:
        raise SpecError("sketch", f"{v_HR.dtype} {list(v_HR.shape)}", "a float tensor [H, R] with 1 <= R <= H")
    exact_HR = v_HR.detach().to("cpu", torch.float64)
    if not torch.isfinite(exact_HR).all():
        raise SpecError("sketch", "NaN or Inf entries", "finite entries", "drop this sketch and keep the old basis")
    span_HK = _independent_span(exact_HR)
    rotation_KK, _, _ = torch.linalg.svd(span_HK.T @ exact_HR, full_matrices=False)
    ordered_HK = _fix_signs(span_HK @ rotation_KK)
    return _complete(ordered_HK, exact_HR.shape[1]).to(v_HR.device, torch.float32)


def _independent_span(v_HR: Tensor) -> Tensor:
    """Orthonormal `q_HK` with the span of `v_HR`, K <= R: QR by Gram-Schmidt, leaving out dependent columns.

    `torch.linalg.qr` would keep a slot for each dependent column and fill it with rounding noise, which then takes
    its share of the columns that follow. Columns are judged by their own length: a direction with a millionth of the
    first one's energy is still a direction.
    """
    height, columns = v_HR.shape
    q_HK = v_HR.new_empty(height, columns)
    kept = 0
    for v_H in v_HR.T:
        largest = v_H.abs().max()
        if largest == 0:
            continue
        v_H = v_H / largest  # so that squaring neither overflows nor underflows
        v_H = _orthogonal_part(v_H / v_H.norm(), q_HK[:, :kept])
        rest = v_H.norm()
        if rest > _INDEPENDENT_SHARE:
            q_HK[:, kept] = _orthogonal_part(v_H / rest, q_HK[:, :kept])
            q_HK[:, kept] /= q_HK[:, kept].norm()
            kept += 1
    return q_HK[:, :kept]


def _orthogonal_part(v_H: Tensor, q_HK: Tensor) -> Tensor:
    return v_H - q_HK @ (q_HK.T @ v_H)


def _fix_signs(q_HK: Tensor) -> Tensor:
    """Each column with its largest entry positive."""
    largest_1K = q_HK.gather(0, q_HK.abs().argmax(dim=0, keepdim=True)) if q_HK.shape[1] else q_HK[:1]
    return torch.where(largest_1K < 0, -q_HK, q_HK)


def _complete(q_HK: Tensor, columns: int) -> Tensor:
    """`q_HK` with as many further orthonormal columns as it takes to have `columns` of them.

    Each is the coordinate axis that the columns so far cover least. Of axes covered alike the first is taken, with a
    margin above rounding, so that another machine's rounding picks the same one.
    """
    while q_HK.shape[1] < columns:
        uncovered_H = 1.0 - q_HK.square().sum(dim=1)
        axis = int((uncovered_H >= uncovered_H.max() - 1e-6).to(torch.int8).argmax())
        v_H = q_HK.new_zeros(q_HK.shape[0])
        v_H[axis] = 1.0
        for _ in range(2):  # once loses digits when little is left; twice is enough (Kahan and Parlett)
            v_H = _orthogonal_part(v_H, q_HK)
            v_H = v_H / v_H.norm()
        q_HK = torch.cat((q_HK, v_H[:, None]), dim=1)
    return q_HK


def calibrate(rows_NH: Tensor, rank: int, weights_N: Tensor | None = None) -> Tensor:
    """The best basis for these rows: `q_HR`, fp32, the top `rank` eigenvectors of sum_i w_i h_i h_i^T.

    Among all orthonormal Q of that rank it leaves the least weighted squared error sum_i w_i ||h_i - Q Q^T h_i||^2
    (Eckart-Young). The second moment is not centred. Where fewer than `rank` eigenvalues are above rounding, the rest
    is completed as in `orthonormalise`. fp64 inside: H = 1536 takes seconds on a CPU, once before training.

    Raises `SpecError` for wrong shapes, non-finite rows or weights, or negative weights.
    """
    _check_rows(rows_NH, weights_N)
    width = rows_NH.shape[1]
    if not 1 <= rank <= width:
        raise SpecError("calibration rank", rank, f"an integer in 1..{width}")
    h_NH = rows_NH.detach().to(torch.float64)
    weighted_NH = h_NH if weights_N is None else h_NH * weights_N.to(h_NH)[:, None]
    moment_HH = weighted_NH.T @ h_NH
    if not torch.isfinite(moment_HH).all() or (weights_N is not None and bool((weights_N < 0).any())):
        raise SpecError("calibration rows", "non-finite values or negative weights", "finite rows, weights >= 0")
    eigenvalues_H, eigenvectors_HH = torch.linalg.eigh(moment_HH)
    top_R = eigenvalues_H.flip(0)[:rank]
    top_HR = eigenvectors_HH.flip(1)[:, :rank]
    noise = eigenvalues_H[-1] * width * torch.finfo(torch.float64).eps
    return orthonormalise(top_HR * torch.where(top_R > noise, top_R, 0.0)).to(rows_NH.device)


def sketch(h_NH: Tensor, q_HR: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """`v_HR` = sum_i w_i h_i (h_i^T Q), fp32: what a sender accumulates towards the next basis.

    Sketches taken with the same Q add up, over microbatches and over replicas. No row gives zeros.
    """
    _check_rows(h_NH, weights_N)
    y_NR = matmul_fp32(h_NH, q_HR)
    if weights_N is not None:
        y_NR = y_NR * weights_N.detach().to(y_NR)[:, None]
    return matmul_fp32(h_NH.T, y_NR)


def captured_share(h_NH: Tensor, q_HR: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Share of the rows' weighted energy inside the basis, sum_i w_i ||Q^T h_i||^2 / sum_i w_i ||h_i||^2, in 0..1.

    A scalar fp64 tensor on h's device, so that measuring does not make a GPU wait. Rows without energy lose nothing:
    share 1. Judge a codec by its effect on log-probs and reward, too: one massive direction may hold all the energy.
    """
    _check_rows(h_NH, weights_N)
    inside_N = torch.linalg.vector_norm(matmul_fp32(h_NH, q_HR), dim=1, dtype=torch.float64).square()
    total_N = torch.linalg.vector_norm(h_NH.detach(), dim=1, dtype=torch.float64).square()
    if weights_N is not None:
        inside_N = inside_N * weights_N.detach().to(inside_N)
        total_N = total_N * weights_N.detach().to(total_N)
    inside, total = inside_N.sum(), total_N.sum()
    return torch.where(total > 0, inside / total, 1.0).clamp(max=1.0)


def overlap(q1_HR: Tensor, q2_HS: Tensor) -> Tensor:
    """Mean squared cosine of the principal angles between two orthonormal spans, ||Q1^T Q2||_F^2 / min(R, S).

    A scalar fp64 tensor: 1 if one span holds the other, 0 if they are orthogonal, about max(R, S) / H for random ones.
    """
    if q1_HR.shape[0] != q2_HS.shape[0]:
        raise SpecError("overlap heights", f"{q1_HR.shape[0]} and {q2_HS.shape[0]}", "two bases of one width")
    q1_HR, q2_HS = q1_HR.detach().to(torch.float64), q2_HS.detach().to(torch.float64)
    return (q1_HR.T @ q2_HS).square().sum() / min(q1_HR.shape[1], q2_HS.shape[1])


def rms_weights(h_NH: Tensor) -> Tensor:
    """`weights_N` = 1 / mean(h^2), fp32: each row as the next layer's RMSNorm sees it.

    Without them a few massive tokens decide the fit, and the next layer divides exactly those away. A zero row has no
    direction and weighs 0; rows too small for 1 / mean(h^2) to be an fp32 number weigh as the smallest that has one.
    """
    _check_rows(h_NH, None)
    root_N = torch.linalg.vector_norm(h_NH.detach(), dim=1, dtype=torch.float64)
    mean_square_N = root_N.square() / h_NH.shape[1]
    smallest = torch.finfo(torch.float32).tiny
    return torch.where(root_N > 0, 1.0 / mean_square_N.clamp(min=smallest), 0.0).to(torch.float32)


def _check_rows(h_NH: Tensor, weights_N: Tensor | None) -> None:
    if h_NH.ndim != 2 or not h_NH.is_floating_point() or h_NH.shape[1] == 0:
        raise SpecError("rows", f"{h_NH.dtype} {list(h_NH.shape)}", "a float tensor [N, H] with H >= 1")
    if weights_N is not None and weights_N.shape != h_NH.shape[:1]:
        raise SpecError("weights", list(weights_N.shape), f"one per row, [{h_NH.shape[0]}]")
