"""Rewards: what counts as right, what as wrong, and what as a verifier that failed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from swarm_core.learning import rewards
from swarm_core.learning.errors import RewardError


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [("46", 1.0), (" 46\n", 1.0), ("046", 1.0), ("+46", 1.0), ("47", 0.0), ("46.", 0.0), ("= 46", 0.0), ("", 0.0),
     ("4 6", 0.0), ("٤٦", 0.0), ("9" * 5000, 0.0)],
)  # fmt: skip
def test_exact_integer(completion: str, wanted: float) -> None:
    assert rewards.exact_integer(["12+34="], [completion], answer=["46"]) == [wanted]
    assert rewards.exact_integer(["12+34="], [completion]) == [wanted]


def test_exact_integer_without_an_answer_column_computes_it() -> None:
    prompts = ["12-34=", "7*8", "hello"]
    assert rewards.exact_integer(prompts, ["-22", "56", "1"]) == [1.0, 1.0, None]
    assert rewards.exact_integer(["x"], ["1"], answer=["one"]) == [None]


GSM8K = "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 1,072"


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("... so she sold #### 1072", 1.0),
        ("#### $1,072.00", 1.0),
        ("The answer is \\boxed{1{,}072}", 0.0),  # not a plain number; `boxed` and `math` understand it
        ("The answer is \\boxed{1072}.", 1.0),
        ("first 5 then 1072 clips.", 1.0),
        ("1072 or maybe 3", 0.0),
        ("#### 12\nno, #### 1072", 1.0),
        ("#### 1072\nno, #### 12", 0.0),
        ("#### 1072 clips", 1.0),
        ("#### ", 0.0),
        ("no idea", 0.0),
    ],
)
def test_gsm8k(completion: str, wanted: float) -> None:
    assert rewards.gsm8k([""], [completion], answer=[GSM8K]) == [wanted]


def test_gsm8k_fractions_and_a_gold_without_a_number() -> None:
    assert rewards.gsm8k([""] * 3, ["3/4", "0.75", "0.7"], answer=["#### 0.75"] * 3)[1:] == [1.0, 0.0]
    assert rewards.gsm8k([""], ["#### 3/4"], answer=["0.75"]) == [1.0]
    assert rewards.gsm8k([""], ["5"], answer=["five"]) == [None]
    assert rewards.gsm8k([""], ["5"]) == [None]
    assert rewards.gsm8k([""], ["1/0"], answer=["#### 1"]) == [0.0]


@pytest.mark.parametrize(
    ("gold", "answer", "wanted"),
    [
        ("42", "42", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{3}{4}", "\\dfrac{3}{4}", True),
        ("1/3", "0.33", False),
        ("1/3", "0.333333", True),
        ("0.5", "50\\%", True),
        ("12", "13", False),
        ("x^2+2x+1", "(x+1)^2", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("(1, 2)", "(2, 1)", False),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("18", "\\$18", True),
        ("50\\%", "50", True),
        ("1,234", "1234", True),
        ("\\pi", "3", False),
        ("2", "", False),
        ("7", "\\frac{", False),
        ("", "3", None),
    ],
)
def test_mathematical_equality(gold: str, answer: str, wanted: bool | None) -> None:
    assert rewards.equivalent(gold, answer) is wanted


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "2^{99999999}", "99999999!", "9!!!", "9**9**9", "1+" * 5000 + "1"])
def test_answers_made_to_hang_the_verifier_are_wrong_at_once(answer: str) -> None:
    assert rewards.equivalent("3", answer) is False


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("\\boxed {3}", "3"),
        ("\\fbox{3}", "3"),
        ("\\boxed{5} " + "\\boxed{" * 15, "5"),
        ("none", None),
    ],
)
def test_the_last_complete_box_counts(text: str, wanted: str | None) -> None:
    assert rewards.last_boxed(text) == wanted


def test_boxed_reads_all_three_gold_columns_and_none_is_a_failure() -> None:
    completions = ["\\boxed{\\frac{2}{4}}", "0.5", "\\boxed{3}"]
    for column in ("answer", "ground_truth", "solution"):
        assert rewards.boxed([""] * 3, completions, **{column: ["1/2"] * 3}) == [1.0, 0.0, 0.0]
    assert rewards.boxed([""], ["\\boxed{5}"], solution=["Adding gives 2+3, thus \\boxed{5}."]) == [1.0]
    assert rewards.boxed([""], ["\\boxed{5}"], answer=[None], ground_truth=[5], solution=["\\boxed{6}"]) == [1.0]
    assert rewards.boxed([""], ["\\boxed{5}"], source=["x"]) == [None]
    assert rewards.boxed([""], ["\\boxed{5}"], answer=["  "]) == [None]


def test_math_answer_reads_more_than_boxes() -> None:
    completions = ["thus $x$ is $\\frac{1}{2}$.", "#### 0.5", "\\boxed{1/2}", "half"]
    assert rewards.math_answer([""] * 4, completions, answer=["0.5"] * 4) == [1.0, 1.0, 1.0, 0.0]


def test_a_comparison_that_breaks_off_is_a_failure_and_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify

    def broken(*_: Any, **__: Any) -> bool:
        raise RecursionError

    monkeypatch.setattr(math_verify, "verify", broken)
    assert rewards.boxed([""] * 2, ["\\boxed{x+1}", "\\boxed{2}"], answer=["y", "2"]) == [None, 1.0]


def test_a_comparison_that_takes_too_long_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify.grader

    def endless(*_: Any, **__: Any) -> bool:
        threading.Event().wait(30)
        return True

    monkeypatch.setattr(rewards, "COMPARISON_LIMIT_S", 1)
    monkeypatch.setattr(math_verify.grader, "sympy_expr_eq", endless)
    assert rewards.equivalent("x+1", "x+2") is None


def test_outside_the_main_thread_it_works_without_alarms() -> None:
    found: list[bool | None] = []
    thread = threading.Thread(target=lambda: found.append(rewards.equivalent("x+1", "1+x")))
    thread.start()
    thread.join(30)
    assert found == [True]


def test_chats_are_read_like_text() -> None:
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "#### 4"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "\\boxed{4}"}]}]
    assert rewards.gsm8k([chat, chat, chat], [chat, parts, []], answer=["4"] * 3) == [1.0, 1.0, 0.0]


def test_resolving_names_and_paths() -> None:
    assert rewards.resolve("gsm8k") is rewards.gsm8k
    assert rewards.resolve("swarm_core.learning.rewards:boxed") is rewards.boxed
    for name, part in [
        ("gsm8", "did you mean 'gsm8k'"),
        ("nothing.here:f", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        ("math:pi", "wanted a function"),
        (":f", "cannot be imported"),
    ]:
        with pytest.raises(RewardError, match=part):
            rewards.resolve(name)
