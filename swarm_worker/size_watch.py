"""Whether activations that arrive are of the size they always were: a bound on what a bad neighbour can do. No link, no vote.

The residual stream of a network changes by a few percent a tick at the learning rates of RL, and its typical row by less
than its outliers do. So the lower quartile over rows of their rms is compared with what it was, and a packet far beyond is a
fault of the tick, which is then skipped everywhere, as one with NaN is. Gradients are not watched: theirs honestly
change by orders of magnitude with the advantages of a batch, and clipping bounds the step that they make.
"""

from __future__ import annotations

import torch
from torch import Tensor

WATCHED_ROWS = 128  # of a packet; a quartile needs no more
# Between honest microbatches it is within 2, also where most rows are outliers of 1,000 times the others; a loss that diverges passes 64 on its way, and a tick skipped then is no loss.
MOST_RATIO = 64.0
MEMORY = 0.9  # of the usual size, a tick


class SizeWatch:
    """Of one link's activations. Stays on the device until `fault` is asked, once a tick."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []
        self._usual = 0.0  # 0: nothing has come yet

    def saw(self, x_UH: Tensor) -> None:
        """A packet's rows have been decoded."""
        if len(x_UH):
            rows_UH = x_UH.detach()[:: -(-len(x_UH) // WATCHED_ROWS)].float()
            self._seen.append(rows_UH.square().mean(dim=1).quantile(0.25, interpolation="lower").sqrt())

    def fault(self) -> str:
        """What is wrong with the packets since the last call, in words; empty: nothing. The first ones are believed,
        but for what they say of each other; zeros, which a neighbour with a fault of its own sends, say nothing."""
        seen, self._seen = self._seen, []
        sizes = [size for size in torch.stack(seen).tolist() if size > 0.0] if seen else []
        if not sizes:
            return ""
        usual, largest = self._usual or min(sizes), max(sizes)
        if not largest <= MOST_RATIO * usual:
            return f"activations of rms {largest:.3g} came; {usual:.3g} is usual, at most {MOST_RATIO:.0f} times that"
        middle = sorted(sizes)[len(sizes) // 2]
        self._usual = MEMORY * self._usual + (1 - MEMORY) * middle if self._usual else middle
        return ""
