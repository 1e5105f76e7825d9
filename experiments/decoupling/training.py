"""A training run beside which an anchor lags: one thread, no clock. Evaluates nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from anchor_node.calibrator import BasisKeeper, calibration_samples, first_bases
from codec.fit import overlap
from experiments.codec.training import Training
from experiments.decoupling.anchor import LaggingAnchor
from swarm_core.config import RunConfig
from swarm_core.data.dataset import load_rows, prompt_indices
from swarm_core.data.prompts import encode_prompt
from swarm_core.models.architecture import eos_ids
from swarm_core.wire.messages import BasisSet
from swarm_worker.membership import read_bases
from swarm_worker.schedule import Stamp


class LaggingTraining(Training):
    """`basis_lag` and `cold_prompts` as in cells.Cell.

    `cosines`: what the wire form kept, by snapshot tick. `overlaps`: of refreshed bases with those before, means by the
    tick after which all stages hold them.
    """

    def __init__(self, config: RunConfig, folder: Path, basis_lag: int = 0, cold_prompts: int = 0) -> None:
        super().__init__(config, folder)
        self.anchor: LaggingAnchor | None = None
        if config.corrections.merger != "none":
            self.anchor = LaggingAnchor(self.manifest, self.model_path, self.chain)
        self._lag, self._cold_prompts = basis_lag, cold_prompts
        self._made = self.bases
        self._waiting: list[tuple[int, BasisSet]] = []
        self.cosines: dict[int, float] = {}
        self.overlaps: dict[int, float] = {}

    def ticked(self, stamp: Stamp) -> None:
        captures = [capture for stage in self.chain.stages if (capture := stage.take_capture()) is not None]
        if captures:
            assert self.anchor is not None
            self.cosines[stamp.tick] = self.anchor.take(captures)
        due = [bases for tick, bases in self._waiting if tick <= stamp.tick]
        self._waiting = [(tick, bases) for tick, bases in self._waiting if tick > stamp.tick]
        for bases in due:
            self.broadcast(bases)

    def refreshed(self, stamp: Stamp, bases: BasisSet) -> None:
        before = self._made
        assert before is not None
        self._made = self._cold(bases) if self._cold_prompts else bases
        self._waiting.append((stamp.tick + self._lag, self._made))
        old, new = (read_bases(each, self.manifest) for each in (before, self._made))
        shares = [float(overlap(old[key].encoder_HR, new[key].encoder_HR)) for key in new]
        self.overlaps[stamp.tick + self._lag] = sum(shares) / len(shares)

    def _cold(self, warm: BasisSet) -> BasisSet:
        """In place of the keeper's warm step: fitted at the weights of the moment, on training prompts of its own."""
        config, spec = self.manifest.config, self.manifest.link()
        links, rows = config.links, load_rows(config.data.train)
        picked = [rows[i] for i in prompt_indices(len(rows), config.run.seed + 1, warm.version, self._cold_prompts)]
        tokenizer, end = self.source.tokenizer, [eos_ids(self.model_path)[0]]
        prompts = [encode_prompt(tokenizer, row.prompt, config.data.chat_template) for row in picked]
        answers = [tokenizer(str(row.answer), add_special_tokens=False)["input_ids"] + end for row in picked]
        samples = calibration_samples(prompts, answers, torch.Generator().manual_seed(warm.version))
        stages, options = [stage.stage for stage in self.chain.stages], (links.fit, links.fit_ridge, links.outliers)
        made = BasisSet(warm.version, warm.tick, first_bases(stages, samples, spec, *options, links.steps).matrices)
        self.keeper = BasisKeeper(spec, self.manifest.boundaries, made, links.fit, links.fit_ridge)
        return made
