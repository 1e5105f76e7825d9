"""Builds the tiny example: a character-level Qwen2 that adds two-digit numbers and is right about half of the time.

Everything a first run needs lies beside this file and is rebuilt by one command, on one core, from fixed seeds:

    python examples/tiny/build.py            # writes model/ and data/ next to this file

The model is trained from nothing by supervised learning on prompts like `12+34=`. First the labels are right, until
the model can add; then nearly half of them are wrong (drawn anew each time they are shown, so there is nothing to
memorise), until the probability it gives to the right answer has settled near one half. Sampled at temperature 1 it
is therefore right about every second time: groups of completions have both outcomes in them, which is what GRPO
needs in order to learn anything. Greedy decoding is right nearly always.

`--data-only` writes the two JSONL files and leaves the model alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).resolve().parent
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
VOCABULARY = [PAD, EOS, UNK, *"0123456789+-*= "]
PAD_ID, EOS_ID = 0, 1

SMALLEST, LARGEST = 10, 99
PROMPT_TOKENS = 6  # "12+34="
ANSWER_TOKENS = 4  # at most three digits, then <eos>
TRAIN_ROWS, VALIDATION_ROWS = 3000, 500
DATA_SEED, MODEL_SEED = 20, 7


@dataclass(frozen=True)
class Shape:
    """The sizes of the Qwen2 that is built; these are the tiny example's."""

    hidden: int = 96
    intermediate: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    initializer_range: float = 0.1  # at this width five times the usual: it learns to carry in 400 steps, not in 1200


@dataclass(frozen=True)
class Recipe:
    """The two phases of supervised training; the step counts fit in about two minutes on one core."""

    batch: int = 96
    clean_steps: int = 1000
    noisy_steps: int = 600
    warmup_steps: int = 50
    peak_lr: float = 2e-3
    final_lr: float = 1e-4
    weight_decay: float = 0.01
    wrong_share: float = 0.42  # the rest of the way to one half is what it never learns quite sharply


def split_pairs(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All sums, split in (train, validation) so that `a+b` and `b+a` are always on the same side."""
    numbers = range(SMALLEST, LARGEST + 1)
    unordered = [(a, b) for a in numbers for b in numbers if a <= b]
    random.Random(seed).shuffle(unordered)
    ordered = [pair for a, b in unordered for pair in ([(a, b), (b, a)] if a != b else [(a, b)])]
    validation, train = ordered[:VALIDATION_ROWS], ordered[VALIDATION_ROWS + 1 :]
    rng = random.Random(seed + 1)
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def write_rows(path: Path, pairs: list[tuple[int, int]]) -> None:
    """One `{"prompt", "answer"}` object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_tokenizer() -> Qwen2Tokenizer:
    """One token a character, none added by itself: Qwen2's byte-level BPE without any merge.

    It has to be that class: transformers reads every checkpoint of type qwen2 with it, whatever tokenizer.json says.
    Characters outside the vocabulary leave no token.
    """
    vocabulary = {token.replace(" ", "\u0120"): i for i, token in enumerate(VOCABULARY)}  # how that BPE writes a space
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=EOS, pad_token=PAD, unk_token=UNK, model_max_length=64)


def build_model(shape: Shape, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, float32; embedding and lm_head are one tensor."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=64,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen2ForCausalLM(config)


def encode_sums(pairs: list[tuple[int, int]], answers: list[int]) -> Tensor:
    """ids_BT with T = PROMPT_TOKENS + ANSWER_TOKENS, padded after `<eos>`."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    rows = []
    for (a, b), answer in zip(pairs, answers, strict=True):
        row = [ids[c] for c in f"{a}+{b}={answer}"] + [EOS_ID]
        rows.append(row + [PAD_ID] * (PROMPT_TOKENS + ANSWER_TOKENS - len(row)))
    return torch.tensor(rows)


def wrong_answer(right: int, rng: random.Random) -> int:
    """Any other number that is a possible sum."""
    candidate = rng.randint(2 * SMALLEST, 2 * LARGEST - 1)
    return candidate + 1 if candidate >= right else candidate


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warmup, then linear decay over both phases."""
    total = recipe.clean_steps + recipe.noisy_steps
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, total - recipe.warmup_steps)
    return recipe.peak_lr + (recipe.final_lr - recipe.peak_lr) * done


