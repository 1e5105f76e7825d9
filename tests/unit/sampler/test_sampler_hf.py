"""The transformers engine on tiny random models: log-probs, end tokens, padding, weights, projections, randomness."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from swarm_worker.sampler.engine import Engine, Generation, ProjectingEngine
from swarm_worker.sampler.errors import EngineError
from swarm_worker.sampler.hf import HfEngine

VOCAB, EOS = 13, [1, 5]
PROMPTS = [[2, 3, 4], [6], [7, 8, 9, 10, 11, 12, 2], [3, 3]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied random Qwen2 whose generation config has two end tokens and settings that bend the distribution."""
    path = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=3, top_p=0.5, repetition_penalty=1.7, eos_token_id=EOS, pad_token_id=1
    )
    model.save_pretrained(path)
    return path


@pytest.fixture
def engine(checkpoint: Path) -> HfEngine:
    return HfEngine(checkpoint)


def full_forward_logprobs(engine: HfEngine, prompt: list[int], done: Generation, temperature: float) -> Tensor:
    ids = torch.tensor([prompt + done.completion_ids])
    with torch.no_grad():
        logits_TV = engine._model(input_ids=ids).logits[0].double() / temperature
    rows = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
    return rows[torch.arange(len(done.completion_ids)), torch.tensor(done.completion_ids)]


def state_of(engine: HfEngine) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine._model.named_parameters()}


def test_it_keeps_the_promises_of_the_protocols(engine: HfEngine) -> None:
    one: Engine = engine
    other: ProjectingEngine = engine
    assert one.version == other.version == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_logprobs_are_those_of_a_full_forward(engine: HfEngine, temperature: float) -> None:
    for done in engine.generate(PROMPTS, 5, temperature, 12, seed=3):
        wanted = full_forward_logprobs(engine, PROMPTS[done.prompt_index], done, temperature)
        assert (wanted - torch.tensor(done.logprobs)).abs().max() < 1e-4


def test_completions_stand_in_order_and_end_at_the_first_end_token(engine: HfEngine) -> None:
    done = engine.generate(PROMPTS, 16, 1.0, 6, seed=1)
    assert [g.prompt_index for g in done] == [index for index in range(4) for _ in range(16)]
    assert {g.completion_ids[-1] for g in done if not g.truncated} == set(EOS)
    for g in done:
        assert len(g.completion_ids) == len(g.logprobs) <= 6
        assert not set(g.completion_ids[:-1]) & set(EOS)
        assert g.truncated == (g.completion_ids[-1] not in EOS)
        if g.truncated:
            assert len(g.completion_ids) == 6
    assert any(g.truncated for g in done)


def test_the_whole_distribution_is_sampled(engine: HfEngine) -> None:
    """The checkpoint asks for top-k 3, top-p 0.5 and a penalty: none of it may reach the samples."""
    prompt = [2, 3, 4]
    done = engine.generate([prompt], 4000, 1.0, 1, seed=5)
    with torch.no_grad():
        probabilities = engine._model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([g.completion_ids[0] for g in done]), minlength=VOCAB)
    deviation = (counts / 4000 - probabilities) / (probabilities * (1 - probabilities) / 4000).sqrt()
    assert deviation.abs().max() < 4.5
    assert (counts > 0).sum() > 8


def test_greedy_is_the_best_token_each_time(engine: HfEngine) -> None:
    for done in engine.generate(PROMPTS, 1, 0.0, 8, seed=0):
        ids = list(PROMPTS[done.prompt_index])
        for token, logprob in zip(done.completion_ids, done.logprobs, strict=True):
            with torch.no_grad():
                row = engine._model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert token == int(row.argmax())
            assert math.isclose(logprob, float(row[token]), abs_tol=1e-4)
            ids.append(token)


def test_seeds_decide_and_the_callers_generator_is_left_alone(engine: HfEngine) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = engine.generate(PROMPTS, 4, 1.0, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert engine.generate(PROMPTS, 4, 1.0, 8, seed=3) == first
    assert engine.generate(PROMPTS, 4, 1.0, 8, seed=4) != first


def test_slices_bound_the_batch_and_are_not_copies(checkpoint: Path) -> None:
    engine = HfEngine(checkpoint, sequences_per_call=4)
    done = engine.generate([[2, 3]], 12, 1.0, 10, seed=0)
    assert len(done) == 12
    texts = [tuple(g.completion_ids) for g in done]
    assert texts[:4] != texts[4:8]


def test_tied_checkpoints_are_untied(engine: HfEngine) -> None:
    assert engine.was_tied
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(engine.parameter_names)
    state = state_of(engine)
    before = engine.generate(PROMPTS, 2, 0.0, 4, seed=0)
    state["lm_head.weight"].zero_()
    engine.load_weights(state, 1)
    after = engine.generate(PROMPTS, 2, 0.0, 4, seed=0)
    assert after != before
    assert after[0].logprobs[0] == pytest.approx(-math.log(VOCAB))


def test_weights_arrive_stage_by_stage_and_act_all_at_once(engine: HfEngine) -> None:
    state = {name: tensor * 0.5 for name, tensor in state_of(engine).items()}
    stages = [dict(list(state.items())[first : first + 20]) for first in range(0, len(state), 20)]
    assert len(stages) > 2
    old = engine.generate(PROMPTS, 2, 1.0, 6, seed=0)
    for stage in stages[:-1]:
        engine.load_weights(stage, 4)
        assert engine.version == 0
        assert engine.generate(PROMPTS, 2, 1.0, 6, seed=0) == old
    assert engine.missing_names == frozenset(stages[-1])
    stages[0][next(iter(stages[0]))].zero_()  # what was handed over is copied, not kept
    engine.load_weights(stages[-1], 4)
    assert (engine.version, engine.missing_names) == (4, frozenset())
    loaded = state_of(engine)
    first_name = next(iter(state))
    assert loaded[first_name].abs().sum() > 0
    assert all(torch.equal(loaded[name], state[name]) for name in state if name != first_name)


def test_an_unfinished_version_is_dropped_for_another(engine: HfEngine) -> None:
    state = state_of(engine)
    names = list(state)
    engine.load_weights({name: state[name] * 2 for name in names[:5]}, 1)
    engine.load_weights({name: state[name] * 3 for name in names[5:]}, 2)
    assert engine.version == 0
    assert engine.missing_names == frozenset(names[:5])
    engine.load_weights({name: state[name] * 3 for name in names[:5]}, 2)
    assert engine.version == 2
    assert all(torch.equal(tensor, state[name] * 3) for name, tensor in state_of(engine).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}, "no tensor 'model.layers.9.mlp.up_proj.weight'"),
        ({"model.norm.weight": torch.zeros(31)}, r"shape \[31\], wanted \[32\]"),
    ],
)
def test_foreign_weights_change_nothing(engine: HfEngine, change: dict[str, Tensor], words: str) -> None:
    before = state_of(engine)
    with pytest.raises(EngineError, match=words):
        engine.load_weights({name: tensor + 1 for name, tensor in before.items()} | change, 1)
    assert engine.version == 0
    assert engine.missing_names == frozenset()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(engine).items())


