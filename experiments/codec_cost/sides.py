"""What the cost bench compares: the bare products of a link in plain torch, and the codec doing the same; and the data.

Shape legend: N rows of a microbatch, H hidden width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec.basis import Basis
from codec.fit import orthonormalise
from codec.link_codec import LinkCodec
from codec.reuse import ReuseStore
from codec.spec import Direction, LinkSpec
from swarm_worker.link_ends import MEASURED_ROWS, SKETCHED_ROWS
from swarm_worker.sketching import Sketcher

ROWS, WIDTH, RANKS = 4096, 1536, (16, 77, 180)
DECAY = 1.0  # column j of the data has the size j^-1: 0.25 (rank 16) to 0.07 (rank 180) of a row's length is truncated
STEP = 1.0  # relative error of the quantiser alone 3 % (rank 16) to 10 % (rank 180)
OUTLIERS, OUTLIER_TIMES = 8, 50.0  # massive activations: so many rows, so many times the median row
DRIFT = 0.02  # relative change of a row from one pass over a batch to the next
SAMPLES = 16  # of a microbatch


@dataclass(frozen=True)
class Data:
    """Rows whose spectrum falls as a power of the column's number, their basis, and the same rows one pass later."""

    rows_NH: Tensor
    later_NH: Tensor
    axes_HH: Tensor  # in eigenvalue order

    def basis(self, rank: int) -> Basis:
        return Basis.orthonormal(0, self.axes_HH[:, :rank].contiguous(), STEP)


def make_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    axes_HH = orthonormalise(torch.randn(WIDTH, WIDTH, generator=generator))
    sizes_H = torch.arange(1, WIDTH + 1) ** -DECAY

    def drawn() -> Tensor:
        return (torch.randn(ROWS, WIDTH, generator=generator) * sizes_H) @ axes_HH.T

    rows_NH = drawn() * torch.exp(0.3 * torch.randn(ROWS, 1, generator=generator))
    rows_NH[torch.randperm(ROWS, generator=generator)[:OUTLIERS]] *= OUTLIER_TIMES
    return Data(rows_NH, rows_NH + DRIFT * drawn() * rows_NH.norm(dim=1, keepdim=True) / sizes_H.norm(), axes_HH)


@dataclass(frozen=True)
class Case:
    """One cell. `halves` gives the two calls of a turn, sender's and receiver's; the second takes the first's result."""

    name: str
    rank: int
    halves: tuple[Callable[[], Any], Callable[[Any], Any]]
    after: Callable[[], None] = lambda: None  # between turns, outside the clock
    limited: bool = False  # by the bound of 1.25


def bare(data: Data, rank: int) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """y = h E in fp32, cast to bf16; back to fp32, h' = y D. Contiguous operands, one call each: the fastest of
    `@`, `linear` and their transposes that gives y with a row's coefficients together."""
    basis = data.basis(rank)
    encoder_HR, decoder_RH = basis.encoder_HR, basis.decoder_RH
    return lambda: (data.rows_NH @ encoder_HR).to(torch.bfloat16), lambda y_NR: y_NR.to(torch.float32) @ decoder_RH


def coded(data: Data, name: str, rank: int, direction: Direction = Direction.FORWARD, **more: Any) -> Case:
    """The codec on a link of this make."""
    basis, quantiser = data.basis(rank), name.split(",")[0]
    knobs = {f"quantiser_{direction.name.lower()}": quantiser} | more
    codec = LinkCodec(LinkSpec("lowrank", WIDTH, rank, rank, **knobs))
    halves = (
        lambda: codec.encode(data.rows_NH, direction, basis),
        lambda packet: codec.decode(packet, ROWS, direction, basis),
    )
    return Case(name, rank, halves, limited=name in ("uniform", "bf16"))


def changes(data: Data, rank: int) -> Case:
    """The second pass over a batch: both ends hold the first."""
    basis = data.basis(rank)
    codec = LinkCodec(LinkSpec("lowrank", WIDTH, rank, rank, quantiser_forward="uniform", reuse=True))
    ends = ReuseStore(1 << 28), ReuseStore(1 << 28)
    samples = [(key, ROWS // SAMPLES) for key in range(SAMPLES)]

    def encode(rows_NH: Tensor) -> bytes:
        return codec.encode(rows_NH, Direction.FORWARD, basis, rows=ends[0].rows(samples))

    def decode(packet: bytes) -> Tensor:
        return codec.decode(packet, ROWS, Direction.FORWARD, basis, rows=ends[1].rows(samples))

    decode(encode(data.rows_NH))
    for end in ends:
        end.settle(keep=True)
    return Case(
        "uniform, changes", rank, (lambda: encode(data.later_NH), decode), lambda: [e.settle(False) for e in ends]
    )


def watching(data: Data, rank: int) -> Case:
    """What is not in the others: the sketch of a packet's sampled rows, and their fidelity, at the sender."""
    basis, sketcher = data.basis(rank), Sketcher()
    codec = LinkCodec(LinkSpec("lowrank", WIDTH, rank, rank, quantiser_forward="uniform"))

    def watch() -> bytes:
        rows_UH = data.rows_NH[:: ROWS // MEASURED_ROWS]
        (rows_UH - rows_UH @ basis.encoder_HR @ basis.decoder_RH).square().sum()
        (rows_UH - codec.project(rows_UH, Direction.FORWARD, basis)).square().sum()
        sketcher.watch_sent((0, Direction.FORWARD), basis, data.rows_NH[:: ROWS // SKETCHED_ROWS], ROWS, 0)
        return b""

    return Case("sketch and fidelity", rank, (watch, lambda packet: None))


def cases(data: Data) -> Iterator[Case]:
    for rank in RANKS:
        yield from (coded(data, name, rank) for name in ("uniform", "bf16", "int8", "int4"))
        yield coded(data, "uniform, outliers", rank, outliers=10.0)
        yield coded(data, "uniform, stochastic", rank, Direction.BACKWARD, stochastic=True)
        yield changes(data, rank)
        yield watching(data, rank)
