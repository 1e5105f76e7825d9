"""What the slow circuit sends, as its frames carry it: slices of rollouts to bytes and back, checked; no stream, no replay."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from codec.corrections import CorrectionSpec
from swarm_core.config import RunConfig
from swarm_core.learning.batch import Batch
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Slice
from swarm_core.wire.rollouts import batch_data, read_batch

DIGEST_BYTES = 16


def correction_spec(config: RunConfig) -> CorrectionSpec:
    """How a run's corrections travel."""
    c = config.corrections
    return CorrectionSpec(c.wire_form, c.rank, c.share)


def digest_of(packet: bytes | memoryview) -> bytes:
    """What a Correction or a Snapshot says of its packet: BLAKE2b, 16 bytes."""
    return hashlib.blake2b(packet, digest_size=DIGEST_BYTES).digest()


def slice_message(part: Batch | None, scored: Batch | None, vocab: int) -> Slice:
    """Batches of one slice (`Batch.only`): stage 0's with its token ids, the last stage's with the log-probs it took.

    Every prompt travels once, in the order of their numbers. A stage alone is both.
    """
    message = Slice()
    if part is not None:
        assert part.ids_N is not None, "stage 0 holds the token ids"
        message.data = batch_data(part, vocab)
        prompts: dict[int, Tensor] = {}
        start = 0
        for number, length, own in zip(part.prompts, part.prompt_lengths, part.completion_lengths, strict=True):
            prompts.setdefault(number, part.ids_N[start : start + length])
            start += length + own
        ids = torch.cat([prompts[number] for number in sorted(prompts)])
        message.prompt_ids = ids.numpy().astype(f"<u{message.data.id_bytes}").tobytes()
    if scored is not None:
        message.scored = True
        message.old_logprobs = _floats(scored.old_logprobs_M)
        message.reference_logprobs = _floats(scored.reference_logprobs_M)
    return message


def read_slice(message: Slice, scored: Slice, microbatch_size: int, vocab: int) -> Batch:
    """The batch of one slice that stage 0 sent, with the last stage's log-probs. Raises BadFrame."""
    batch = read_batch(message.data, microbatch_size, vocab)
    name = f"slice of tick {message.tick}"
    if len(batch.slices) != 2:
        raise BadFrame(f"{name}: {len(batch.slices) - 1} slices, wanted one")
    lengths = dict(zip(batch.prompts, batch.prompt_lengths, strict=True))
    width = message.data.id_bytes
    if len(message.prompt_ids) != width * sum(lengths.values()):
        raise BadFrame(f"{name}: {len(message.prompt_ids)} bytes of prompts, wanted {width * sum(lengths.values())}")
    ids = torch.from_numpy(np.frombuffer(message.prompt_ids, dtype=f"<u{width}").astype(np.int64))
    if ids.numel() and int(ids.max()) >= vocab:
        raise BadFrame(f"{name}: token id {int(ids.max())}, the vocabulary has {vocab}")
    numbers = sorted(lengths)
    prompts = dict(zip(numbers, torch.split(ids, [lengths[number] for number in numbers]), strict=True))
    completions = torch.split(batch.targets_M, batch.completion_lengths)
    parts = [x for number, own in zip(batch.prompts, completions, strict=True) for x in (prompts[number], own)]
    return replace(
        batch,
        ids_N=torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64),
        old_logprobs_M=_logprobs(scored.old_logprobs, batch, f"{name}, old log-probs"),
        reference_logprobs_M=_logprobs(scored.reference_logprobs, batch, f"{name}, reference log-probs"),
    )


def _floats(values_M: Tensor | None) -> bytes:
    return b"" if values_M is None else values_M.float().numpy().astype("<f4").tobytes()


def _logprobs(values: bytes, batch: Batch, name: str) -> Tensor | None:
    if not values:
        return None
    if len(values) != 4 * batch.targets_M.numel():
        raise BadFrame(f"{name}: {len(values)} bytes for {batch.targets_M.numel()} tokens, wanted 4 each")
    logprobs_M = torch.from_numpy(np.frombuffer(values, dtype="<f4").copy())
    if not bool(torch.isfinite(logprobs_M).all()):
        raise BadFrame(f"{name}: got numbers that are not finite")
    return logprobs_M
