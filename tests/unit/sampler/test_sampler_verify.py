"""The verifier pool: whatever a reward function does, the others are judged and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm_worker.sampler.errors import VerifierError
from swarm_worker.sampler.verify import Call, Verdict, VerifierPool, failures

ROOT = Path(__file__).parents[3]
LIMIT_S = 1.0

REWARD = """
import os, signal, subprocess, sys, time

def reward(prompts, completions, answer, **columns):
    assert len(prompts) == len(completions) == len(answer) == 1
    word = completions[0]
    if word == "raise":
        raise ValueError("cannot read this")
    if word == "quit":
        sys.exit(3)
    if word == "interrupt":
        raise KeyboardInterrupt
    if word == "hang":
        while True:
            pass
    if word == "asleep":
        time.sleep(60)
    if word == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "97531"])
        time.sleep(60)
    if word == "die":
        os._exit(7)
    if word == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "slow":
        time.sleep(0.4)
    values = {"none": [None], "two": [1.0, 2.0], "nan": [float("nan")], "text": ["a"], "bare": 1.0, "string": "1"}
    return values.get(word, [float(word == answer[0])])

not_a_function = 3
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of importable modules with reward functions; the spawned processes get this process's path."""
    path = tmp_path_factory.mktemp("rewards")
    (path / "odd_rewards.py").write_text(REWARD)
    (path / "broken_rewards.py").write_text("import no_such_thing\n")
    (path / "deadly_rewards.py").write_text("import os\nos._exit(9)\n")
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))


@pytest.fixture(scope="module")
def pool(rewards: Path) -> Iterator[VerifierPool]:
    with VerifierPool("odd_rewards:reward", processes=2, limit_s=LIMIT_S) as pool:
        yield pool


def judged(pool: VerifierPool, *words: str) -> list[Verdict]:
    return pool.score([Call("p", word, {"answer": "good", "other": 1}) for word in words])


def test_rewards_come_back_in_order(pool: VerifierPool) -> None:
    words = ["good", "bad", "slow", "good", "none"] * 3
    wanted: list[float | None] = [1.0, 0.0, 0.0, 1.0, None]
    assert [verdict.reward for verdict in judged(pool, *words)] == wanted * 3
    assert judged(pool) == []


def test_the_shipped_rewards_are_found_by_name() -> None:
    with VerifierPool("exact_integer", processes=1) as pool:
        verdicts = pool.score([Call("12+34=", "46", {"answer": "46"}), Call("12+34=", "47", {"answer": "46"})])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("word", "outcome", "detail"),
    [
        ("raise", "raised", "ValueError: cannot read this"),
        ("quit", "raised", "SystemExit: 3"),
        ("interrupt", "raised", "KeyboardInterrupt"),
        ("hang", "timed_out", "no answer within 1 s"),
        ("stubborn", "timed_out", "no answer within 1 s"),
        ("die", "died", "code 7"),
        ("segfault", "died", "code -11"),
        ("none", "declined", ""),
        ("two", "invalid", "wanted a list of one number"),
        ("nan", "invalid", "the reward is nan"),
        ("text", "invalid", "wanted a list of one number"),
        ("bare", "invalid", "wanted a list of one number"),
        ("string", "invalid", "wanted a list of one number"),
    ],
)
def test_a_failed_call_is_none_counted_and_harms_no_other(
    pool: VerifierPool, word: str, outcome: str, detail: str
) -> None:
    before = pool.counts.copy()
    verdicts = judged(pool, "good", word, "good", "bad", "good")
    assert [verdict.reward for verdict in verdicts] == [1.0, None, 1.0, 0.0, 1.0]
    assert verdicts[1].outcome == outcome
    assert detail in verdicts[1].detail
    assert pool.counts - before == {outcome: 1, "scored": 4}
    assert [verdict.reward for verdict in judged(pool, "good", "good")] == [1.0, 1.0]


def test_failures_are_summed_up_in_one_line(pool: VerifierPool) -> None:
    assert failures(judged(pool, "good", "bad", "none")) == "", "declining one answer is no failure"
    assert failures(judged(pool, "raise", "good", "raise")) == (
        "2 of 3 verifier calls raised: ValueError: cannot read this"
    )
    several = [Verdict(None, "died", "a\nb"), Verdict(None, "raised", "x" * 900), Verdict(1.0, "scored")]
    first, second = failures(several).split("; ")
    assert first == "1 of 3 verifier calls raised: " + "x" * 200 and second == "1 of 3 verifier calls died: a b"
    assert failures(judged(pool, "none", "none")) == "2 of 2 verifier calls declined"
    assert failures([]) == ""


