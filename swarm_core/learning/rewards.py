r"""Reward functions and how to find them. No processes or time limits: the sampler's verifier pool.

A reward function has TRL's signature `f(prompts, completions, **columns) -> list[float | None]`: all lists are
parallel, `columns` are the columns of the data set, and None means "the verifier failed" (an unreadable gold answer, a
comparison that broke off) as opposed to 0.0, "the answer is wrong". A completion is text, or a chat as TRL passes it
(a list of messages, the last one counts). The gold answer of a row is its first non-empty column among `answer`,
`ground_truth` and `solution`; GSM8K's `... #### 42`, a solution ending in `\boxed{42}` and a bare answer all work.

Symbolic comparison is math_verify's. It can take unbounded time on hostile input: in a main thread its own 5 s alarm
is used, elsewhere (it is signal-based) there is none, so training calls these functions in a process pool with limits.
"""

from __future__ import annotations

import difflib
import importlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from swarm_core.learning.errors import RewardError

RewardFn = Callable[..., list[float | None]]

GOLD_COLUMNS = ("answer", "ground_truth", "solution")
COMPARISON_LIMIT_S = 5
LONGEST_EXPRESSION = 1000  # characters; no answer is longer, and parsing time grows faster than length
MOST_BOXES = 16  # looked at from the end; thousands of unclosed ones would cost a scan to the end each
LONGEST_NUMBER = 400  # digits; Python refuses to convert 4,301 and more

_INTEGER = re.compile(r"[+-]?[0-9]+")
_SUM = re.compile(r"([0-9]{1,100})\s*([+*-])\s*([0-9]{1,100})\s*=?\s*$")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?")
_NUMBER_IN_TEXT = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
# Towers, huge exponents and huge factorials: exact arithmetic on them runs in C, where no alarm reaches it.
_EXPLOSIVE = re.compile(r"\^[^+\-=,]*\^|\^\s*\{?\s*[+-]?[0-9]{4,}|\*\*|[0-9]{4,}\s*\}?\)?\s*!|!\s*!")


