"""Rollout batches <-> the arrays that travel: sampler to stage 0 (everything) and down the stages (what the loss needs).

Arrays are little-endian and of fixed width, so the size of a batch is a function of its shape (`batch_data_bytes`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swarm_core.learning.batch import Batch
from swarm_core.learning.errors import LearningError
from swarm_core.learning.rollout import Completion, RolloutBatch
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BatchData, Rollouts, to_bytes


def id_width(vocab: int) -> int:
    """Bytes of one token id."""
    return 2 if vocab <= 1 << 16 else 4


def batch_data(batch: Batch, vocab: int) -> BatchData:
    """What goes down the stages: lengths for all, completion columns for the last stage; no prompt ids."""
    width = id_width(vocab)
    return BatchData(
        batch=batch.number,
        weight_version=batch.weight_version,
        id_bytes=width,
        prompt_lengths=_bytes(batch.prompt_lengths, "<u4"),
        completion_lengths=_bytes(batch.completion_lengths, "<u4"),
        slices=_bytes(batch.slices, "<u4"),
        prompts=_bytes(batch.prompts, "<u4"),
        completion_ids=_bytes(batch.targets_M.numpy(), f"<u{width}"),
        advantages=_bytes(batch.advantages, "<f4"),
        sampler_logprobs=_bytes(batch.sampler_logprobs_M.numpy(), "<f4"),
        loss_mask=_bytes(batch.active_M.numpy(), "u1"),
        slice_tokens=_bytes(batch.slice_tokens, "<u4"),
        slice_sequences=_bytes(batch.slice_sequences, "<u4"),
    )


def batch_data_bytes(sequences: int, completion_tokens: int, slices: int, vocab: int) -> int:
    """Payload bytes of a BATCH frame: a pure function of its shape."""
    batch = Batch(
        1, 1, 1, [0] * sequences, [1] * sequences, [1] * sequences, [0] * slices + [sequences], torch.zeros(sequences),
        [0.0] * sequences, torch.zeros(sequences), torch.zeros(sequences), [0] * slices, [0] * slices,
    )  # fmt: skip
    data = batch_data(batch, vocab)
    width = id_width(vocab)
    data.completion_ids = bytes(width * completion_tokens)
    data.sampler_logprobs = bytes(4 * completion_tokens)
    data.loss_mask = bytes(completion_tokens)
    return len(to_bytes(data))


def read_batch(data: BatchData, microbatch_size: int, vocab: int) -> Batch:
    """The batch as a later stage holds it. Raises BadFrame when the columns do not fit together."""
    if data.id_bytes != id_width(vocab):
        raise BadFrame(f"batch {data.batch}: ids of {data.id_bytes} bytes, wanted {id_width(vocab)}")
    targets = _array(data.completion_ids, f"<u{data.id_bytes}", "completion_ids").astype(np.int64)
    if targets.size and int(targets.max()) >= vocab:
        raise BadFrame(f"batch {data.batch}: token id {int(targets.max())}, the vocabulary has {vocab}")
    prompts, completions = _ints(data.prompt_lengths, "prompt_lengths"), _ints(data.completion_lengths, "lengths")
    if min(prompts + completions, default=1) < 1:
        raise BadFrame(f"batch {data.batch}: an empty prompt or completion")
    try:
        return Batch(
            number=data.batch,
            weight_version=data.weight_version,
            microbatch_size=microbatch_size,
            prompts=_ints(data.prompts, "prompts"),
            prompt_lengths=prompts,
            completion_lengths=completions,
            slices=_ints(data.slices, "slices"),
            targets_M=torch.from_numpy(targets),
            advantages=_array(data.advantages, "<f4", "advantages").tolist(),
            sampler_logprobs_M=_tensor(data.sampler_logprobs, "<f4", "sampler_logprobs"),
            active_M=_tensor(data.loss_mask, "u1", "loss_mask").to(torch.bool),
            slice_tokens=_ints(data.slice_tokens, "slice_tokens"),
            slice_sequences=_ints(data.slice_sequences, "slice_sequences"),
        )
    except LearningError as error:
        raise BadFrame(f"batch {data.batch}: {error}") from None


def rollouts_message(batch: RolloutBatch) -> Rollouts:
    """A generated batch on its way to stage 0; the prompt of a group travels once."""
    completions = batch.completions
    heads = completions[:: batch.group_size]
    return Rollouts(
        batch=batch.batch,
        weight_version=batch.weight_version,
        group_size=batch.group_size,
        prompt_indices=_bytes([c.prompt_index for c in heads], "<u4"),
        prompt_lengths=_bytes([len(c.prompt_ids) for c in heads], "<u4"),
        completion_lengths=_bytes([len(c.completion_ids) for c in completions], "<u4"),
        prompt_ids=_bytes([i for c in heads for i in c.prompt_ids], "<u4"),
        completion_ids=_bytes([i for c in completions for i in c.completion_ids], "<u4"),
        logprobs=_bytes([x for c in completions for x in c.logprobs], "<f4"),
        rewards=_bytes([float("nan") if c.reward is None else c.reward for c in completions], "<f8"),
        truncated=_bytes([c.truncated for c in completions], "u1"),
    )


def read_rollouts(message: Rollouts, vocab: int) -> RolloutBatch:
    """The batch a sampler sent. Raises BadFrame when it does not fit together."""
    group = message.group_size
    prompt_ends = np.cumsum([0, *_ints(message.prompt_lengths, "prompt_lengths")]).tolist()
    ends = np.cumsum([0, *_ints(message.completion_lengths, "completion_lengths")]).tolist()
    prompts, ids = _ints(message.prompt_ids, "prompt_ids"), _ints(message.completion_ids, "completion_ids")
    logprobs = _array(message.logprobs, "<f4", "logprobs").tolist()
    rewards = _array(message.rewards, "<f8", "rewards").tolist()
    truncated = _array(message.truncated, "u1", "truncated").tolist()
    indices = _ints(message.prompt_indices, "prompt_indices")
    sequences = len(ends) - 1
    if (
        group < 1
        or sequences != group * len(indices)
        or len(prompt_ends) - 1 != len(indices)
        or not len(rewards) == len(truncated) == sequences
        or len(prompts) != prompt_ends[-1]
        or not len(ids) == len(logprobs) == ends[-1]
    ):
        raise BadFrame(f"rollouts of batch {message.batch}: columns do not fit together")
    if max(prompts + ids, default=0) >= vocab:
        raise BadFrame(f"rollouts of batch {message.batch}: token id {max(prompts + ids)}, vocabulary {vocab}")
    completions = []
    for i in range(sequences):
        g = i // group
        completions.append(
            Completion(
                prompt_index=indices[g],
                prompt_ids=prompts[prompt_ends[g] : prompt_ends[g + 1]],
                completion_ids=ids[ends[i] : ends[i + 1]],
                logprobs=logprobs[ends[i] : ends[i + 1]],
                reward=None if math.isnan(rewards[i]) else rewards[i],
                truncated=bool(truncated[i]),
            )
        )
    try:
        return RolloutBatch(message.batch, message.weight_version, group, completions)
    except LearningError as error:
        raise BadFrame(str(error)) from None


def _bytes(values: Any, dtype: str) -> bytes:
    return np.asarray(values, dtype=dtype).tobytes()


def _array(data: bytes, dtype: str, name: str) -> NDArray[Any]:
    if len(data) % np.dtype(dtype).itemsize:
        raise BadFrame(f"{name}: {len(data)} bytes are no whole number of {dtype}")
    return np.frombuffer(data, dtype=dtype)


def _ints(data: bytes, name: str) -> list[int]:
    return [int(i) for i in _array(data, "<u4", name)]


def _tensor(data: bytes, dtype: str, name: str) -> Tensor:
    return torch.from_numpy(_array(data, dtype, name).copy())
