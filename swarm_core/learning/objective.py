"""What a worker's stage and the anchor's replay of it must compute alike: precision, log-probs, loss, rounding seeds. No link.

The [grpo] knobs in the words of the loss, and one microbatch of a `Batch` from the last stage's output to a scalar. Both
programs call the same few lines, so that a replay at the weights of a tick gives that tick's gradient, bit for bit.
Suffixes: B sequences, T positions, M completion tokens, H hidden width.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swarm_core.config import RunConfig
from swarm_core.learning.batch import Batch
from swarm_core.learning.grpo import Denominators, LossSpec, Metrics, grpo_loss
from swarm_core.learning.logprobs import token_logprobs
from swarm_core.learning.microbatch import Layout, completion_rows
from swarm_core.learning.stage import Stage


@dataclass(frozen=True)
class Objective:
    """A run's loss, in the precision that its stages compute in on this device.

    `dtype` is that of the master weights and of rows that arrive over a link, `compute_dtype` that of matmuls. `chunk`
    is how many tokens' logits exist at a time, `temperature` that of all log-probs.
    """

    spec: LossSpec
    temperature: float
    chunk: int
    device: torch.device
    dtype: torch.dtype
    compute_dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around a stage's forward; `hidden` and `logprobs` stand outside of it."""
        if self.compute_dtype is self.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def hidden(self, h_BTH: Tensor, layout: Layout) -> Tensor:
        """h_MH: what the head makes the completion tokens' logits of. Differentiable."""
        return completion_rows(h_BTH, layout).to(self.compute_dtype)

    def logprobs(self, stage: Stage, h_MH: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        """(logp_M, entropy_M) of `hidden` rows of a last stage; see `token_logprobs`."""
        # The casts stand outside autocast: the chunked backward recomputes logits and must see the same dtypes.
        weight_VH = stage.lm_head_weight.to(self.compute_dtype)
        return token_logprobs(h_MH, weight_VH, targets_M, self.temperature, self.chunk)

    def loss(self, stage: Stage, h_MH: Tensor, batch: Batch, slice_: int, microbatch: int) -> tuple[Tensor, Metrics]:
        """(this microbatch's share of its slice's loss, metrics for `merge_metrics`) of `hidden` rows of a last stage.

        Raises LossError, among others for a KL penalty without `batch.reference_logprobs_M`.
        """
        mb = batch.microbatch(slice_, microbatch).to(self.device)
        logp_M, entropy_M = self.logprobs(stage, h_MH, mb.targets_M)
        reference_M = batch.reference(slice_, microbatch)
        denominators = Denominators(batch.slice_tokens[slice_], batch.slice_sequences[slice_])
        reference_M = None if reference_M is None else reference_M.to(self.device)
        return grpo_loss(logp_M, mb, self.spec, denominators, reference_M, entropy_M)


def master_dtype(precision: str) -> torch.dtype:
    """Of the weights that are trained, saved and exported; `run.precision` says what they are computed with."""
    return torch.float64 if precision == "fp64" else torch.float32


def make_objective(config: RunConfig, device: torch.device) -> Objective:
    """The objective of a run, on a device: `run.precision` auto is fp32 on a CPU, bf16 over fp32 masters on a GPU."""
    precision = config.run.precision
    dtype = master_dtype(precision)
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    compute_dtype = torch.bfloat16 if bf16 else dtype
    chunk = config.swarm.logprob_chunk
    return Objective(loss_spec(config), config.grpo.temperature, chunk, device, dtype, compute_dtype)


def loss_spec(config: RunConfig) -> LossSpec:
    """The [grpo] knobs in the words of the loss."""
    g = config.grpo
    return LossSpec(
        loss=g.loss,
        clip_low=g.clip_low,
        clip_high=g.clip_high,
        dual_clip=g.dual_clip,
        beta=g.kl_beta,
        level=g.ratio_level,
        tis_cap=g.sampler_correction_cap,
        max_completion_length=g.max_completion_length,
        scale_rewards=g.scale_rewards,
        mask_truncated=g.mask_truncated,
    )


def packet_seed(run_seed: int, tick: int, attempt: int, microbatch: int, boundary: int) -> int:
    """Of the stochastic rounding of a run's one packet: the same in every process, which hash() does not promise."""
    place = struct.pack("<5Q", run_seed, tick, attempt, microbatch, boundary)
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1
