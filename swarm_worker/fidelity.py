"""What the links do to a training step: a few sequences forward and backward twice, over the links as they are and over
exact ones, and the two compared. Pure torch: which round this is and what crosses is decided elsewhere.

Suffixes: M completion tokens, H hidden width, V vocabulary, K rows of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from codec.spec import LinkSpec
from swarm_worker.schedule import COMPRESSED, DENSE

PREFIX = "fidelity/"
POISONED = "fidelity/poisoned"  # in the place of all other numbers of a probe that met NaN or Inf
PIECE = 1 << 22  # elements of a gradient that are in fp64 at a time: 64 MB for a pair, whatever the tensor


def exact(link: LinkSpec) -> LinkSpec:
    """The link that the dense pass crosses: rows as they are, bit for bit."""
    return LinkSpec("identity", link.width, dtype=link.dtype)


class Probe:
    """One stage's two passes of a probe round, until they are compared.

    Holds a second gradient of the stage for the time of a probe, and on the last stage the hidden states of its
    completion tokens: parameters and 2 M H numbers.
    """

    def __init__(self) -> None:
        self.poisoned = False  # something could not be sent; zeros travelled in its place
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._hidden_MH: dict[int, Tensor] = {}

    def keep_gradient(self, crossing: int, parameters: Sequence[Tensor]) -> None:
        """Take this pass' gradient off the parameters, so that it reaches neither the other's nor the tick's."""
        self._gradients[crossing] = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None

    def keep_hidden(self, crossing: int, hidden_MH: Tensor) -> None:
        """Last stage: what the head makes this pass' logits of."""
        self._hidden_MH[crossing] = hidden_MH.detach()

    def compare(self, stage: int) -> dict[str, float]:
        """Cosine between the compressed and the dense gradient of this stage, and the ratio of their norms.

        A stage without any gradient (every token clipped) has nothing to say.
        """
        dot, compressed, dense = products(self._gradients[COMPRESSED], self._gradients[DENSE])
        if compressed == 0.0 or dense == 0.0:
            return {}
        return {
            f"fidelity/grad_cosine/stage_{stage}": dot / math.sqrt(compressed * dense),
            f"fidelity/grad_norm_ratio/stage_{stage}": math.sqrt(compressed / dense),
        }

    def compare_policies(
        self, weight_VH: Tensor, targets_M: Tensor, temperature: float, chunk: int
    ) -> dict[str, float]:
        """Last stage: `divergence` of the two forwards."""
        dense_MH, compressed_MH = self._hidden_MH[DENSE], self._hidden_MH[COMPRESSED]
        return divergence(dense_MH, compressed_MH, weight_VH, targets_M, temperature, chunk)

    def report(self, numbers: dict[str, float]) -> dict[str, float]:
        """The numbers, or, where they mean nothing, just that."""
        if self.poisoned or not all(map(math.isfinite, numbers.values())):
            return {POISONED: 1.0}
        return numbers


@torch.no_grad()
def products(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> tuple[float, float, float]:
    """(a.b, a.a, b.b) over all tensors, summed in fp64; None stands for zeros. One synchronisation."""
    total = torch.zeros(3, dtype=torch.float64)
    for left, right in zip(a, b, strict=True):
        some = left if left is not None else right
        if some is None:
            continue
        total = total.to(some.device)
        x = (torch.zeros_like(some) if left is None else left).flatten()
        y = (torch.zeros_like(some) if right is None else right).flatten()
        for x_K, y_K in zip(torch.split(x, PIECE), torch.split(y, PIECE), strict=True):
            x_K, y_K = x_K.double(), y_K.double()
            total += torch.stack([x_K @ y_K, x_K @ x_K, y_K @ y_K])
    ab, aa, bb = total.tolist()
    return ab, aa, bb


@torch.no_grad()
def divergence(
    dense_MH: Tensor, compressed_MH: Tensor, weight_VH: Tensor, targets_M: Tensor, temperature: float, chunk: int
) -> dict[str, float]:
    """KL(dense || compressed) of the next-token distributions at every completion token, in nats: mean and largest; and
    the largest |difference| of the log-probs of the tokens taken. At most 2 `chunk` rows of logits exist at a time."""
    kl_M, difference_M = [], []
    for start in range(0, len(targets_M), chunk):
        rows = slice(start, start + chunk)
        dense_KV = _log_softmax(dense_MH[rows], weight_VH, temperature)
        compressed_KV = _log_softmax(compressed_MH[rows], weight_VH, temperature)
        kl_M.append((dense_KV.exp() * (dense_KV - compressed_KV)).sum(dim=1).clamp(min=0.0))  # rounding may leave -1e-9
        taken_K1 = targets_M[rows].unsqueeze(1)
        difference_M.append((dense_KV.gather(1, taken_K1) - compressed_KV.gather(1, taken_K1)).abs().squeeze(1))
    kl, difference = torch.cat(kl_M), torch.cat(difference_M)
    return {
        "fidelity/kl": float(kl.mean()),
        "fidelity/kl_max": float(kl.max()),
        "fidelity/logp_diff_max": float(difference.max()),
    }


def _log_softmax(hidden_KH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    logits_KV = hidden_KH @ weight_VH.T
    wide = logits_KV if logits_KV.dtype == torch.float64 else logits_KV.float()
    return torch.log_softmax(wide / temperature, dim=-1)
