"""Sketches under way on a stage: what the anchor makes the next bases of. Sums only; no frame, no tick, no fit.

At either end of a link H x R numbers are summed over a window of ticks: the moment's V_C = C E where rows are sent, and
with fit `metric` V_G = G D^T where activations arrive and their gradient is known (codec/fit.py has the meaning). Each
costs two skinny matmuls a packet, in fp32, without a graph, and makes no device wait until `take`.

Suffixes: N rows of a packet, H hidden width, R columns of the basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec.basis import Basis
from codec.fit import FitName, metric_weights, moment_weights, sketch
from codec.spec import Direction

MOMENT, METRIC = 0, 1  # Sketch.part
Key = tuple[int, Direction]


@dataclass(frozen=True)
class SketchOut:
    """One boundary's sketch of a window, for the anchor: V (bf16, CPU), sum of w ||x||^2, and the packets it stands for."""

    boundary: int
    direction: Direction
    part: int
    version: int
    v_HR: Tensor
    trace: float
    rows_seen: int
    packet_bytes: int


@dataclass
class _Window:
    version: int  # sums against two bases would mean nothing
    v_HR: Tensor
    trace: Tensor  # 0-dim, fp64, on the device: read once
    rows: int = 0
    packet_bytes: int = 0


class Sketcher:
    """The windows of one stage, by boundary, direction and part. `fit` and `outliers` are the run's."""

    def __init__(self, fit: FitName = "plain", outliers: float = 0.0) -> None:
        self._fit: FitName = fit
        self._outliers = outliers
        self._windows: dict[tuple[int, Direction, int], _Window] = {}

    def watch_sent(self, key: Key, basis: Basis, x_NH: Tensor, packet_rows: int, packet_bytes: int) -> None:
        """Rows that went over a boundary, activations or gradients: all of a packet's, or a sample of them.

        `packet_rows` and `packet_bytes` are the packet's own.
        """
        window = self._window(key, MOMENT, basis)
        window.rows += packet_rows
        window.packet_bytes += packet_bytes
        self._add(window, x_NH, basis.encoder_HR, moment_weights(x_NH, key[1], self._fit, self._outliers))

    def watch_received(self, key: Key, basis: Basis, h_NH: Tensor, grad_NH: Tensor) -> None:
        """Activations as they were decoded, and the loss' gradient in them. Nothing to do unless the fit is `metric`."""
        if self._fit == "metric":
            window = self._window(key, METRIC, basis)
            window.rows += len(grad_NH)
            self._add(window, grad_NH, basis.decoder_RH.T, metric_weights(h_NH, grad_NH, self._outliers))

    def take(self) -> list[SketchOut]:
        """The sketches of the window that ends, in a fixed order; the next window is empty. Windows without rows and
        those whose sums are no numbers are left out."""
        out = []
        for (boundary, direction, part), w in sorted(self._windows.items()):
            trace, v_HR = float(w.trace), w.v_HR.to(torch.bfloat16).cpu()
            if 0.0 < trace < float("inf") and bool(torch.isfinite(v_HR).all()):
                out.append(SketchOut(boundary, direction, part, w.version, v_HR, trace, w.rows, w.packet_bytes))
        self._windows = {}
        return out

    def state(self) -> tuple[dict[str, Tensor], list[list[Any]]]:
        """(tensors by name, metadata) for a checkpoint; `load` goes on from it, bit for bit."""
        tensors: dict[str, Tensor] = {}
        metadata: list[list[Any]] = []
        for (boundary, direction, part), w in sorted(self._windows.items()):
            name = f"{boundary}.{int(direction)}.{part}"
            tensors |= {f"{name}.v": w.v_HR, f"{name}.trace": w.trace.reshape(1)}
            metadata.append([boundary, int(direction), part, w.version, w.rows, w.packet_bytes])
        return tensors, metadata

    def load(self, tensors: dict[str, Tensor], metadata: list[list[Any]], device: torch.device | str = "cpu") -> None:
        """Take up what `state` gave, on the device of the bases."""
        self._windows = {}
        for boundary, direction, part, version, rows, packet_bytes in metadata:
            name = f"{boundary}.{direction}.{part}"
            v_HR, trace = tensors[f"{name}.v"].to(device), tensors[f"{name}.trace"].reshape(()).to(device)
            window = _Window(version, v_HR, trace, rows, packet_bytes)
            self._windows[(boundary, Direction(direction), part)] = window

    def _window(self, key: Key, part: int, basis: Basis) -> _Window:
        window = self._windows.get((*key, part))
        if window is None or window.version != basis.version:
            e_HR = basis.encoder_HR
            trace = torch.zeros((), dtype=torch.float64, device=e_HR.device)
            window = _Window(basis.version, torch.zeros_like(e_HR, memory_format=torch.contiguous_format), trace)
            self._windows[(*key, part)] = window
        return window

    @torch.no_grad()
    def _add(self, window: _Window, x_NH: Tensor, basis_HR: Tensor, weights_N: Tensor | None) -> None:
        x_NH = x_NH.detach().to(torch.float32)
        square_N = torch.linalg.vector_norm(x_NH, dim=1, dtype=torch.float64).square()
        trace = (square_N if weights_N is None else square_N * weights_N).sum()
        v_HR = sketch(x_NH, basis_HR, weights_N)
        # A poisoned packet's tick is skipped, and the window goes on without it.
        sound = torch.isfinite(trace) & torch.isfinite(v_HR).all()
        window.v_HR += torch.where(sound, v_HR, 0.0)
        window.trace += torch.where(sound, trace, 0.0)
