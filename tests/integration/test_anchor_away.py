"""No tick waits for the anchor: killed, paused and slowed, with stages and sampler in this process and a real anchor process."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from warm_programs import WarmPrograms, command

from swarm_core.run_folder import ADDRESS_FILE
from swarm_core.wire.errors import PeerLost
from swarm_core.wire.messages import Order
from swarm_worker import anchor_link
from swarm_worker.sampler.collect import Collected
from swarm_worker.sampler.process import SamplerArguments, serve_rollouts
from swarm_worker.sampler.source import Source
from swarm_worker.stage_process import StageArguments, hold_stage

STAGES, TICKS, GATE = 3, 20, 3  # four ticks a batch; batch GATE is delivered once the anchor is back
KNOBS: dict[str, Any] = {
    "run": {"ticks": TICKS},
    "checkpoint": {"every": 8, "keep": 2},
    "links": {"kind": "lowrank", "rank_forward": 12, "rank_backward": 12},
    "anchor": {"q_cadence": 0, "calibration_prompts": 1},
}
# Where equal weights are not compared: when a correction is merged depends on the clock.
CORRECTED = {
    **KNOBS,
    "corrections": {"merger": "held_delta"},
    "anchor": {**KNOBS["anchor"], "m_cadence": 2, "latency": "natural"},
}


class Anchor:
    """`anchor_node serve` as a process of its own, on an address that stays."""

    def __init__(self, programs: WarmPrograms, run_file: Path, out: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.out, self._programs = out, programs
        serve = ("serve", "--config", run_file, "--out", out, "--listen", self.address, "--log", out / "anchor.log")
        self._command = command("anchor_node", *serve)
        self.process = self._start()

    def _start(self, *more: str) -> Any:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "anchor-words.log").open("ab") as words:
            return self._programs.start([*self._command, *more], output=words)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def resume(self) -> None:
        self.process = self._start("--resume")

    def begin_again(self) -> None:
        self.process = self._start()


class Proxy:
    """A TCP proxy in front of an anchor, so that its streams can be cut while both ends live."""

    def __init__(self, target: str) -> None:
        self._host, port = target.split(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self.closed = False  # to new connections

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.closed:
                raise ConnectionRefusedError
            up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, up_writer}
        await asyncio.gather(self._pump(reader, up_writer), self._pump(up_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()


class Gate:
    """Holds a batch back until it is opened; what is trained on does not depend on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
        self.opened = threading.Event()
        collect = Source.collect

        def gated(source: Source, order: Order) -> Collected | None:
            assert order.batch < batch or self.opened.wait(150)
            return collect(source, order)

        monkeypatch.setattr(Source, "collect", gated)


def journal(out: Path) -> int:
    """Ticks decided so far."""
    path = out / "journal.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(150):  # a cold start on a busy machine takes long
        while not condition():
            await asyncio.sleep(0.01)


async def disturbed(
    anchor: Anchor, during: Callable[[], Awaitable[None]], address: str = "", sampler_address: str = ""
) -> list[BaseException | None]:
    """Stages and a sampler beside this anchor, to their ends; `during` runs once the first ticks are decided."""
    address, out = address or anchor.address, anchor.out
    await until((out / ADDRESS_FILE).exists)  # a dial that is refused is tried again seconds later
    tasks = [hold_stage(StageArguments(i, address, out=out), signals=False) for i in range(STAGES)]
    members = [asyncio.create_task(work) for work in tasks]
    sampler = SamplerArguments(sampler_address or address, out=out)
    members.append(asyncio.create_task(serve_rollouts(sampler, signals=False)))
    try:
        await until(lambda: journal(anchor.out) >= 2)
        await during()
        async with asyncio.timeout(150):
            ends = await asyncio.gather(*members, return_exceptions=True)
        await asyncio.to_thread(anchor.process.wait, 30)
        return ends
    finally:
        anchor.process.kill()
        for member in members:
            member.cancel()
        await asyncio.gather(*members, return_exceptions=True)


def rows(out: Path, kind: str = "tick") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["type"] == kind]


