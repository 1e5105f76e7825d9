"""The commands as a user types them: real processes, their files, their exit codes, and every message of bad input.

A few are new interpreters; most are forked from one that has imported what they import (warm_programs.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from warm_programs import ENVIRONMENT, ROOT, WarmPrograms, command

TINY = ROOT / "examples" / "tiny"
SMALL = [
    "--set",
    "grpo.prompts_per_batch=8",
    "--set",
    "sampler.eval_prompts=16",
    "--set",
    "anchor.calibration_prompts=8",
]


def anew(*typed: str) -> subprocess.CompletedProcess[str]:
    """In a new interpreter."""
    return subprocess.run(typed, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(programs: WarmPrograms) -> Run:
    """A program to its end."""
    return lambda program, *arguments: programs.run(command(program, *arguments))


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line on stderr that holds all the words."""
    lines = [line for line in done.stderr.splitlines() if " W " not in line and " I " not in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the shipped example that a test may damage."""
    shutil.copytree(TINY, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from anchor_node.cli import parser as a; from swarm_worker.cli import parser as w;"
        "text = a().format_help() + w().format_help(); assert 'examples:' in text;"
        "heavy = {'torch', 'transformers', 'grpc', 'hivemind', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=30)
    for program, verb in (("anchor_node", "serve"), ("swarm_worker", "join"), ("swarm_worker", "local")):
        done = anew(*command(program, verb, "--help"))
        assert done.returncode == 0 and "examples:" in done.stdout


def test_bad_run_files_are_refused_in_one_line(run: Run, tiny: Path) -> None:
    serve = ("anchor_node", "serve", "--listen", "127.0.0.1:0", "--out", tiny / "out", "--config")
    text = (tiny / "run.toml").read_text()
    (tiny / "key.toml").write_text(text.replace("max_reuse", "max_resue"))
    refused(run(*serve, tiny / "key.toml"), "grpo.max_resue", "did you mean grpo.max_reuse")
    refused(run(*serve, tiny / "run.toml", "--set", "model.path=./nowhere"), "nowhere", "no directory")
    weights = (tiny / "model" / "model.safetensors").read_bytes()
    (tiny / "model" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(run(*serve, tiny / "run.toml"), "model.safetensors")
    (tiny / "model" / "model.safetensors").write_bytes(weights)
    refused(run(*serve, tiny / "run.toml", "--set", "links.rank_forward=97"), "links.rank_forward", "97", "96")
    rows = (tiny / "data" / "train.jsonl").read_text().splitlines()
    rows[6] = rows[6].replace('"answer"', '"anser"')
    (tiny / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")
    refused(run(*serve, tiny / "run.toml"), "train.jsonl:7", "answer")
    assert not (tiny / "out" / "journal.jsonl").exists()


def test_dry_run_prints_the_plan(run: Run, tiny: Path) -> None:
    done = run("anchor_node", "serve", "--config", tiny / "run.toml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "% of dense bf16" in done.stdout and "Mbit/s" in done.stdout
    (tiny / "model" / "tokenizer.json").unlink()
    refused(run("swarm_worker", "local", "--config", tiny / "run.toml", "--dry-run"), "tokenizer")


def test_an_anchor_that_does_not_answer_is_named(run: Run) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: nobody answers
        address = f"127.0.0.1:{held.getsockname()[1]}"
        refused(run("swarm_worker", "join", "--stage", 0, "--anchor", address, "--wait", 1), address, "within 1 s")
    for wrong in ("nonsense", "http://127.0.0.1:7400", "127.0.0.1:7400/run"):
        refused(run("swarm_worker", "join", "--stage", 0, "--anchor", wrong), wrong, "HOST:PORT")


def test_strangers_are_told_what_to_do(run: Run, tiny: Path) -> None:
    out = tiny / "out"
    serve = ("anchor_node", "serve", "--config", tiny / "run.toml", "--out", out, "--listen", "0.0.0.0:0")
    refused(run(*serve, "--insecure"), "--insecure is for this machine alone", "0.0.0.0:0")
    assert not (out / "anchor").exists()
    join = ("swarm_worker", "join", "--stage", 1, "--out", out, "--anchor")
    refused(run(*join, "anchor.example.org:7400"), "anchor_node token create", "--role stage --stage I")
    refused(
        run("swarm_worker", "local", "--config", tiny / "run.toml", "--listen", "0.0.0.0:0"), "keeps to this machine"
    )
    token = run("anchor_node", "token", "create", "--out", out, "--role", "stage", "--stage", 1, "--ttl", "10m")
    assert token.returncode == 0 and token.stdout.count("\n") == 1 and token.stdout.startswith("kedge1.stage.1.")
    listed = run("anchor_node", "token", "list", "--out", out)
    assert listed.returncode == 0 and "stage 1" in listed.stdout and "open" in listed.stdout
    refused(run("anchor_node", "token", "create", "--out", out, "--role", "sampler", "--ttl", "2h"), "1 s to 1 h")
    refused(
        run("swarm_worker", "sample", "--anchor", "127.0.0.1:1", "--token", token.stdout.strip()),
        "stage 1",
        "a sampler",
    )


def test_what_cannot_be_written_to_is_said_in_one_line(run: Run, tiny: Path) -> None:
    (tiny / "file").write_text("")
    serve = ("anchor_node", "serve", "--config", tiny / "run.toml", "--listen", "127.0.0.1:0")
    refused(run(*serve, "--out", tiny / "file"), "--out", "is a file")
    refused(run(*serve, "--out", "/proc/nowhere"), "--out /proc/nowhere cannot be written to")
    refused(run(*serve, "--out", tiny / "out", "--log", tiny / "file" / "log"), "--log", "cannot be written to")
    refused(run("swarm_worker", "local", "--config", tiny / "run.toml", "--out", tiny / "file"), "is a file")
    refused(run("swarm_worker", "join", "--stage", 0, "--anchor", "127.0.0.1:1", "--out", tiny / "file"), "is a file")
    refused(run("swarm_worker", "sample", "--anchor", "127.0.0.1:1", "--out", tiny / "file"), "is a file")


def test_both_programs_tell_their_version() -> None:
    for program in ("anchor_node", "swarm_worker"):
        done = anew(*command(program, "--version"))
        assert done.returncode == 0 and done.stdout.startswith(f"{program} of kedge")


@pytest.fixture
def anchor(programs: WarmPrograms, tiny: Path) -> Iterator[str]:
    """A serving anchor that nobody has joined yet."""
    arguments = ("--config", tiny / "run.toml", "--listen", "127.0.0.1:0", "--out", tiny / "out", *SMALL)
    with (tiny / "anchor.log").open("w") as log:
        process = programs.start(command("anchor_node", "serve", *arguments), output=log)
    file = tiny / "out" / "anchor_address"
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    yield file.read_text().strip()
    process.terminate()
    assert process.wait(30) == 0


def test_who_may_not_join_is_told_why(programs: WarmPrograms, run: Run, anchor: str, tiny: Path) -> None:
    join = ("swarm_worker", "join", "--anchor", anchor, "--out", tiny / "worker", "--stage")
    refused(run(*join, 7), "stage 7", "0 to 2")
    refused(run(*join, 0, "--expect-digest", "abcdef"), "abcdef", "digest")
    refused(
        run("anchor_node", "serve", "--config", tiny / "run.toml", "--listen", anchor, "--out", tiny / "b"),
        anchor,
        "in use",
    )
    assert not (tiny / "b").exists(), "a port in use leaves no trace"
    log = tiny / "holder.log"
    with log.open("w") as words:
        holder = programs.start(command(*join, 1), output=words)
    while "layers" not in log.read_text():
        assert holder.poll() is None, log.read_text()
        time.sleep(0.02)
    refused(run(*join, 1), f"--out {tiny / 'worker'} is in use for stage 1 by process {holder.pid} ", "another --out")
    elsewhere = ("swarm_worker", "join", "--anchor", anchor, "--out", tiny / "elsewhere", "--stage")
    refused(run(*elsewhere, 1), "stage 1 is already held by", "free: 0, 2")
    other = tiny / "other"
    shutil.copytree(tiny / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    refused(run(*join, 0, "--model", other), "fingerprint", "--model")
    holder.kill()
    holder.wait()


@pytest.mark.parametrize("role", [("join", "--stage", 0), ("sample",)], ids=lambda role: role[0])
def test_who_is_asked_to_end_before_the_start_leaves_in_order(
    programs: WarmPrograms, run: Run, anchor: str, tiny: Path, role: tuple[object, ...]
) -> None:
    arguments = ("--anchor", anchor, "--out", tiny / "worker")
    early = programs.start(command("swarm_worker", *role, *arguments), output=subprocess.PIPE)

    def standing() -> str:
        return run("anchor_node", "status", "--anchor", anchor, "--json").stdout

    while "waits for the start" not in standing():
        assert early.poll() is None, early.communicate()
    early.send_signal(signal.SIGTERM)
    _, stderr = early.communicate(timeout=30)
    assert early.returncode == 130 and "interrupted" in stderr, stderr
    assert "Traceback" not in stderr, stderr
    assert "waits for the start" not in standing()


def test_a_worker_in_the_background_of_a_script_can_be_asked_to_end(tmp_path: Path) -> None:
    """A shell has what it starts so ignore SIGINT, and SIGTERM is taken as one."""
    join = command("swarm_worker", "join", "--stage", 0, "--anchor", "127.0.0.1:1", "--out", tmp_path)
    process = subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *join], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (tmp_path / ".stage-00.lock").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.terminate()
        assert "interrupted" in process.communicate(timeout=30)[1] and process.returncode == 130
    finally:
        process.kill()


@pytest.mark.parametrize(("who", "name"), [(2, "stage 1"), (4, "the sampler")])
def test_a_worker_at_work_that_is_asked_to_end_ends_the_run_after_its_tick(
    programs: WarmPrograms, tmp_path: Path, who: int, name: str
) -> None:
    out = tmp_path / "run"
    process = start_local(programs, out)
    family = children(process.pid)
    os.kill(family[who], signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stdout + stderr
    ticks = len((out / "journal.jsonl").read_text().splitlines())
    assert (out / "checkpoints" / f"tick-{ticks:08d}" / "COMPLETE").exists()
    assert f"{name} got SIGTERM" in (out / "metrics.jsonl").read_text()
    assert not [pid for pid in family if running(pid)]


def test_a_worker_at_work_that_is_asked_twice_ends_at_once(programs: WarmPrograms, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start_local(programs, out)
    anchor, _, stage, *_ = children(process.pid)
    os.kill(anchor, signal.SIGSTOP)  # which alone can tell stage 0 to end the run
    os.kill(stage, signal.SIGTERM)
    log = out / "logs" / "stage-1.log"
    while "once more to leave at once" not in log.read_text():
        assert running(stage), log.read_text()
        time.sleep(0.05)
    os.kill(stage, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0 and "swarm_worker join: interrupted" in log.read_text()


def local(out: Path, *more: object) -> list[str]:
    return command("swarm_worker", "local", "--config", TINY / "run.toml", "--out", out, *SMALL, *more)


def rows_of(out: Path, kind: str) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["type"] == kind]


def test_local_makes_a_whole_run_folder_and_resumes(programs: WarmPrograms, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = anew(*local(out, "--ticks", 4))
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {"run.toml", "metrics.jsonl", "ledger.csv", "journal.jsonl", "report.html", "checkpoints", "logs"}
    assert expected <= {path.name for path in out.iterdir()}
    assert {p.name for p in (out / "logs").iterdir()} == {
        "anchor.log",
        "sampler.log",
        *(f"stage-{i}.log" for i in range(3)),
    }
    assert [row["tick"] for row in rows_of(out, "tick")] == [0, 1, 2, 3]
    evaluations = rows_of(out, "eval")
    assert {row["tick"] for row in evaluations} == {0, 4}
    assert all("eval/accuracy_compressed" in row for row in evaluations)
    assert "activation" in done.stdout and "of dense" in done.stdout
    exported = run("anchor_node", "export", out, "--to", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    again = programs.run(local(out, "--ticks", 6, "--resume"), timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [row["tick"] for row in rows_of(out, "tick")] == [0, 1, 2, 3, 4, 5]
    refused_again = programs.run(local(out))
    assert refused_again.returncode == 2 and "--resume" in refused_again.stderr
    (out / "checkpoints" / "tick-00000004" / "stage-01-of-03.safetensors").unlink()
    torn = programs.run(local(out, "--ticks", 6, "--resume-from", "tick-00000004"), timeout=120)
    assert torn.returncode == 2 and "anchor ended with exit code 2" in torn.stderr
    (last,) = [line for line in torn.stderr.splitlines() if line.startswith("anchor_node serve: ")]
    assert "stage 1: " in last and "no such shard" in last and "put a whole copy there" in last


def start_local(programs: WarmPrograms, out: Path) -> Any:
    """An open-ended local swarm that has decided its first ticks."""
    process = programs.start(local(out, "--ticks", 0), output=subprocess.PIPE)
    journal, deadline = out / "journal.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and len(journal.read_text().splitlines()) >= 3:
            return process
        time.sleep(0.1)
    raise AssertionError(process.communicate(timeout=10))


def children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in text.split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_or_a_closed_terminal_ends_everything_cleanly_and_leaves_a_checkpoint(
    programs: WarmPrograms, tmp_path: Path, number: signal.Signals
) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("under nohup a hang-up is ignored, by whoever is started too")
    out = tmp_path / "run"
    process = start_local(programs, out)
    family = children(process.pid)
    assert len(family) == 5
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=180)  # a limit against hanging: machines are shared
    assert process.returncode == 0, stdout + stderr
    ticks = len((out / "journal.jsonl").read_text().splitlines())
    assert (out / "checkpoints" / f"tick-{ticks:08d}" / "COMPLETE").exists()
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_children_of_a_killed_parent_save_and_leave(programs: WarmPrograms, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start_local(programs, out)
    family = children(process.pid)
    process.kill()
    process.communicate(timeout=60)  # their copies of the pipes close a moment before the last of them is gone
    until = time.monotonic() + 30
    while any(running(pid) for pid in family) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in family if running(pid)]
    ticks = len((out / "journal.jsonl").read_text().splitlines())
    assert (out / "checkpoints" / f"tick-{ticks:08d}" / "COMPLETE").exists()


def running(pid: int) -> bool:
    """Whether a process is there and no zombie: an orphan's body waits for whoever adopts it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_anchor_that_is_killed_is_started_again_and_the_run_ends_in_order(
    programs: WarmPrograms, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start_local(programs, out)
    family = children(process.pid)
    os.kill(family[0], signal.SIGKILL)
    carried_on, deadline = False, time.monotonic() + 60
    while not carried_on and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        carried_on = any(row.get("event") == "carries_on" for row in rows_of(out, "event"))
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=180)  # a limit against hanging: machines are shared
    assert carried_on and process.returncode == 0, stdout + stderr
    assert "the anchor ended with signal SIGKILL; the others go on, and it is started again (1 of 3)" in stderr
    ticks = len((out / "journal.jsonl").read_text().splitlines())
    assert [row["tick"] for row in rows_of(out, "tick")] == list(range(ticks))
    assert (out / "checkpoints" / f"tick-{ticks:08d}" / "COMPLETE").exists()


