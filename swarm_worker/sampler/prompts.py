"""From the prompt of a row to the token ids the model sees: chat template or plain text. No sampling lives here."""

from __future__ import annotations

from typing import Any, Literal

from swarm_worker.sampler.dataset import Prompt
from swarm_worker.sampler.errors import SamplerError

ChatTemplate = Literal["auto", "off"]


def prompt_text(tokenizer: Any, prompt: Prompt, chat_template: ChatTemplate = "auto") -> str:
    """The text that is tokenized.

    A message list always goes through the tokenizer's chat template, with the marker that opens the answer. Plain
    text does so too, as one user message, where the tokenizer has a template and `chat_template` is "auto"; else it
    stays as it is. Raises SamplerError for a message list when the tokenizer has no template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str):
        if not has_template or chat_template == "off":
            return prompt
        messages = [{"role": "user", "content": prompt}]
    elif has_template:
        messages = prompt
    else:
        raise SamplerError(
            "the prompt is a list of chat messages, but this tokenizer has no chat template; "
            "use prompts of plain text or a model with a template"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode_prompt(tokenizer: Any, prompt: Prompt, chat_template: ChatTemplate = "auto") -> list[int]:
    """Token ids of a prompt. Special tokens are added to plain text only: a template writes its own.

    Raises SamplerError when nothing is left to condition on.
    """
    text = prompt_text(tokenizer, prompt, chat_template)
    templated = not isinstance(prompt, str) or text != prompt
    ids = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    if not ids:
        raise SamplerError(f"the prompt {text!r} has no token; a prompt needs at least one")
    return [int(token) for token in ids]


def completion_text(tokenizer: Any, completion_ids: list[int]) -> str:
    """What the reward function reads: special tokens (the end token among them) left out."""
    return str(tokenizer.decode(completion_ids, skip_special_tokens=True))