def sums(out: Path) -> dict[tuple[str, ...], list[int]]:
    """The ledger of the links and feeds, by tick and kind, without what depends on the time it all took."""
    found: dict[tuple[str, ...], list[int]] = {}
    with (out / "ledger.csv").open() as file:
        for row in csv.DictReader(file):
            if "anchor" not in row["link"] and row["kind"] != "beat":
                total = found.setdefault((row["tick"], row["link"], row["direction"], row["kind"]), [0] * 5)
                for i, column in enumerate(("dense_bytes", "packet_bytes", "message_bytes", "wire_bytes", "frames")):
                    total[i] += int(row[column])
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = sorted((out / "checkpoints" / f"tick-{TICKS:08d}").glob("stage-*.safetensors"))
    assert len(files) == STAGES and (files[0].parent / "COMPLETE").exists()
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def events(out: Path, name: str) -> list[str]:
    return [row["message"] for row in rows(out, "event") if row["event"] == name]


def check_books(out: Path) -> None:
    """Every row once, and no tick has waited."""
    assert Counter(row["tick"] for row in rows(out)) == {tick: 1 for tick in range(TICKS)}
    for row in rows(out):
        waits = {name: value for name, value in row.items() if name.startswith("anchor/wait_s")}
        assert waits == {"anchor/wait_s": 0, **{f"anchor/wait_s/stage_{i}": 0 for i in range(STAGES)}}