def test_killed_children_are_started_again_and_one_that_dies_too_often_is_reported(
    programs: WarmPrograms, tmp_path: Path
) -> None:
    """Stage 1 is killed, taken up again without the loss of a tick, and at last ends the run."""
    out = tmp_path / "run"
    process = start_local(programs, out)
    for death in range(1, 5):
        os.kill(children(process.pid)[2 if death == 1 else -1], signal.SIGKILL)  # anchor, stage 0, stage 1
        deadline = time.monotonic() + 90
        while death < 4 and time.monotonic() < deadline and process.poll() is None:
            starts = [row for row in rows_of(out, "event") if row["event"] == "start" and "lost_ticks" in row]
            if len(starts) == death:
                assert starts[-1]["lost_ticks"] == 0
                break
            time.sleep(0.1)
    stdout, stderr = process.communicate(timeout=180)  # a limit against hanging: machines are shared
    assert "stage-1 ended with signal SIGKILL; it is started again (3 of 3)" in stderr
    assert process.returncode not in (0, 2), stdout + stderr
    assert "stage-1.log" in stderr and "layers" in stderr
    assert not children_of_run(out)


def children_of_run(out: Path) -> list[str]:
    """Processes that name this run folder and are no zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(out) in (entry / "cmdline").read_text() and running(int(entry.name)):
                found.append(entry.name)
    return found
