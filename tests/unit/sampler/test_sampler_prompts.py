"""Prompts with and without chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from swarm_core.data.errors import DataError
from swarm_core.data.prompts import completion_text, encode_prompt, prompt_text
from swarm_core.models.reading import load_tokenizer

TINY = Path(__file__).parents[3] / "examples" / "tiny" / "model"
TEMPLATE = "{% for m in messages %}{{ m.content }}={% endfor %}{% if add_generation_prompt %}+{% endif %}"


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return load_tokenizer(TINY)


@pytest.fixture
def chat(plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    plain.chat_template = TEMPLATE
    return plain


def test_without_a_template_text_stays_text(plain: PreTrainedTokenizerFast) -> None:
    assert prompt_text(plain, "1+2=") == "1+2="
    assert plain.decode(encode_prompt(plain, "1+2=")) == "1+2="


def test_text_becomes_one_user_message_unless_turned_off(chat: PreTrainedTokenizerFast) -> None:
    assert prompt_text(chat, "1", "auto") == "1=+"
    assert prompt_text(chat, "1", "off") == "1"
    assert chat.decode(encode_prompt(chat, "1", "auto")) == "1=+"


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_messages_always_use_the_template(chat: PreTrainedTokenizerFast, mode: str) -> None:
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    assert prompt_text(chat, messages, mode) == "1=2=+"  # type: ignore[arg-type]


def test_messages_without_a_template_are_refused(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(plain, [{"role": "user", "content": "1"}])


def test_special_tokens_are_added_to_plain_text_only(chat: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    chat.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    assert encode_prompt(chat, "7", "off")[0] == 1
    assert 1 not in encode_prompt(chat, "7", "auto")


def test_a_prompt_needs_a_token(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no token"):
        encode_prompt(plain, "")


def test_the_end_token_is_not_part_of_the_text(plain: PreTrainedTokenizerFast) -> None:
    ids = plain("46")["input_ids"] + [plain.eos_token_id]
    assert completion_text(plain, ids) == "46"