def train(model: Qwen2ForCausalLM, pairs: list[tuple[int, int]], recipe: Recipe, seed: int) -> None:
    """Supervised training on the answer tokens, first with right labels, then with `wrong_share` of them wrong."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    started = time.monotonic()
    for step in range(recipe.clean_steps + recipe.noisy_steps):
        noisy = step >= recipe.clean_steps
        batch = rng.sample(pairs, recipe.batch)
        answers = [wrong_answer(a + b, rng) if noisy and rng.random() < recipe.wrong_share else a + b for a, b in batch]
        ids_BT = encode_sums(batch, answers)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        logits = model(input_ids=ids_BT[:, :-1], logits_to_keep=ANSWER_TOKENS).logits
        targets_BA = ids_BT[:, PROMPT_TOKENS:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BA.flatten(), ignore_index=PAD_ID)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            phase = "noisy" if noisy else "clean"
            print(f"step {step + 1:5d} {phase} loss {loss.item():.4f} {time.monotonic() - started:6.1f} s", flush=True)


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM, pairs: list[tuple[int, int]], *, greedy: bool, repeats: int = 1) -> float:
    """Share of answers that equal the sum exactly and end in `<eos>`; sampled at temperature 1 unless `greedy`."""
    generator = torch.Generator().manual_seed(MODEL_SEED)
    right = 0
    wanted_BT = encode_sums(pairs, [a + b for a, b in pairs])
    for _ in range(repeats):
        ids_BT = wanted_BT[:, :PROMPT_TOKENS]
        ended_B = torch.zeros(len(pairs), dtype=torch.bool)
        for _ in range(ANSWER_TOKENS):
            logits_BV = model(input_ids=ids_BT, logits_to_keep=1).logits[:, -1]
            if greedy:
                next_B = logits_BV.argmax(-1)
            else:
                next_B = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
            next_B = torch.where(ended_B, PAD_ID, next_B)
            ended_B |= next_B == EOS_ID
            ids_BT = torch.cat([ids_BT, next_B[:, None]], 1)
        right += int((ids_BT == wanted_BT).all(1).sum())
    return right / (repeats * len(pairs))


def save(model: Qwen2ForCausalLM, to_dir: Path) -> None:
    """A Hugging Face directory; bfloat16 halves the file and is what real checkpoints use."""
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=EOS_ID, pad_token_id=PAD_ID, bos_token_id=None
    )
    model.to(torch.bfloat16).save_pretrained(to_dir, safe_serialization=True)
    build_tokenizer().save_pretrained(to_dir)
    (to_dir / "model.safetensors").chmod(0o644)


def build(to_dir: Path, shape: Shape, recipe: Recipe, *, data_only: bool = False) -> None:
    """Write `data/` and, unless `data_only`, train a model of `shape` into `model/`; prints how good it has become."""
    train_pairs, validation_pairs = split_pairs(DATA_SEED)
    write_rows(to_dir / "data" / "train.jsonl", train_pairs[:TRAIN_ROWS])
    write_rows(to_dir / "data" / "validation.jsonl", validation_pairs)
    print(f"data: {TRAIN_ROWS} train rows, {len(validation_pairs)} validation rows", flush=True)
    if data_only:
        return
    torch.set_num_threads(1)  # sums of floats in one order, so that the file is the same each time
    model = build_model(shape, MODEL_SEED)
    train(model, train_pairs, recipe, MODEL_SEED)
    save(model, to_dir / "model")
    saved = Qwen2ForCausalLM.from_pretrained(to_dir / "model", dtype=torch.float32).eval()
    print(f"parameters: {sum(p.numel() for p in saved.parameters())}")
    print(f"file: {(to_dir / 'model' / 'model.safetensors').stat().st_size} bytes")
    print(f"validation accuracy, sampled: {accuracy(saved, validation_pairs, greedy=False, repeats=4):.3f}")
    print(f"validation accuracy, greedy:  {accuracy(saved, validation_pairs, greedy=True):.3f}")


def main(description: str, folder: Path, shape: Shape, recipe: Recipe) -> None:
    """The command line of a build script whose output lies in `folder`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--to", type=Path, default=folder, help="directory that gets model/ and data/ (default: here)")
    parser.add_argument("--data-only", action="store_true", help="write data/ only")
    arguments = parser.parse_args()
    build(arguments.to, shape, recipe, data_only=arguments.data_only)


if __name__ == "__main__":
    main("Rebuild the tiny example model and its data.", HERE, Shape(), Recipe())
