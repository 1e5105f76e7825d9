"""A chain of stages against transformers' model in one piece: equal bits, forward and backward."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from swarm_core.learning.partition import Span
from swarm_core.learning.stage import Stage, StageError, build_stage

COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**COMMON),
    "llama-biased": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE),
    "qwen2": Qwen2Config(**COMMON, pad_token_id=0),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
}
SPLITS = {1: [0, 4], 2: [0, 3, 4], 3: [0, 1, 3, 4]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(7)
    config = copy.deepcopy(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # no norm weight of exactly one, no bias of exactly zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def cut(model: Any, stages: int, dtype: torch.dtype = torch.float32, recompute: bool = False) -> list[Stage]:
    edges, state, chain = SPLITS[stages], model.state_dict(), []
    for s in range(stages):
        span = Span(s, stages, edges[s], edges[s + 1])
        keep = {f"model.layers.{i}." for i in span.layers}
        own = {
            n: t.clone()
            for n, t in state.items()
            if any(n.startswith(k) for k in keep)
            or (span.is_first and n == "model.embed_tokens.weight")
            or (span.is_last and n in ("model.norm.weight", "lm_head.weight"))
        }
        chain.append(build_stage(model.config, span, own, dtype, recompute=recompute))
    return chain


def ids(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def chain_step(chain: list[Stage], ids_BT: Tensor, weights_BTV: Tensor) -> tuple[Tensor, Tensor]:
    """As the wire does it: every stage has its own graph, only h and dL/dh pass between them."""
    inputs, outputs, x = [], [], ids_BT
    for stage in chain:
        inputs.append(x)
        outputs.append(stage(x))
        x = outputs[-1].detach().requires_grad_()
    logits = chain[-1].lm_head(outputs[-1])
    (logits * weights_BTV).sum().backward()
    for s in range(len(chain) - 2, -1, -1):
        outputs[s].backward(inputs[s + 1].grad)
    return outputs[-1].detach(), logits.detach()


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_chain_is_bit_identical_with_the_model_in_one_piece(name: str, stages: int) -> None:
    model, ids_BT = reference(name), ids()
    weights = torch.randn(3, 17, 61, generator=torch.Generator().manual_seed(2))
    h_BTH = model.model(ids_BT).last_hidden_state
    logits = model.lm_head(h_BTH)
    (logits * weights).sum().backward()
    for recompute in (False, True):
        chain = cut(model, stages, recompute=recompute)
        got_h, got_logits = chain_step(chain, ids_BT, weights)
        assert torch.equal(got_h, h_BTH.detach())
        assert torch.equal(got_logits, logits.detach())
        got = [pair for stage in chain for pair in stage.hf_named_parameters()]
        assert [n for n, _ in got] == [n for n, _ in model.named_parameters()]
        for (n, parameter), (_, whole) in zip(got, model.named_parameters(), strict=True):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, n
            assert torch.equal(parameter.grad, whole.grad), n


def test_pad_rows_on_the_right_change_no_real_row() -> None:
    chain = cut(reference("qwen3"), 2)
    short = ids(2, 9)
    padded = torch.cat([short, torch.full((2, 5), 3)], dim=1)
    assert torch.allclose(chain[1](chain[0](padded))[:, :9], chain[1](chain[0](short)), atol=1e-6)


@pytest.mark.parametrize("pieces", [[17], [5, 1, 1, 10], [16, 1]])
def test_a_cache_continues_where_it_ended(pieces: list[int]) -> None:
    model, ids_BT = reference("qwen2"), ids()
    chain = cut(model, 3)
    with torch.no_grad():
        want = model.model(ids_BT).last_hidden_state
        caches, parts = [DynamicCache() for _ in chain], []
        for piece in ids_BT.split(pieces, dim=1):
            x = piece
            for stage, cache in zip(chain, caches, strict=True):
                x = stage(x, cache=cache)
            parts.append(x)
    assert torch.allclose(torch.cat(parts, dim=1), want, atol=1e-5)


def test_rotary_frequencies_survive_meta_moves_and_casts() -> None:
    model = reference("llama-biased")
    stage = cut(model, 2)[1]
    want = model.model.rotary_emb.inv_freq
    assert torch.equal(stage.rotary.inv_freq, want)
    plain = 1.0 / (500000.0 ** (torch.arange(0, 12, 2).float() / 12))
    assert not torch.equal(want, plain), "the config's scaling is in use"
    for move in (lambda s: s.to(torch.bfloat16), lambda s: s.double(), lambda s: s.to("meta").to_empty(device="cpu")):
        moved = move(stage)
        assert moved.rotary.inv_freq.dtype == torch.float32
        assert torch.equal(moved.rotary.inv_freq, want)
    assert "rotary" not in "".join(stage.state_dict())


class RealBytes(TorchDispatchMode):
    """Counts the bytes of every storage that comes into being outside the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.kept: list[Tensor] = []  # a freed storage would give its address to the next one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self.seen[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
                self.kept.append(leaf)
        return out


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_building_a_stage_allocates_nothing_but_its_share(stage: int) -> None:
    model = reference("qwen2")
    edges = SPLITS[3]
    built = cut(model, 3)[stage]
    own = {n: p.detach() for n, p in built.hf_named_parameters()}
    share = sum(t.nbytes for t in own.values())
    gc.collect()
    with RealBytes() as counted:
        again = build_stage(model.config, Span(stage, 3, edges[stage], edges[stage + 1]), own, torch.float32)
    given = {t.untyped_storage().data_ptr() for t in own.values()}
    fresh = sum(size for pointer, size in counted.seen.items() if pointer not in given)
    assert fresh <= share / 10
    held = [*again.parameters(), *again.buffers()]
    assert all(t.device.type == "cpu" for t in held)
    assert sum(t.untyped_storage().nbytes() for t in held) <= share * 1.1
    assert share < 0.75 * sum(p.nbytes for p in model.parameters())


