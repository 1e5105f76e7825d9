"""Makes trl_grpo.json: losses, gradients, advantages and metrics of TRL's own GRPOTrainer on one tiny fixed batch.

Run by hand, in an environment of its own with `torch==2.13.0` and `trl==1.16.0` (the tests read only the JSON):

    python tests/golden/make_trl_grpo.py

A real `GRPOTrainer` with a tiny random Qwen2 in float64 scores given completions (`_generate_and_score_completions`:
advantages, old log-probs, the sampler's importance ratios, reference log-probs), then its weights are moved, and its
`compute_loss` is taken for every variant of the objective. Only `_generate` is replaced: the completions and the
sampler's log-probs are given, not sampled. Values are stored per completion without padding, as IEEE doubles.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

GROUP = 4
VOCABULARY = 24
TEMPERATURE = 0.9
MAX_COMPLETION_LENGTH = 12
REWARDS: list[float | None] = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0]
LENGTHS = [5, 9, 3, 12, 1, 7, 8, 4, 6, 2, 10, 11]
PROMPT_LENGTHS = [3, 5, 2]

CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo_asymmetric": {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.28},
    "dapo_dual_clip": {"loss_type": "dapo", "delta": 1.5},
    "dapo_tis": {"loss_type": "dapo", "tis": True},
    "grpo_tis": {"loss_type": "grpo", "tis": True},
    "dapo_kl": {"loss_type": "dapo", "beta": 0.04},
    "grpo_kl_tis": {"loss_type": "grpo", "beta": 0.04, "tis": True},
    "grpo_sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02},
    "dapo_sequence_kl": {"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": 0.04, "epsilon": 0.02},
    "dapo_masked_truncated": {"loss_type": "dapo", "mask_truncated_completions": True},
    "grpo_masked_truncated": {"loss_type": "grpo", "mask_truncated_completions": True},
    "dapo_failed_verifier": {"loss_type": "dapo", "rewards": [None, *REWARDS[1:7], None, *REWARDS[8:]]},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1", unk_token="w2")


def policy(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return Qwen2ForCausalLM(config).double()


def rollouts() -> dict[str, Any]:
    """Three prompts x four completions; every completion but two ends with the end-of-sequence token 1."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    completions = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        if index not in (3, 6):
            ids[-1] = 1
        completions.append(ids)
    noise = [(0.5 * torch.randn(length, generator=generator, dtype=torch.float64)).tolist() for length in LENGTHS]
    return {"prompts": prompts, "completions": completions, "noise": noise}


