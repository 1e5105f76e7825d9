"""Batches and rollouts on the wire: what arrives is what was sent, at a size known beforehand, and lies are refused."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.microbatch import Sample
from swarm_core.learning.rollout import Completion, RolloutBatch
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BatchData, Rollouts, from_bytes, to_bytes
from swarm_core.wire.rollouts import batch_data, batch_data_bytes, id_width, read_batch, read_rollouts, rollouts_message

VOCAB = 500
SIZE = 3


def a_batch(seed: int, *, slices: int = 2, sequences: int | None = None, vocab: int = VOCAB) -> Batch:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def sample() -> Sample:
        p, c = rng.randint(1, 9), rng.randint(1, 12)
        return Sample(
            torch.randint(vocab, (p,), generator=generator),
            torch.randint(vocab, (c,), generator=generator),
            rng.gauss(0, 1),
            -torch.rand(c, generator=generator),
            mask_C=torch.rand(c, generator=generator) < 0.8,
        )

    counts = [rng.randint(0, 7) if sequences is None else sequences for _ in range(slices)]
    parts = [[sample() for _ in range(count)] for count in counts]
    tokens = [rng.randint(0, 1000) for _ in range(slices)]
    return make_batch(seed, seed // 2, parts, tokens, [c + 1 for c in counts], SIZE)


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


@pytest.mark.parametrize("vocab", [VOCAB, 1 << 16, (1 << 16) + 1, 200_000])
@pytest.mark.parametrize("seed", range(6))
def test_a_batch_comes_back_without_prompt_ids(seed: int, vocab: int) -> None:
    sent = a_batch(seed, slices=1 + seed % 4, vocab=vocab)
    data = from_bytes(BatchData, to_bytes(batch_data(sent, vocab)))
    back = read_batch(data, SIZE, vocab)
    plain = ("number", "weight_version", "microbatch_size", "prompts", "prompt_lengths", "completion_lengths")
    for name in (*plain, "slices", "slice_tokens", "slice_sequences", "microbatches"):
        assert getattr(back, name) == getattr(sent, name), name
    for name in ("targets_M", "sampler_logprobs_M", "active_M"):
        assert getattr(back, name).dtype == getattr(sent, name).dtype
        assert torch.equal(getattr(back, name), getattr(sent, name)), name
    assert back.advantages == [struct.unpack("<f", struct.pack("<f", a))[0] for a in sent.advantages]
    assert (back.ids_N, back.old_logprobs_M, back.reference_logprobs_M) == (None, None, None)
    back.sampler_logprobs_M[:1] = 0.0  # writable: not a view of the received bytes


def test_log_probs_that_the_sampler_did_not_have_stay_nan() -> None:
    sent = a_batch(3)
    sent.sampler_logprobs_M[0] = float("nan")
    assert math.isnan(read_batch(batch_data(sent, VOCAB), SIZE, VOCAB).sampler_logprobs_M[0])


@pytest.mark.parametrize("vocab", [VOCAB, 200_000])
@pytest.mark.parametrize(("seed", "sequences"), [(0, None), (1, None), (2, 0), (3, 1), (7, 40), (8, 100)])
def test_the_size_of_a_batch_is_a_function_of_its_shape(seed: int, sequences: int | None, vocab: int) -> None:
    for slices in (1, 2, 5):
        batch = a_batch(seed, slices=slices, sequences=sequences, vocab=vocab)
        payload = to_bytes(batch_data(batch, vocab))
        shape = (len(batch.prompt_lengths), batch.targets_M.numel(), slices)
        assert len(payload) == batch_data_bytes(*shape, vocab)


def test_the_width_of_a_token_id() -> None:
    assert [id_width(v) for v in (2, 1 << 16, (1 << 16) + 1)] == [2, 2, 4]
    assert read_batch(batch_data(a_batch(0, vocab=1 << 16), 1 << 16), SIZE, 1 << 16).targets_M.max() < 1 << 16


GOOD = BatchData(
    1, 0, u32(0, 1), 2, u32(3, 4), u32(2, 1), u32(0, 1, 2), struct.pack("<3H", 7, 8, 9), struct.pack("<2f", 1, -1),
    struct.pack("<3f", -1, -2, -3), b"\1\1\0", u32(2, 1), u32(4, 4),
)  # fmt: skip

HOSTILE_BATCHES = {
    "id width": {"id_bytes": 4},
    "id width 0": {"id_bytes": 0},
    "half an id": {"completion_ids": b"\1\2\3\4\5"},
    "one id short": {"completion_ids": struct.pack("<2H", 7, 8)},
    "an id outside": {"completion_ids": struct.pack("<3H", 7, VOCAB, 9)},
    "half a length": {"prompt_lengths": u32(3, 4)[:-1]},
    "a prompt of two lengths": {"prompts": u32(5, 5)},
    "a prompt without a number": {"prompts": u32(0)},
    "half a number": {"prompts": u32(0, 1)[:-1]},
    "a prompt too few": {"prompt_lengths": u32(3)},
    "an empty prompt": {"prompt_lengths": u32(3, 0)},
    "an empty completion": {"completion_lengths": u32(3, 0)},
    "a completion too long": {"completion_lengths": u32(2, 2)},
    "a completion of 4 GiB": {"completion_lengths": u32(2, 2**32 - 1)},
    "no slices": {"slices": b""},
    "one bound": {"slices": u32(0)},
    "slices that do not start": {"slices": u32(1, 1, 2)},
    "slices that do not end": {"slices": u32(0, 1, 1)},
    "slices beyond the end": {"slices": u32(0, 1, 3)},
    "slices backwards": {"slices": u32(0, 2, 1, 2)},
    "a slice more": {"slices": u32(0, 1, 1, 2)},
    "advantages": {"advantages": struct.pack("<3f", 1, 1, 1)},
    "half an advantage": {"advantages": b"\0" * 7},
    "log-probs": {"sampler_logprobs": struct.pack("<2f", 1, 1)},
    "mask": {"loss_mask": b"\1\1"},
    "tokens": {"slice_tokens": u32(2)},
    "sequences": {"slice_sequences": u32(2, 2, 2)},
}


def test_the_good_batch_is_good() -> None:
    assert read_batch(GOOD, SIZE, VOCAB).microbatches == (1, 1)


@pytest.mark.parametrize("change", HOSTILE_BATCHES.values(), ids=HOSTILE_BATCHES)
def test_a_hostile_batch_is_a_bad_frame(change: dict[str, Any]) -> None:
    with pytest.raises(BadFrame) as caught:
        read_batch(replace(GOOD, **change), SIZE, VOCAB)
    assert "\n" not in str(caught.value)


def some_rollouts(seed: int) -> RolloutBatch:
    rng = random.Random(seed)
    group = rng.randint(1, 4)
    completions = []
    for _ in range(rng.randint(1, 5)):
        index, prompt = rng.randrange(10_000), [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        for _ in range(group):
            ids = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))]
            logprobs = [struct.unpack("<f", struct.pack("<f", -rng.random()))[0] for _ in ids]
            reward = rng.choice((None, 0.0, 1.0, -0.0, rng.gauss(0, 1e9)))
            completions.append(Completion(index, prompt, ids, logprobs, reward, rng.random() < 0.3))
    return RolloutBatch(rng.randrange(100), rng.randrange(100), group, completions)


@pytest.mark.parametrize("seed", range(15))
def test_rollouts_come_back_a_failed_reward_included(seed: int) -> None:
    sent = some_rollouts(seed)
    assert read_rollouts(from_bytes(Rollouts, to_bytes(rollouts_message(sent))), VOCAB) == sent


def test_a_failed_reward_travels_as_nan_and_a_prompt_once() -> None:
    prompt = [1, 2, 3]
    completions = [Completion(5, prompt, [4], [-0.5], reward, False) for reward in (None, 1.0)]
    message = rollouts_message(RolloutBatch(0, 0, 2, completions))
    assert math.isnan(struct.unpack("<2d", message.rewards)[0])
    assert message.prompt_ids == u32(*prompt)
    assert [c.reward for c in read_rollouts(message, VOCAB).completions] == [None, 1.0]


HOSTILE_ROLLOUTS: dict[str, Callable[[Rollouts], dict[str, Any]]] = {
    "no groups": lambda m: {"group_size": 0},
    "other groups": lambda m: {"group_size": 3},
    "huge groups": lambda m: {"group_size": 2**32 - 1},
    "nothing at all": lambda m: vars(Rollouts(group_size=2)),
    "a prompt index less": lambda m: {"prompt_indices": m.prompt_indices[:-4]},
    "half a prompt index": lambda m: {"prompt_indices": m.prompt_indices[:-1]},
    "a prompt length less": lambda m: {"prompt_lengths": m.prompt_lengths[:-4]},
    "a prompt too long": lambda m: {"prompt_lengths": u32(2, 3)},
    "a prompt of 4 GiB": lambda m: {"prompt_lengths": u32(2, 2**32 - 1)},
    "an empty prompt": lambda m: {"prompt_lengths": u32(0, 4)},
    "a completion length less": lambda m: {"completion_lengths": m.completion_lengths[:-4]},
    "an empty completion": lambda m: {"completion_lengths": u32(0, 2, 1, 1)},
    "a completion of 4 GiB": lambda m: {"completion_lengths": u32(1, 1, 1, 2**32 - 1)},
    "a prompt id outside": lambda m: {"prompt_ids": u32(1, 2, 3, VOCAB)},
    "an id outside": lambda m: {"completion_ids": u32(1, 2, 3, 2**32 - 1)},
    "an id less": lambda m: {"completion_ids": m.completion_ids[:-4]},
    "half an id": lambda m: {"completion_ids": m.completion_ids[:-1]},
    "a log-prob less": lambda m: {"logprobs": m.logprobs[:-4]},
    "half a log-prob": lambda m: {"logprobs": m.logprobs[:-2]},
    "a reward less": lambda m: {"rewards": m.rewards[:-8]},
    "half a reward": lambda m: {"rewards": m.rewards[:-4]},
    "an infinite reward": lambda m: {"rewards": struct.pack("<4d", 1, math.inf, 0, 0)},
    "a truncation less": lambda m: {"truncated": b"\0\0\0"},
}


def four_rollouts() -> Rollouts:
    completions = [Completion(g, [g + 1, g + 2], [i + 1], [-0.5], float(i), False) for g in (0, 1) for i in (0, 1)]
    return rollouts_message(RolloutBatch(4, 2, 2, completions))


@pytest.mark.parametrize("change", HOSTILE_ROLLOUTS.values(), ids=HOSTILE_ROLLOUTS)
def test_hostile_rollouts_are_a_bad_frame(change: Callable[[Rollouts], dict[str, Any]]) -> None:
    message = four_rollouts()
    assert len(read_rollouts(message, VOCAB).completions) == 4
    with pytest.raises(BadFrame) as caught:
        read_rollouts(replace(message, **change(message)), VOCAB)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_changed_at_random_are_rollouts_or_a_bad_frame(seed: int) -> None:
    rng = random.Random(seed)
    for make, read in (
        (four_rollouts, lambda m: read_rollouts(m, VOCAB)),
        (lambda: GOOD, lambda m: read_batch(m, SIZE, VOCAB)),
    ):
        data = bytearray(to_bytes(make()))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read(from_bytes(type(make()), bytes(data)))
        except BadFrame:
            continue


@pytest.mark.parametrize("reward", [1e200, -1e308, float("inf")])
def test_a_reward_whose_square_overflows_is_refused(reward: float) -> None:
    completions = [Completion(0, [3], [4], [-1.0], float(i), False) for i in range(2)]
    message = rollouts_message(RolloutBatch(0, 0, 2, completions))
    message.rewards = struct.pack("<2d", 0.0, reward)
    with pytest.raises(BadFrame, match="reward"):
        read_rollouts(message, 18)