def test_dropout_in_the_config_is_never_active() -> None:
    model = reference("qwen2")
    model.config.attention_dropout = 0.5
    stage = cut(model, 1)[0].train()
    assert torch.equal(stage(ids()), stage(ids()))
    assert model.config.attention_dropout == 0.5, "the caller's config is left alone"


def test_autocast_over_fp32_parameters() -> None:
    model = reference("qwen3")
    chain = cut(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = chain[1](chain[0](ids()))
        want = model.model(ids()).last_hidden_state
    assert torch.equal(out, want)
    exact = chain[1](chain[0](ids()))
    assert 0 < (out - exact).abs().max() < 0.3
    out.sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in chain[1].model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_match_the_model(dtype: torch.dtype) -> None:
    model = reference("llama", dtype)
    chain = cut(model, 2, dtype)
    assert torch.equal(chain[1](chain[0](ids())), model.model(ids()).last_hidden_state)


def test_one_config_can_build_many_stages_and_stays_as_it_was() -> None:
    model = reference("qwen2")
    model.config._attn_implementation = "eager"
    cut(model, 3)
    assert model.config._attn_implementation == "eager"


def test_wrong_inputs_are_refused() -> None:
    chain = cut(reference("llama"), 2)
    with pytest.raises(StageError, match="ids_BT int64"):
        chain[0](torch.zeros(2, 3))
    with pytest.raises(StageError, match="H=48"):
        chain[1](torch.zeros(2, 3, 47))
    with pytest.raises(StageError, match="H=48"):
        chain[1](ids())
    with pytest.raises(StageError, match="the last stage"):
        _ = chain[0].lm_head_weight
    assert chain[1].lm_head_weight is chain[1].lm_head.weight


def test_wrong_parts_are_refused() -> None:
    model = reference("llama")
    own = {n: p.detach() for n, p in cut(model, 2)[0].hf_named_parameters()}
    span = Span(0, 2, 0, 3)
    with pytest.raises(StageError, match=r"1 missing \['model.embed_tokens.weight'\] and 0 unknown"):
        build_stage(model.config, span, {n: t for n, t in own.items() if "embed" not in n}, torch.float32)
    with pytest.raises(StageError, match=r"1 unknown \['lm_head.weight'\]"):
        build_stage(model.config, span, {**own, "lm_head.weight": torch.zeros(1)}, torch.float32)
    wrong = {**own, "model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(StageError, match=r"got \[2, 2\], wanted \[80, 48\]"):
        build_stage(model.config, span, wrong, torch.float32)
    with pytest.raises(StageError, match="a cut of 4 layers"):
        build_stage(model.config, Span(0, 1, 0, 3), own, torch.float32)
    with pytest.raises(StageError, match="hf_config"):
        build_stage("some/path", span, own, torch.float32)
    windowed = Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(StageError, match="full attention in every layer"):
        build_stage(windowed, span, own, torch.float32)