def rank_projection(seed: int, rank: int) -> Tensor:
    q_HR = torch.linalg.qr(torch.randn(32, rank, generator=torch.Generator().manual_seed(seed)))[0]
    return q_HR @ q_HR.T


def test_projected_generation_equals_a_projected_full_forward(engine: HfEngine) -> None:
    """With prompts of several lengths in one left-padded batch and a cache, as without either."""
    p_HH, r_HH = rank_projection(1, 20), rank_projection(2, 24)
    widths: list[tuple[int, ...]] = []

    def first(h_NH: Tensor) -> Tensor:
        widths.append(tuple(h_NH.shape))
        return h_NH @ p_HH

    with engine.projected({1: first, 3: lambda h_NH: (h_NH @ r_HH).double()}):
        done = engine.generate(PROMPTS, 3, 1.0, 8, seed=2)
    assert widths[0] == (3 * sum(map(len, PROMPTS)), 32)  # real tokens only
    layers = engine._model.model.layers
    handles = [
        layers[0].register_forward_hook(lambda module, args, output: output @ p_HH),
        layers[2].register_forward_hook(lambda module, args, output: output @ r_HH),
    ]
    compressed = [full_forward_logprobs(engine, PROMPTS[g.prompt_index], g, 1.0) for g in done]
    for handle in handles:
        handle.remove()
    plain = [full_forward_logprobs(engine, PROMPTS[g.prompt_index], g, 1.0) for g in done]
    found = torch.cat([torch.tensor(g.logprobs) for g in done])
    assert (torch.cat(compressed) - found).abs().max() < 1e-4
    assert (torch.cat(plain) - found).abs().max() > 1e-2


def test_projections_end_with_their_context(engine: HfEngine) -> None:
    before = engine.generate(PROMPTS, 2, 1.0, 6, seed=0)
    with engine.projected({2: lambda h_NH: h_NH}):
        assert engine.generate(PROMPTS, 2, 1.0, 6, seed=0) == before

    def broken(h_NH: Tensor) -> Tensor:
        raise RuntimeError("no basis")

    with pytest.raises(RuntimeError, match="no basis"), engine.projected({2: broken}):
        engine.generate(PROMPTS, 2, 1.0, 6, seed=0)
    assert engine.generate(PROMPTS, 2, 1.0, 6, seed=0) == before


@pytest.mark.parametrize("key", [0, 4, -1])
def test_only_boundaries_between_layers_can_be_projected(engine: HfEngine, key: int) -> None:
    with (
        pytest.raises(EngineError, match=r"wanted layer indices in \[1, 3\]"),
        engine.projected({key: lambda h_NH: h_NH}),
    ):
        pass


@pytest.mark.parametrize(
    ("prompts", "n", "temperature", "limit", "words"),
    [
        ([[]], 1, 1.0, 4, "prompt 0 has no token"),
        ([[2]], 0, 1.0, 4, "n=0"),
        ([[2]], 1, -0.5, 4, "temperature=-0.5"),
        ([[2]], 1, 1.0, 0, "max_new_tokens=0"),
        ([[2], [2] * 38], 1, 1.0, 4, "prompt 1 has 38 tokens and may get 4 more, but the model reads 40"),
    ],
)
def test_impossible_requests_are_refused(
    engine: HfEngine, prompts: list[list[int]], n: int, temperature: float, limit: int, words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        engine.generate(prompts, n, temperature, limit, seed=0)


def test_llama_in_bfloat16_with_one_end_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, eos_token_id=4, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    engine = HfEngine(tmp_path, dtype=torch.bfloat16)
    assert not engine.was_tied
    assert engine.eos_ids == {4}
    done = engine.generate(PROMPTS, 8, 1.0, 20, seed=0)
    assert {g.completion_ids[-1] for g in done if not g.truncated} == {4}
    engine.load_weights({name: tensor.float() for name, tensor in state_of(engine).items()}, 1)
    assert engine.generate(PROMPTS, 8, 1.0, 20, seed=0) == done


def test_a_checkpoint_without_end_tokens_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    config.eos_token_id = None
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig()
    model.save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="names no end token"):
        HfEngine(tmp_path)
