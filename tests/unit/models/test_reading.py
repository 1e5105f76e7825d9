"""A stage reads its own tensors, and a chain of stages from disk is the model in one piece."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from swarm_core.learning.partition import Span, partition, whole
from swarm_core.learning.stage import Stage
from swarm_core.models import reading
from swarm_core.models.architecture import ModelError, hf_config, read_shape
from swarm_core.models.reading import load_stage, load_tokenizer, open_stage, tensor_names, tensor_shapes

Make = Callable[..., Path]
NAMES = ["llama", "llama-biased", "qwen2-tied", "qwen3"]


def untied_reference(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa", tie_word_embeddings=False
    )
    if read_shape(path).tied:
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    return model


def run_chain(chain: list[Stage], ids_BT: Tensor, weights_BTV: Tensor) -> Tensor:
    inputs, outputs, x = [], [], ids_BT
    for stage in chain:
        inputs.append(x)
        outputs.append(stage(x))
        x = outputs[-1].detach().requires_grad_()
    logits = chain[-1].lm_head(outputs[-1])
    (logits * weights_BTV).sum().backward()
    for s in range(len(chain) - 2, -1, -1):
        outputs[s].backward(inputs[s + 1].grad)
    return logits.detach()


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_chain_read_from_disk_has_the_bits_of_the_model(checkpoint: Make, name: str, stages: int) -> None:
    path = checkpoint(name)
    generator = torch.Generator().manual_seed(4)
    ids_BT = torch.randint(0, 53, (2, 13), generator=generator)
    weights_BTV = torch.randn(2, 13, 53, generator=generator)
    model = untied_reference(path)
    logits = model(ids_BT).logits
    (logits * weights_BTV).sum().backward()
    chain = [open_stage(path, span) for span in partition(read_shape(path), stages)]
    assert torch.equal(run_chain(chain, ids_BT, weights_BTV), logits.detach())
    got = {n: p for stage in chain for n, p in stage.hf_named_parameters()}
    want = dict(model.named_parameters())
    assert list(got) == list(want)
    for n, parameter in want.items():
        assert torch.equal(got[n], parameter), n
        assert got[n].grad is not None and torch.equal(got[n].grad, parameter.grad), n


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_transformers(checkpoint: Make, name: str) -> None:
    path = checkpoint(name)
    shape = read_shape(path)
    want = [(n, tuple(p.shape)) for n, p in untied_reference(path).named_parameters()]
    assert list(tensor_shapes(shape, whole(shape)).items()) == want
    joined = [n for span in partition(shape, 3) for n in tensor_names(shape, span)]
    assert joined == [n for n, _ in want]


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_sharded_checkpoints_read_the_same(checkpoint: Make, name: str, tmp_path: Path) -> None:
    single = checkpoint(name)
    moved = tmp_path / "single"
    single.rename(moved)
    sharded = checkpoint(name, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2 and (sharded / "model.safetensors.index.json").is_file()
    for span in partition(read_shape(moved), 3):
        one, other = load_stage(moved, span), load_stage(sharded, span)
        assert list(one) == list(other)
        assert all(torch.equal(one[n], other[n]) for n in one)


class CountingFile:
    """safe_open, noting which tensors were taken out of it."""

    taken: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.inner = safe_open(*args, **kwargs)

    def __enter__(self) -> Self:
        self.opened = self.inner.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self.inner.__exit__(*args)

    def get_tensor(self, name: str) -> Tensor:
        CountingFile.taken.append(name)
        return self.opened.get_tensor(name)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_a_stage_reads_and_holds_only_its_share(
    checkpoint: Make, name: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(name, **options)
    shape = read_shape(path)
    monkeypatch.setattr(reading, "safe_open", CountingFile)
    for span in partition(shape, 3):
        CountingFile.taken = []
        state = load_stage(path, span)
        sources = {"lm_head.weight": "model.embed_tokens.weight"} if shape.tied else {}
        assert sorted(CountingFile.taken) == sorted(sources.get(n, n) for n in tensor_names(shape, span))
        share = 4 * sum(torch.Size(dims).numel() for dims in tensor_shapes(shape, span).values())
        assert sum(t.untyped_storage().nbytes() for t in state.values()) <= share * 1.1
        stage = open_stage(path, span)
        held = [*stage.parameters(), *stage.buffers()]
        assert sum(t.untyped_storage().nbytes() for t in held) <= share * 1.1


def test_tensors_outlive_their_file(checkpoint: Make) -> None:
    path = checkpoint("llama")
    state = load_stage(path, whole(read_shape(path)))
    before = {n: t.clone() for n, t in state.items()}
    (path / "model.safetensors").write_bytes(b"")
    assert all(torch.equal(state[n], before[n]) for n in state)


def test_both_ends_of_a_tied_model_have_a_copy_of_their_own(checkpoint: Make) -> None:
    path = checkpoint("qwen2-tied")
    stage = open_stage(path, whole(read_shape(path)))
    embedding, head = stage.model.embed_tokens.weight, stage.lm_head_weight
    assert torch.equal(embedding, head)
    assert embedding.data_ptr() != head.data_ptr()
    last = partition(read_shape(path), 2)[1]
    assert list(load_stage(path, last))[-1] == "lm_head.weight"


def test_a_tied_checkpoint_with_a_stray_head_is_read_as_transformers_reads_it(checkpoint: Make) -> None:
    path = checkpoint("qwen2-tied")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    state = load_stage(path, whole(read_shape(path)))
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_converted(checkpoint: Make, dtype: torch.dtype) -> None:
    path = checkpoint("qwen3")
    stage = open_stage(path, partition(read_shape(path), 2)[0], dtype)
    assert {p.dtype for p in stage.parameters()} == {dtype}
    assert stage.rotary.inv_freq.dtype == torch.float32


def one_line(caught: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(caught.value)
    assert "\n" not in text and "got " in text and "wanted " in text
    return text


def test_a_missing_tensor(checkpoint: Make) -> None:
    path = checkpoint("llama")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    shape = read_shape(path)
    with pytest.raises(ModelError, match=r"tensor model.layers.1.mlp.up_proj.weight .* wanted shape \[56, 32\]") as e:
        load_stage(path, whole(shape))
    one_line(e)
    load_stage(path, partition(shape, 2)[1])  # the other stage does not need it


def test_a_wrong_shape_and_a_wrong_dtype(checkpoint: Make) -> None:
    path = checkpoint("llama")
    tensors = load_file(path / "model.safetensors")
    good = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, path / "model.safetensors")
    span = whole(read_shape(path))
    with pytest.raises(ModelError, match=r"model.norm.weight .* got shape \[31\], wanted \[32\] by config.json") as e:
        load_stage(path, span)
    one_line(e)
    tensors["model.norm.weight"] = good.to(torch.int8)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match="got dtype I8, wanted F64 or F32 or BF16 or F16") as e:
        load_stage(path, span)
    one_line(e)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_file(checkpoint: Make, keep: float) -> None:
    path = checkpoint("llama")
    span = whole(read_shape(path))
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else int(keep)])
    says = "a whole safetensors header" if keep in (0, 5, 100) else r"\d+ bytes by its header"
    with pytest.raises(
        ModelError, match=rf"model.safetensors: got \d+ bytes, wanted {says}; .* copy the file again"
    ) as e:
        load_stage(path, span)
    one_line(e)


def test_a_damaged_header(checkpoint: Make) -> None:
    path = checkpoint("llama")
    span = whole(read_shape(path))
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    with pytest.raises(ModelError, match="damaged header") as e:
        load_stage(path, span)
    one_line(e)


def test_offsets_that_lie_are_caught_by_safetensors_itself(checkpoint: Make) -> None:
    path = checkpoint("llama")
    span = whole(read_shape(path))
    file = path / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b'"dtype":"F32"') > 3
    file.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"F64"', 1))
    with pytest.raises(ModelError, match="model.safetensors") as e:
        load_stage(path, span)
    one_line(e)


def test_missing_files_of_a_sharded_checkpoint(checkpoint: Make) -> None:
    path = checkpoint("llama", max_shard_size="20KB")
    shape = read_shape(path)
    index = path / "model.safetensors.index.json"
    first = min(path.glob("*.safetensors"))
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(ModelError, match=f"{first.name}: got no such file") as e:
        load_stage(path, whole(shape))
    one_line(e)
    first.write_bytes(kept)
    text = index.read_text()
    index.write_text(text.replace(first.name, "../" + first.name))
    with pytest.raises(ModelError, match="no usable weight_map"):
        load_stage(path, whole(shape))
    index.write_text(text.replace("model.norm.weight", "model.normal.weight"))
    with pytest.raises(ModelError, match=r"tensor model.normal.weight: got not in"):
        load_stage(path, whole(shape))
    index.write_text("{")
    with pytest.raises(ModelError, match=r"index.json: got Expecting") as e:
        load_stage(path, whole(shape))
    one_line(e)
    index.unlink()
    with pytest.raises(ModelError, match=r"no weights but model-00001.* wanted model.safetensors or model.safeten"):
        load_stage(path, whole(shape))


def test_a_config_with_too_few_layers_is_not_believed(checkpoint: Make) -> None:
    path = checkpoint("llama")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
    with pytest.raises(ModelError, match=r"got layers up to 3, wanted 3 layers \(0..2\)") as e:
        load_stage(path, whole(read_shape(path)))
    one_line(e)


def test_a_span_of_another_model(checkpoint: Make) -> None:
    path = checkpoint("llama")
    with pytest.raises(ModelError, match="a cut of the model's 4 layers"):
        load_stage(path, Span(1, 2, 3, 5))
    with pytest.raises(ModelError, match="a cut of the model's 4 layers"):
        load_stage(path, Span(1, 2, 1, 3))


def test_a_config_that_only_transformers_refuses(checkpoint: Make) -> None:
    path = checkpoint("llama")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": "none"'))
    read_shape(path)
    with pytest.raises(ModelError, match="a config that transformers .* reads") as e:
        hf_config(path)
    one_line(e)


def test_tokenizers(checkpoint: Make, tmp_path: Path) -> None:
    path = checkpoint("llama")
    with pytest.raises(ModelError, match="copy the tokenizer files") as e:
        load_tokenizer(path)
    one_line(e)
    with pytest.raises(ModelError, match="no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no vocabulary.*copy the tokenizer files"):
        load_tokenizer(checkpoint("qwen2-tied"))  # of its config alone transformers makes one without a word in it
    write_tokenizer(path)
    assert load_tokenizer(path).encode("1 2", add_special_tokens=False) == [4, 5]


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "0": 3, "1": 4, "2": 5}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    made.chat_template = "{{ messages[0].content }}"
    staged = path / "staged"
    made.save_pretrained(staged)
    for file in staged.iterdir():
        shutil.move(str(file), path / file.name)
    staged.rmdir()