class FixedRollouts(GRPOTrainer):
    """GRPOTrainer whose completions are given; everything behind them is TRL's."""

    fixed: dict[str, Any]
    captured: torch.Tensor | None = None

    def _generate(self, prompts: list[Any]) -> Any:
        prompt_ids = [self.fixed["prompts"][index // GROUP] for index in range(len(LENGTHS))]
        completions = self.fixed["completions"]
        sampler = self.fixed.get("sampler", [[-1.0] * length for length in LENGTHS])
        # `pad` keeps the dtype of the tensors TRL builds from these lists; the default dtype is float64 below.
        return prompt_ids, completions, None, [str(ids) for ids in completions], sampler, {}, None, None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        logps, entropies, aux = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if logps.requires_grad:
            logps.retain_grad()
            self.captured, self.entropies = logps, entropies
        return logps, entropies, aux


def trainer(directory: str, fixed: dict[str, Any], **options: Any) -> FixedRollouts:
    options = dict(options)
    options.pop("tis", None)
    rewards = options.pop("rewards", REWARDS)
    config = GRPOConfig(
        output_dir=directory, per_device_train_batch_size=len(LENGTHS), num_generations=GROUP, num_iterations=2,
        steps_per_generation=1, gradient_accumulation_steps=1, max_completion_length=MAX_COMPLETION_LENGTH,
        temperature=TEMPERATURE, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        use_bias_correction_kl=False, vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0, **options,
    )  # fmt: skip
    model = policy(0)
    if options.get("beta"):  # TRL loads the reference from where the policy says it came from
        policy(1).save_pretrained(directory)
        model.config._name_or_path = directory
    made = FixedRollouts(
        model=model, args=config, processing_class=tokenizer(), reward_funcs=lambda **_: list(rewards),
        train_dataset=Dataset.from_list([{"prompt": "w2 w3"}] * 3),
    )  # fmt: skip
    made.fixed = fixed
    return made


def rows(padded: torch.Tensor) -> list[list[float]]:
    return [padded[index, :length].tolist() for index, length in enumerate(LENGTHS)]


def last_hidden(model: Any, fixed: dict[str, Any]) -> list[list[list[float]]]:
    """The rows of the last hidden state whose next token is a completion token, one sequence at a time."""
    found = []
    for index, completion in enumerate(fixed["completions"]):
        prompt = fixed["prompts"][index // GROUP]
        with torch.no_grad():
            h_TD = model.model(torch.tensor([prompt + completion])).last_hidden_state[0]
        found.append(h_TD[len(prompt) - 1 : -1].tolist())
    return found


def move(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.06 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def run_case(directory: str, fixed: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    made = trainer(directory, fixed, **options)
    made.model.train()
    # The importance-sampling correction is TRL's vLLM path; nothing else of vLLM is needed once `_generate` is given.
    made.use_vllm = bool(options.get("tis"))
    made.current_gradient_accumulation_steps = 1  # set by Trainer's loop, which is not run here
    inputs = [{"prompt": "w2 w3"}] * len(LENGTHS)
    batch = made._generate_and_score_completions(inputs)
    move(made.model)
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    assert made.captured is not None and made.captured.grad is not None
    metrics = {name: values[-1] for name, values in made._metrics["train"].items()}
    keep = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "entropy", "kl", "reward",
            "reward_std", "frac_reward_zero_std")  # fmt: skip
    case = {
        "options": options,
        "loss": loss.item(),
        "grad_logps": rows(made.captured.grad),
        "advantages": batch["advantages"].tolist(),
        "metrics": {name: value for name, value in metrics.items() if name in keep or name.startswith("sampling/")},
    }
    shared = {
        "logps": rows(made.captured.detach()),
        "entropies": rows(made.entropies.detach()),
        "old_logps": rows(batch["old_per_token_logps"]),
        "grad_lm_head": made.model.lm_head.weight.grad.tolist(),
        "lm_head": made.model.lm_head.weight.detach().tolist(),
        "hidden": last_hidden(made.model, fixed),
    }
    if "ref_per_token_logps" in batch:
        shared["ref_logps"] = rows(batch["ref_per_token_logps"])
    return case, shared


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    fixed = rollouts()
    golden: dict[str, Any] = {
        "made_with": {"trl": trl.__version__, "torch": torch.__version__},
        "group_size": GROUP, "temperature": TEMPERATURE, "max_completion_length": MAX_COMPLETION_LENGTH,
        "rewards": REWARDS, "tis_cap": 2.0, **{k: fixed[k] for k in ("prompts", "completions")}, "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        _, shared = run_case(directory, fixed, CASES["dapo"])
        # A sampler that disagrees: the trainer's old log-probs plus noise wide enough to reach the cap.
        fixed["sampler"] = golden["sampler_logps"] = [
            [a + b for a, b in zip(old, noise, strict=True)]
            for old, noise in zip(shared["old_logps"], fixed["noise"], strict=True)
        ]
        golden.update(shared)
        for name, options in CASES.items():
            golden["cases"][name], extra = run_case(directory, fixed, options)
            if "ref_logps" in extra:
                golden["ref_logps"] = extra["ref_logps"]
    target = Path(__file__).with_name("trl_grpo.json")
    target.write_text(json.dumps(golden) + "\n")
    for name, case in golden["cases"].items():
        print(f"{name:24s} loss {case['loss']:+.12f}  clip {case['metrics']['clip_ratio/region_mean']:.3f}")


if __name__ == "__main__":
    main()