def test_what_a_hanging_verifier_has_started_ends_with_it(pool: VerifierPool) -> None:
    judged(pool, "stubborn")
    deadline = time.monotonic() + 5
    while _running("sleep\x0097531\x00") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running("sleep\x0097531\x00")


def test_limits_run_side_by_side(rewards: Path) -> None:
    """One after the other they would take the sum of their limits, however fast the machine is; the limit is long
    against what a busy machine adds."""
    with VerifierPool("odd_rewards:reward", processes=2, limit_s=4.0) as pool:
        judged(pool, "good", "good")
        started = time.monotonic()
        verdicts = judged(pool, "asleep", "asleep")
        assert [verdict.outcome for verdict in verdicts] == ["timed_out", "timed_out"]
        assert time.monotonic() - started < 2 * 4.0


def test_an_interrupted_pool_gives_no_stale_answers(pool: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        calls = iter(range(100))

        def interrupted() -> object:
            if next(calls) > 3:
                raise KeyboardInterrupt
            return VerifierPool._next_events(pool)

        patch.setattr(pool, "_next_events", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judged(pool, "slow", "slow", "slow", "slow")
    assert [verdict.reward for verdict in judged(pool, "good", "bad", "good")] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact_integr", "did you mean 'exact_integer'"),
        ("broken_rewards:reward", "no_such_thing"),
        ("odd_rewards:nothing", "nothing"),
        ("odd_rewards:not_a_function", "wanted a function"),
        ("deadly_rewards:reward", "ended with code 9 while it started"),
    ],
)
def test_a_function_that_cannot_be_used_is_an_error(rewards: Path, name: str, words: str) -> None:
    with VerifierPool(name, processes=1) as pool, pytest.raises(VerifierError, match=words):
        judged(pool, "good")


def test_a_call_that_cannot_be_sent_fails_alone(pool: VerifierPool) -> None:
    bad = Call("p", "good", {"answer": "good", "code": lambda: None})
    good = Call("p", "good", {"answer": "good"})
    assert [verdict.outcome for verdict in pool.score([bad, good])] == ["invalid", "scored"]


@pytest.mark.parametrize(("processes", "limit_s"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_numbers_out_of_range_are_refused(processes: int, limit_s: float) -> None:
    with pytest.raises(VerifierError, match="wanted processes >= 1"):
        VerifierPool("exact_integer", processes=processes, limit_s=limit_s)


PROGRAM = """
import signal, sys
sys.path[:0] = {paths!r}
from swarm_worker.sampler.verify import Call, VerifierPool

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: print("draining", flush=True))
    with VerifierPool("odd_rewards:reward", processes=2, limit_s=30.0) as pool:
        pool.score([Call("p", "good", {{"answer": "good"}})] * 2)
        print("started", *[worker.process.pid for worker in pool._workers], flush=True)
        verdicts = pool.score([Call("p", {word!r}, {{"answer": {word!r}}})] * 4)
        print("rewards", [verdict.reward for verdict in verdicts], flush=True)
"""


def started(rewards: Path, tmp_path: Path, word: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A program of its own process group that judges `word` four times, and the ids of its verifiers."""
    (tmp_path / "program.py").write_text(PROGRAM.format(paths=[str(ROOT), str(rewards)], word=word))
    program = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert program.stdout is not None
    line = program.stdout.readline().split()
    assert line[0] == "started"
    return program, [int(pid) for pid in line[1:]]


def test_ctrl_c_loses_no_verdict(rewards: Path, tmp_path: Path) -> None:
    program, _ = started(rewards, tmp_path, "slow")
    time.sleep(0.2)
    os.killpg(program.pid, signal.SIGINT)  # what a terminal does
    output, _ = program.communicate(timeout=20)
    assert output.splitlines() == ["draining", "rewards [1.0, 1.0, 1.0, 1.0]"]


def test_hanging_verifiers_do_not_outlive_a_killed_program(rewards: Path, tmp_path: Path) -> None:
    program, verifiers = started(rewards, tmp_path, "hang")
    time.sleep(0.2)
    program.kill()
    program.wait(10)
    assert program.stdout is not None
    program.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(_alive, verifiers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in verifiers if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert verifiers and not left


def _alive(pid: int) -> bool:
    """Running, and not just waiting for whoever inherited it to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _running(command: str) -> bool:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_text() == command and _alive(int(entry.name)):
                    return True
            except OSError:
                continue
    return False