def exact_integer(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 when the whole completion is the right integer (`12+34=` -> `46`), else 0.0. Leading zeros are tolerated.

    Without a gold column the sum, difference or product at the end of the prompt is computed. None: no gold answer.
    """
    rewards: list[float | None] = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        gold = _integer(final_answer(text)) if (text := gold_text(columns, row)) is not None else _sum(_text(prompt))
        rewards.append(None if gold is None else float(_integer(_text(completion)) == gold))
    return rewards


def gsm8k(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 when the number answered equals the gold number; `1,234`, `$18`, `18.00`, `50%` and `3/4` are understood.

    The number answered is what follows the last `####`, else the last `\\boxed{}`, else the last number in the text.
    """
    return [
        None if gold is None or (wanted := _number(final_answer(gold))) is None else float(_answered(text) == wanted)
        for gold, text in _rows(completions, columns)
    ]


def boxed(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 when the last `\\boxed{}` of the completion is mathematically equal to the gold answer; no box gives 0.0."""
    rewards: list[float | None] = []
    for gold, text in _rows(completions, columns):
        answer = last_boxed(text)
        verdict = None if gold is None else answer is not None and equivalent(final_answer(gold), answer)
        rewards.append(None if verdict is None else float(verdict))
    return rewards


def math_answer(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Like `boxed`, but a completion without a box may give its answer after `####` or as its last `$...$`."""
    rewards: list[float | None] = []
    for gold, text in _rows(completions, columns):
        formulas = re.findall(r"\$([^$]+)\$", text)
        answer = last_boxed(text) or _after_hashes(text) or (formulas[-1] if formulas else None)
        verdict = None if gold is None else answer is not None and equivalent(final_answer(gold), answer)
        rewards.append(None if verdict is None else float(verdict))
    return rewards


REWARDS: dict[str, RewardFn] = {
    "exact_integer": exact_integer,
    "gsm8k": gsm8k,
    "boxed": boxed,
    "math": math_answer,
}


def resolve(name: str) -> RewardFn:
    """The reward function of that name in `REWARDS`, or at `package.module:function`.

    Raises: RewardError for an unknown name (the nearest one is named) or a path that does not lead to a callable.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RewardError(name, f"unknown; {hint}known are {sorted(REWARDS)}, or give 'package.module:function'")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(name, f"cannot be imported ({error}); check the path and that it is installed") from error
    if not callable(found):
        raise RewardError(name, f"is {type(found).__name__}, wanted a function f(prompts, completions, **columns)")
    function: RewardFn = found
    return function


def gold_text(columns: Mapping[str, Any], row: int) -> str | None:
    """The gold answer of a row: its first non-empty column among `answer`, `ground_truth`, `solution`."""
    for column in GOLD_COLUMNS:
        values = columns.get(column)
        if values is not None and values[row] is not None and (text := str(values[row]).strip()):
            return text
    return None


def final_answer(text: str) -> str:
    """The answer inside a gold text: after the last `####`, else in the last `\\boxed{}`, else all of it."""
    return _after_hashes(text) or last_boxed(text) or text.strip()


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}` (or `\\fbox{...}`), braces balanced; None without one."""
    for match in list(_BOX.finditer(text))[-MOST_BOXES:][::-1]:
        depth = 1
        for position in range(match.end(), len(text)):
            character = text[position]
            if text[position - 1] == "\\" and character in "{}":
                continue
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return text[match.end() : position].strip()
    return None


def equivalent(gold: str, answer: str) -> bool | None:
    """Whether two mathematical expressions are equal; None when that could not be decided (unreadable gold, time out).

    Equal text and plain numbers are decided here; math_verify is asked about the rest.
    """
    gold, answer = gold.strip().strip("$").strip(), answer.strip().strip("$").strip()
    if not gold:
        return None
    if "".join(gold.split()) == "".join(answer.split()):
        return True
    numbers = _number(gold), _number(answer)
    if numbers[0] is not None and numbers[1] is not None:
        if numbers[0] == numbers[1]:
            return True
        if numbers[0].denominator == numbers[1].denominator == 1 and "%" not in gold + answer:
            return False  # math_verify decides about rounded decimals and about 50% against 0.5
    if not answer or any(len(text) > LONGEST_EXPRESSION or _EXPLOSIVE.search(text) for text in (gold, answer)):
        return False
    return _symbolically_equal(gold, answer)


def _symbolically_equal(gold: str, answer: str) -> bool | None:
    import math_verify  # a second of sympy: only where it is needed
    from math_verify.errors import TimeoutException

    limit_s = COMPARISON_LIMIT_S if threading.current_thread() is threading.main_thread() else None
    latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    try:
        wanted = math_verify.parse(rf"\boxed{{{gold}}}", latex, parsing_timeout=limit_s, raise_on_error=True)
        if not wanted:
            return None
    except (Exception, TimeoutException):  # noqa: BLE001  sympy's parser raises whatever it trips over
        return None
    try:
        given = math_verify.parse(rf"\boxed{{{answer}}}", latex, parsing_timeout=limit_s, raise_on_error=True)
    except TimeoutException:
        return None
    except Exception:  # noqa: BLE001
        return False  # an answer that is no mathematics is wrong, not unverifiable
    try:
        # raise_on_error: math_verify otherwise returns False for its own failures, which is a silent zero reward.
        return bool(math_verify.verify(wanted, given, timeout_seconds=limit_s, raise_on_error=True))
    except (Exception, TimeoutException):  # noqa: BLE001
        return None


def _rows(completions: Sequence[Any], columns: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    return [(gold_text(columns, row), _text(completion)) for row, completion in enumerate(completions)]


def _text(value: Any) -> str:
    """Text as it is, or the content of the last message of a chat."""
    if isinstance(value, str):
        return value
    content = value[-1]["content"] if value else ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def _after_hashes(text: str) -> str | None:
    found = _HASHES.findall(text)
    return found[-1].strip() or None if found else None


def _answered(text: str) -> Fraction | None:
    marked = _after_hashes(text) or last_boxed(text)
    if marked is not None and (number := _number(marked)) is not None:
        return number
    found = _NUMBER_IN_TEXT.findall(text if marked is None else marked)
    return _number(found[-1]) if found else None


def _integer(text: str) -> int | None:
    text = text.strip()
    return int(text) if len(text) <= LONGEST_NUMBER and _INTEGER.fullmatch(text) else None


def _sum(text: str) -> int | None:
    match = _SUM.search(text.strip())
    if match is None:
        return None
    left, operator, right = int(match[1]), match[2], int(match[3])
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def _number(text: str) -> Fraction | None:
    """A plain number exactly: thousands separators, a currency sign, a percent sign, `a/b`, `\\frac{a}{b}`, `\\$`."""
    text = re.sub(r"\\[,!;: ]|\\(?=[$%])|[\s$%]|\\text\{[^{}]*\}", "", text).rstrip(".")
    text = re.sub(r"^([+-]?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    top, slash, bottom = text.partition("/")
    parts = [top, bottom] if slash else [top]
    if any(len(p) > LONGEST_NUMBER or not re.search("[0-9]", p) or not _NUMBER.fullmatch(p) for p in parts):
        return None
    values = [Fraction(part.replace(",", "")) for part in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None
