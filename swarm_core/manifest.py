"""The run manifest: the run file plus what the anchor derived from the checkpoint. Every worker gets it at join. No torch.

Two manifests with the same `digest` train the same weights: knobs that change nothing a stage computes (how long the run
lasts, its name, how rollouts are made and when checkpoints are written) stay outside the digest, so that a run can be
continued for longer or on other machines.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from codec.spec import LinkSpec
from swarm_core.config import RunConfig, parse_manifest
from swarm_core.errors import UserError
from swarm_core.learning.latency import FireSchedule, Latency
from swarm_core.learning.partition import Span, partition
from swarm_core.models.architecture import ModelShape

OUTSIDE_DIGEST = {
    "run": ("name", "ticks", "threads", "device"),
    "model": ("path",),  # the fingerprint stands for it
    "data": ("train", "validation"),  # where the files lie; rollouts travel with their tokens
    "links": ("fidelity_every", "fidelity_sequences"),  # a probe moves no weight
    "anchor": ("ring_mb", "slowdown", "latency_trace"),  # when corrections come is in the journal
    "sampler": None,
    "checkpoint": None,
}


class ManifestError(UserError):
    """A manifest that cannot be read; `str()` is one line."""


@dataclass(frozen=True)
class Manifest:
    """What all processes of a run agree on."""

    config: RunConfig
    spans: tuple[Span, ...]
    width: int
    vocab: int
    model_fingerprint: str

    @property
    def stages(self) -> int:
        return len(self.spans)

    @property
    def boundaries(self) -> int:
        return len(self.spans) - 1

    def link(self) -> LinkSpec:
        """How every boundary is crossed."""
        links = self.config.links
        dtype: Literal["fp32", "fp64"] = "fp64" if self.config.run.precision == "fp64" else "fp32"
        if links.kind != "lowrank":
            return LinkSpec(kind=links.kind, width=self.width, zstd=links.zstd, dtype=dtype)
        forward, backward = links.ranks(self.width)
        uniform = links.quantiser_backward == "uniform"
        return LinkSpec(
            kind="lowrank",
            width=self.width,
            rank_forward=forward,
            rank_backward=backward,
            backward=links.backward,
            zstd=links.zstd,
            dtype=dtype,
            quantiser_forward=links.quantiser_forward,
            quantiser_backward=links.quantiser_backward,
            gradient_scale=links.gradient_scale if uniform else "row",
            stochastic=links.stochastic_rounding and uniform,
            exact_step=links.steps[1],
            outliers=links.outliers,
            reuse=links.reuse_deltas and links.quantiser_forward == "uniform",
        )

    def fires(self, trace: tuple[int, ...] = ()) -> FireSchedule | None:
        """When snapshots are taken and their corrections come; None without a merger. `trace`: of latency = trace."""
        a, c = self.config.anchor, self.config.corrections
        if c.merger == "none":
            return None
        low, high = a.latency_range
        # Only the anchor reads the trace: K says when a correction is due, not when a snapshot is.
        latency = Latency(a.latency, a.delay_k, low, high, a.latency_sigma, trace or (1,), self.config.run.seed)
        return FireSchedule(a.m_cadence, latency)

    def to_json(self) -> str:
        """Canonical JSON: equal manifests are equal bytes."""
        return _canonical(self._plain())

    def digest(self) -> str:
        """sha256 (hex) over everything that decides the weights."""
        plain = self._plain()
        scheduled = self.config.optimizer.schedule != "constant"  # then the last tick shapes the learning rate
        plain["last_tick"] = {"value": {"ticks": self.config.run.ticks if scheduled else 0}}
        for section, names in OUTSIDE_DIGEST.items():
            for name in names or list(plain["config"][section]):
                plain["config"][section].pop(name)
        return hashlib.sha256(_canonical(plain).encode()).hexdigest()

    def _plain(self) -> dict[str, dict[str, dict[str, object]]]:
        return json.loads(  # type: ignore[no-any-return]
            _canonical(
                {
                    "config": json.loads(self.config.canonical_json()),
                    "spans": [asdict(span) for span in self.spans],
                    "width": self.width,
                    "vocab": self.vocab,
                    "model_fingerprint": self.model_fingerprint,
                }
            )
        )


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def make_manifest(config: RunConfig, shape: ModelShape, fingerprint: str) -> Manifest:
    """Derive the manifest: the split is fixed here, once, for all. Raises PartitionError, ConfigError."""
    spans = partition(shape, config.swarm.stages, config.swarm.split)
    manifest = Manifest(config, tuple(spans), shape.hidden, shape.vocab, fingerprint)
    manifest.link()  # a rank above the width is refused here, before anything starts
    return manifest


def read_manifest(text: str) -> Manifest:
    """Parse what `to_json` wrote. Raises ManifestError, ConfigError."""
    try:
        plain = json.loads(text)
        return Manifest(
            config=parse_manifest(json.dumps(plain["config"]), "the anchor's manifest"),
            spans=tuple(Span(**span) for span in plain["spans"]),
            width=int(plain["width"]),
            vocab=int(plain["vocab"]),
            model_fingerprint=str(plain["model_fingerprint"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"the anchor's manifest does not parse ({error}): are both ends the same version?"
        ) from None
