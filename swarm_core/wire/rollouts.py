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

MOST_SEQUENCES = 1 << 16  # of a batch: the columns become lists, at a hundred bytes a sequence
# Of one microbatch: at a width of 1,536 its rows alone are 3 GiB in bf16. Lengths are only numbers, and the tensors that
# they ask for are allocated when the first packet comes, so they are judged here.
MOST_MICROBATCH_TOKENS = 1 << 20
LARGEST_REWARD = 1e30  # its square, summed over a group, is far from overflowing


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
    _check_lengths(data, microbatch_size)
    targets = _array(data.completion_ids, f"<u{data.id_bytes}", "completion_ids").astype(np.int64)
    if targets.size and int(targets.max()) >= vocab:
        raise BadFrame(f"batch {data.batch}: token id {int(targets.max())}, the vocabulary has {vocab}")
    prompts, completions = _ints(data.prompt_lengths, "prompt_lengths"), _ints(data.completion_lengths, "lengths")
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
            advantages=_finite(data.advantages, "<f4", "advantages").tolist(),
            sampler_logprobs_M=_tensor(data.sampler_logprobs, "<f4", "sampler_logprobs"),
            active_M=_tensor(data.loss_mask, "u1", "loss_mask").to(torch.bool),
            slice_tokens=_ints(data.slice_tokens, "slice_tokens"),
            slice_sequences=_ints(data.slice_sequences, "slice_sequences"),
        )
    except LearningError as error:
        raise BadFrame(f"batch {data.batch}: {error}") from None


def _check_lengths(data: BatchData, microbatch_size: int) -> None:
    """Everything that decides how much memory a batch takes, before any of it is taken."""
    name, sequences = f"batch {data.batch}", len(data.prompt_lengths) // 4
    if max(sequences, len(data.slices) // 4) > MOST_SEQUENCES:
        raise BadFrame(
            f"{name}: {sequences} sequences in {len(data.slices) // 4} slices; at most {MOST_SEQUENCES} of each"
        )
    columns = (data.completion_lengths, data.prompts, data.advantages)
    if any(len(column) != len(data.prompt_lengths) for column in columns):
        raise BadFrame(f"{name}: columns do not fit together")
    prompts, completions = (_array(x, "<u4", "lengths") for x in (data.prompt_lengths, data.completion_lengths))
    if not (prompts.all() and completions.all()):
        raise BadFrame(f"{name}: an empty prompt or completion")
    longest = int(prompts.max(initial=0)) + int(completions.max(initial=0))
    if longest * max(1, min(microbatch_size, sequences)) > MOST_MICROBATCH_TOKENS:
        raise BadFrame(
            f"{name}: sequences of up to {longest} tokens, {microbatch_size} a microbatch; at most "
            f"{MOST_MICROBATCH_TOKENS} tokens together"
        )


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
    group, name = message.group_size, f"rollouts of batch {message.batch}"
    prompt_lengths = _array(message.prompt_lengths, "<u4", "prompt_lengths")
    lengths = _array(message.completion_lengths, "<u4", "completion_lengths")
    prompts, ids = (
        _array(message.prompt_ids, "<u4", "prompt_ids"),
        _array(message.completion_ids, "<u4", "completion_ids"),
    )
    logprobs = _array(message.logprobs, "<f4", "logprobs")
    rewards, truncated = _array(message.rewards, "<f8", "rewards"), _array(message.truncated, "u1", "truncated")
    indices = _ints(message.prompt_indices, "prompt_indices")
    if (
        group < 1
        or len(lengths) > MOST_SEQUENCES
        or not len(lengths) == len(rewards) == len(truncated) == group * len(indices)
        or len(prompt_lengths) != len(indices)
        or len(prompts) != int(prompt_lengths.sum(dtype=np.int64))
        or not len(ids) == len(logprobs) == int(lengths.sum(dtype=np.int64))
    ):
        raise BadFrame(f"{name}: columns do not fit together")
    largest = max(int(prompts.max(initial=0)), int(ids.max(initial=0)))
    if largest >= vocab:
        raise BadFrame(f"{name}: token id {largest}, vocabulary {vocab}")
    if (np.abs(rewards) > LARGEST_REWARD).any():  # NaN, the verifier failed, compares false
        raise BadFrame(f"{name}: a reward beyond {LARGEST_REWARD:.0e}")
    prompt_ends, ends = (np.cumsum([0, *of], dtype=np.int64).tolist() for of in (prompt_lengths, lengths))
    completions = []
    for i, reward in enumerate(rewards.tolist()):
        g = i // group
        completions.append(
            Completion(
                prompt_index=indices[g],
                prompt_ids=prompts[prompt_ends[g] : prompt_ends[g + 1]].tolist(),
                completion_ids=ids[ends[i] : ends[i + 1]].tolist(),
                logprobs=logprobs[ends[i] : ends[i + 1]].tolist(),
                reward=None if math.isnan(reward) else reward,
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


def _finite(data: bytes, dtype: str, name: str) -> NDArray[Any]:
    values = _array(data, dtype, name)
    if not np.isfinite(values).all():
        raise BadFrame(f"{name}: got numbers that are not finite")
    return values


def _ints(data: bytes, name: str) -> list[int]:
    return [int(i) for i in _array(data, "<u4", name)]


def _tensor(data: bytes, dtype: str, name: str) -> Tensor:
    return torch.from_numpy(_array(data, dtype, name).copy())
