"""The compression bases: version 0 from the initial checkpoint, later ones from the stages' sketches. No stream, no clock.

A basis is refreshed by one warm-started power iteration (PowerSGD, 1905.13727, applied to activations): each sender sums
V = sum_i w_i h_i (h_i^T Q) over a window, the anchor adds the V of all replicas and takes orth(V). That is H x r numbers
a boundary and direction, and no backward pass on the anchor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from codec.basis import calibrate, orthonormalise, overlap, rms_weights
from codec.errors import SpecError
from codec.spec import Direction, LinkSpec
from swarm_core.learning.logprobs import token_logprobs
from swarm_core.learning.microbatch import Sample, completion_rows, pack_rows, split_microbatches
from swarm_core.learning.stage import Stage
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BasisMatrix, BasisSet, Sketch

Key = tuple[int, Direction]
CALIBRATION_SEQUENCES = 8  # in one forward; the anchor is slow, not large


def directions(spec: LinkSpec) -> list[Direction]:
    """The directions that have a basis of their own."""
    return sorted({d for d in Direction if spec.basis_direction(d) is d})


def calibration_samples(
    prompts: Iterable[Sequence[int]], answers: Iterable[Sequence[int]], generator: torch.Generator
) -> list[Sample]:
    """Prompts with their answers, each with advantage +1 or -1.

    Signs drawn at random give the gradients the spread that advantages of unsettled groups have; all of one sign would
    calibrate the backward basis on supervised learning.
    """
    samples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
        ids = torch.tensor(list(answer), dtype=torch.int64)
        samples.append(Sample(torch.tensor(list(prompt), dtype=torch.int64), ids, sign, torch.zeros(len(ids))))
    return samples


def first_bases(stages: Sequence[Stage], samples: Sequence[Sample], spec: LinkSpec) -> dict[Key, Tensor]:
    """Version 0: top eigenvectors of the second moments of h and of dL/dh at every boundary, at initial weights.

    `stages` chain to the whole model. Activations are weighted by 1/rms^2, as the next layer's norm sees them.
    """
    rows: dict[Key, list[Tensor]] = {}
    for mb in split_microbatches(samples, CALIBRATION_SEQUENCES):
        boundaries = []
        assert mb.ids_BT is not None
        h_BTH = mb.ids_BT
        for stage in stages:
            h_BTH = stage(h_BTH)
            if stage is not stages[-1]:
                h_BTH.retain_grad()
                boundaries.append(h_BTH)
        logp_M, _ = token_logprobs(completion_rows(h_BTH, mb), stages[-1].lm_head_weight, mb.targets_M)
        (-(logp_M * mb.advantages_M).sum()).backward()
        for boundary, h in enumerate(boundaries):
            assert h.grad is not None
            rows.setdefault((boundary, Direction.FORWARD), []).append(pack_rows(h.detach(), mb))
            rows.setdefault((boundary, Direction.BACKWARD), []).append(pack_rows(h.grad, mb))
        for stage in stages:
            stage.zero_grad(set_to_none=True)
    bases = {}
    for key, parts in rows.items():
        if key[1] not in directions(spec):
            continue
        x_NH = torch.cat(parts).float()
        forward = key[1] is Direction.FORWARD
        rank = spec.rank_forward if forward else spec.rank_backward
        bases[key] = calibrate(x_NH, rank, rms_weights(x_NH) if forward else None)
    return bases


def basis_set(version: int, tick: int, bases: dict[Key, Tensor]) -> BasisSet:
    """The broadcast form."""
    matrices = [
        BasisMatrix(boundary, int(direction), *q_HR.shape, q_HR.float().contiguous().numpy().tobytes())
        for (boundary, direction), q_HR in sorted(bases.items())
    ]
    return BasisSet(version, tick, matrices)


def part_for_stage(bases: BasisSet, stage: int) -> BasisSet:
    """Only the boundaries on either side of a stage."""
    near = [m for m in bases.matrices if m.boundary in (stage - 1, stage)]
    return BasisSet(bases.version, bases.tick, near)


class BasisKeeper:
    """Collects the sketches of a window and makes the next version when all boundaries and directions are in."""

    def __init__(self, spec: LinkSpec, boundaries: int, version: int, bases: dict[Key, Tensor]) -> None:
        self.spec = spec
        self.version = version
        self.bases = bases
        self.overlap: dict[Key, float] = {}  # of the newest version with the one before
        self._wanted = {(b, d) for b in range(boundaries) for d in directions(spec)}
        self._sketches: dict[tuple[int, int], dict[Key, Tensor]] = {}  # by tick and the version they were taken against

    def add(self, sketch: Sketch) -> BasisSet | None:
        """Take one sketch; the new basis set when it was the last one missing. Raises BadFrame.

        Only sketches taken against the same version make up a window. Windows that stay incomplete are dropped as soon
        as a later one is complete.
        """
        matrix = sketch.matrix
        if matrix.direction not in (0, 1) or (matrix.boundary, Direction(matrix.direction)) not in self._wanted:
            raise BadFrame(f"a sketch of boundary {matrix.boundary}, direction {matrix.direction} was not asked for")
        key = (matrix.boundary, Direction(matrix.direction))
        rank = self.spec.rank_forward if key[1] is Direction.FORWARD else self.spec.rank_backward
        if (matrix.rows, matrix.columns) != (self.spec.width, rank) or len(matrix.values) != 4 * matrix.rows * rank:
            raise BadFrame(f"a sketch of {matrix.rows} x {matrix.columns}; wanted {self.spec.width} x {rank}")
        v_HR = torch.frombuffer(bytearray(matrix.values), dtype=torch.float32).view(matrix.rows, rank)
        window = self._sketches.setdefault((sketch.tick, sketch.version), {})
        window[key] = window[key] + v_HR if key in window else v_HR
        if set(window) != self._wanted:
            return None
        self._sketches = {at: parts for at, parts in self._sketches.items() if at[0] > sketch.tick}
        try:
            bases = {k: orthonormalise(v) for k, v in window.items()}
        except SpecError:
            return None  # not finite: the basis in use stays
        self.overlap = {k: float(overlap(self.bases[k], q)) for k, q in bases.items()}
        self.bases, self.version = bases, self.version + 1
        return basis_set(self.version, sketch.tick, bases)