def test_an_anchor_that_is_killed_and_carries_on_changes_nothing(
    recipe: Callable[..., Any],
    programs: WarmPrograms,
    run_swarm: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_file = recipe().run_file(**KNOBS)
    calm, out = tmp_path / "calm", tmp_path / "run"
    run_swarm(run_file, calm)
    gate, anchor = Gate(monkeypatch, GATE), Anchor(programs, run_file, out)

    async def during() -> None:
        anchor.kill()
        at = journal(out)
        await until(lambda: journal(out) == 4 * GATE)  # as far as there are rollouts
        assert at < 4 * GATE and len(rows(out)) <= at + 1
        anchor.resume()
        await until(lambda: events(out, "carries_on"))
        gate.opened.set()

    assert asyncio.run(disturbed(anchor, during)) == [None] * (STAGES + 1)
    assert anchor.process.returncode == 0
    check_books(out)
    assert sums(out) == sums(calm)
    wanted, got = weights(calm), weights(out)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert events(out, "carries_on") == [f"{STAGES} stages at work, at tick {4 * GATE}"]


def test_whoever_waits_for_the_start_waits_for_the_next_anchor_too(
    recipe: Callable[..., Any], programs: WarmPrograms, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    anchor = Anchor(programs, recipe().run_file(**{**KNOBS, "run": {"ticks": 2}}), out)

    def joined() -> int:
        return len(events(out, "ready")) if (out / "metrics.jsonl").exists() else 0

    async def play() -> list[BaseException | None]:
        await until((out / ADDRESS_FILE).exists)

        def stage(number: int) -> Coroutine[Any, Any, None]:
            return hold_stage(StageArguments(number, anchor.address, out=out), signals=False)

        sampler = serve_rollouts(SamplerArguments(anchor.address, out=out), signals=False)
        members = [asyncio.create_task(work) for work in (stage(0), stage(1), sampler)]
        await until(lambda: joined() == 3)
        anchor.kill()
        anchor.begin_again()
        await until(lambda: joined() == 6)  # all of them again
        members.append(asyncio.create_task(stage(2)))
        async with asyncio.timeout(150):
            return await asyncio.gather(*members, return_exceptions=True)

    try:
        assert asyncio.run(play()) == [None] * (STAGES + 1)
        assert anchor.process.wait(30) == 0 and journal(out) == 2
    finally:
        anchor.process.kill()


def test_a_sampler_that_hears_of_the_end_after_the_stages_have_left_ends_in_order(
    recipe: Callable[..., Any], programs: WarmPrograms, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    anchor = Anchor(programs, recipe().run_file(**KNOBS), out)
    proxy = Proxy(anchor.address)

    async def during() -> None:
        await until(lambda: journal(out) >= TICKS - 4)  # all rollouts are there
        anchor.kill()
        proxy.cut()
        proxy.closed = True
        anchor.resume()
        await until(lambda: events(out, "finished"))
        await asyncio.sleep(2)  # the stages leave within it
        proxy.closed = False

    async def play() -> list[BaseException | None]:
        return await disturbed(anchor, during, sampler_address=await proxy.start())

    assert asyncio.run(play()) == [None] * (STAGES + 1)
    assert anchor.process.returncode == 0
    check_books(out)


def test_a_run_that_finishes_without_its_anchor_waits_for_it_and_no_basis_is_numbered_twice(
    recipe: Callable[..., Any], programs: WarmPrograms, tmp_path: Path
) -> None:
    knobs = {**KNOBS, "anchor": {"q_cadence": 2, "calibration_prompts": 1}, "checkpoint": {"every": 0}}
    out = tmp_path / "run"
    anchor = Anchor(programs, recipe().run_file(**knobs), out)

    async def during() -> None:
        await until(lambda: events(out, "basis"))
        anchor.kill()
        assert journal(out) < TICKS
        await until(lambda: journal(out) == TICKS)
        anchor.resume()

    assert asyncio.run(disturbed(anchor, during)) == [None] * (STAGES + 1)
    assert anchor.process.returncode == 0 and (out / "report.html").exists()
    check_books(out)
    assert weights(out) and events(out, "checkpoint")[-1].startswith(f"tick-{TICKS:08d}")
    versions = [int(message.split()[1].rstrip(",")) for message in events(out, "basis")]
    assert versions == list(range(1, len(versions) + 1))


def test_corrections_go_on_with_an_anchor_that_carries_on(
    recipe: Callable[..., Any], programs: WarmPrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    gate, anchor = Gate(monkeypatch, GATE), Anchor(programs, recipe().run_file(**CORRECTED), out)

    async def during() -> None:
        await until(lambda: events(out, "correction"))
        anchor.kill()
        await until(lambda: journal(out) == 4 * GATE)
        anchor.resume()
        await until(lambda: events(out, "carries_on"))
        before = len(events(out, "correction"))
        await until(lambda: len(events(out, "correction")) > before)  # of what was snapshot while it was away
        gate.opened.set()

    assert asyncio.run(disturbed(anchor, during)) == [None] * (STAGES + 1)
    assert anchor.process.returncode == 0
    check_books(out)
    versions = [int(message.split(",")[0]) for message in events(out, "correction")]
    assert versions == sorted(set(versions))
    assert not events(out, "replay_failed")


def test_a_run_without_its_anchor_ticks_to_its_end_and_says_what_is_missing(
    recipe: Callable[..., Any], programs: WarmPrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchor_link, "END_WAIT_S", 1.0)
    out = tmp_path / "run"
    anchor = Anchor(programs, recipe().run_file(**CORRECTED), out)

    async def during() -> None:
        anchor.kill()
        assert journal(out) < TICKS

    ends = asyncio.run(disturbed(anchor, during))
    assert journal(out) == TICKS
    assert all(isinstance(end, PeerLost) for end in ends)
    told = [str(end) for end in ends if "books" in str(end)]
    assert told and all(
        f"finished at tick {TICKS}, but the anchor at {anchor.address} was away" in text for text in told
    )


def test_a_paused_anchor_whose_streams_break_meanwhile_books_every_row_once(
    recipe: Callable[..., Any], programs: WarmPrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was on its way when it was paused is still read when it wakes, beside what is sent again on the new streams."""
    out = tmp_path / "run"
    gate, anchor = Gate(monkeypatch, GATE), Anchor(programs, recipe().run_file(**CORRECTED), out)

    async def run() -> list[BaseException | None]:
        proxy = Proxy(anchor.address)

        async def during() -> None:
            anchor.process.send_signal(signal.SIGSTOP)
            await until(lambda: journal(out) >= 4 * GATE - 2)
            proxy.cut()
            await until(lambda: journal(out) == 4 * GATE)
            booked = len(rows(out))
            anchor.process.send_signal(signal.SIGCONT)
            await until(lambda: len(rows(out)) > booked)
            proxy.cut()  # and once more, with an anchor that is awake
            gate.opened.set()

        return await disturbed(anchor, during, await proxy.start())

    assert asyncio.run(run()) == [None] * (STAGES + 1)
    assert anchor.process.returncode == 0
    check_books(out)


def test_an_anchor_slowed_fifty_times_slows_no_tick(
    recipe: Callable[..., Any], programs: WarmPrograms, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    anchor = Anchor(programs, recipe().run_file(**CORRECTED), out)
    slow = threading.Event()

    def slowing() -> None:
        while not slow.wait(0.001):
            anchor.process.send_signal(signal.SIGSTOP)
            time.sleep(0.049)
            anchor.process.send_signal(signal.SIGCONT)

    async def during() -> None:
        thread = threading.Thread(target=slowing)
        thread.start()
        await until(lambda: journal(out) == TICKS)
        slow.set()
        thread.join()

    assert asyncio.run(disturbed(anchor, during)) == [None] * (STAGES + 1)
    check_books(out)
