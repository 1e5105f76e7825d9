"""A whole swarm under a virtual clock: the real anchor service, stage processes, redo logs and rounds, over streams, disks and
numerics that are pretended (wan.py, disk.py, pretend.py), and everything that a bad day does to them.

What is mirrored here is thin: how a process is started and started again (cli.py, local.py, serve.py), and a sampler.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aftermath import check_end
from bad_day import Plan
from disk import Disk
from pretend import Judge, Objection, PretendCompute, World
from virtual_loop import CURRENT, Died, Process, Stuck, VirtualLoop
from wan import Server, Stream, Wan

import anchor_node.epochs
import anchor_node.service
import swarm_worker.epochs
import swarm_worker.membership
import swarm_worker.recovery
import swarm_worker.redo
import swarm_worker.service
import swarm_worker.shard
import swarm_worker.stage_process
import swarm_worker.worker
from anchor_node.books import Books
from anchor_node.checkpoints import found
from anchor_node.memory import kept_bases, recall
from anchor_node.rounds import Line
from anchor_node.service import AnchorService
from swarm_core.wire.errors import NothingHeld, PeerLost, StageTaken, Unreachable, WireError
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import BasisSet, FrameKind, Hello, Order, from_bytes, to_bytes
from swarm_core.wire.rollouts import rollouts_message
from swarm_worker import failpoints
from swarm_worker.entry import Entry
from swarm_worker.epochs import Epochs
from swarm_worker.failpoints import POINTS
from swarm_worker.journal import Journal
from swarm_worker.saving import DaemonThread, Saving
from swarm_worker.stage_process import StageArguments, StageProcess
from swarm_worker.worker import StageWorker

PLAIN = Entry(trusted_network=True)
ANCHOR = "10.0.9.9:7000"
HEALED_S = 900.0  # of virtual time from the moment that all is well again to the last tick: dialling gives up after 60
MEANT = (PeerLost, Unreachable, StageTaken)  # what a process may end with: it is started again
Patch = Callable[[pytest.MonkeyPatch], None]


class _Keeper:
    """In place of BasisKeeper: versions with a number and nothing in them."""

    def __init__(self, current: BasisSet) -> None:
        self.current, self.changes = current, None
        self.overlap, self.decisions = {"": 1.0}, {}

    @property
    def version(self) -> int:
        return self.current.version

    def numbers(self) -> dict[str, float]:
        return {}


class _Screen:
    def update(self, row: dict[str, Any]) -> None: ...
    def bytes_update(self, totals: dict[str, list[int]]) -> None: ...


class ShakenSwarm:
    """One run of a plan in a folder."""

    def __init__(self, plan: Plan, folder: Path, monkey: pytest.MonkeyPatch) -> None:
        self.plan, self.out, self.manifest = plan, folder / "run", plan.manifest()
        self.rng = random.Random(f"shaken {plan.seed}")
        self.judge, self.world = Judge(plan.seed), World(plan.seed, plan.stages)
        self.loop = VirtualLoop(self.rng)
        self.loop.work_s, self.loop.done_at_end = self._work_s, self._writes_late
        self.loop.set_exception_handler(self._unheard)
        self.wan = Wan(self.loop, self.judge.note, self._object)
        self.wan.weather = plan.weather
        self.disk = Disk(folder, folder / "shadow", self.rng)
        self.stages: dict[int, tuple[Process, StageProcess]] = {}
        self.anchor: tuple[Process, AnchorService] | None = None
        self.sampler: Process | None = None
        self.reason = ""
        self.begun, self.stormy = False, True
        self.deaths = [0] * plan.stages
        self.hosts = [self.out] * plan.stages  # the folder of each stage
        if plan.apart:
            self.hosts = [folder / f"host {stage}" for stage in range(plan.stages)]
        self._pretend(monkey)

    # What is pretended ---------------------------------------------------------------------------------------------------

    def _pretend(self, monkey: pytest.MonkeyPatch) -> None:
        loop, judge = self.loop, self.judge
        monkey.setattr(time, "monotonic", loop.time)
        monkey.setattr(secrets, "randbits", self.rng.getrandbits)
        monkey.setattr(os, "fsync", self._fsync)
        if not self.plan.apart:  # else hardly any file would go in so few ticks, and none be missed
            monkey.setattr(swarm_worker.redo, "MOST_LOST", 0)
            monkey.setattr(swarm_worker.shard, "MOST_LOST", 0)
        monkey.setattr(failpoints, "hit", self._hit)
        for module in (swarm_worker.stage_process, swarm_worker.membership):
            monkey.setattr(module, "dial", self.wan.dial)
        for module in (swarm_worker.service, anchor_node.service):
            monkey.setattr(module, "Server", Server)
        for module in (swarm_worker.worker, swarm_worker.recovery, swarm_worker.epochs):
            monkey.setattr(module, "read_bases", lambda bases, *_: f"basis {bases.version}")
        monkey.setattr(swarm_worker.epochs, "resolve", Path)
        monkey.setattr(swarm_worker.epochs, "fingerprint", lambda path: self.manifest.model_fingerprint)
        monkey.setattr(importlib.metadata, "version", lambda name: "0")
        monkey.setattr(swarm_worker.epochs, "pick_device", lambda name: torch.device("cpu"))
        monkey.setattr(swarm_worker.epochs, "read_shape", lambda path: SimpleNamespace(tied=False))
        monkey.setattr(Epochs, "_fresh", lambda e: PretendCompute(e._manifest, e._stage, judge, self.world))
        self._watch(
            monkey, Epochs, "set_up", lambda e, start: judge.works(e._stage, start.epoch, (CURRENT.get(), start.epoch))
        )
        self._watch(monkey, Saving, "room", lambda s, tick: judge.note("waited for the disk", int(s._busy)))
        self._watch(monkey, swarm_worker.recovery, "copy_of", lambda c, position, zero: self._copied(position.tick))
        self._watch(monkey, Journal, "write", lambda j, stamp, decide, *_: judge.decides(stamp, decide))
        self._watch(monkey, StageWorker, "_send_decision", lambda w, stamp, decide: judge.tells(stamp, decide))
        self._watch(monkey, StageProcess, "_serve_above", self._linked)
        self._watch(monkey, anchor_node.epochs.Epochs, "_start", self._starts_again)
        self._watch(
            monkey, AnchorService, "fail", lambda s, error: self._object(f"the anchor fails the run: {error}", error)
        )

    def _watch(self, monkey: pytest.MonkeyPatch, owner: Any, name: str, look: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **keywords: Any) -> Any:
            look(*args, **keywords)
            return original(*args, **keywords)

        monkey.setattr(owner, name, watched)

    def _linked(self, process: StageProcess, stream: Stream) -> None:
        assert stream.hello is not None
        if stream.hello.epoch != process._turns.epoch:
            self.judge.object(f"a link of epoch {stream.hello.epoch} is taken in epoch {process._turns.epoch}")

    def _copied(self, tick: int) -> None:
        """A stage that is rebuilt comes by a checkpoint that the process before it has decided and not written."""
        assert self.judge.published is not None
        self.judge.note("written again")
        self.judge.note("written late", int(self.judge.published[0] > tick))

    def _starts_again(self, epochs: anchor_node.epochs.Epochs, line: Line) -> None:
        self.judge.note("epochs")
        self.judge.starts(line.epoch, line.version)

    def _object(self, what: str, cause: BaseException | None = None) -> None:
        self.judge.trouble = self.judge.trouble or what

    def _unheard(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and not isinstance(error, WireError):
            self._object(f"{context['message']}: {type(error).__name__}: {error}", error)

    def _work_s(self, process: Process | None, executor: Any) -> float:
        if process is None or not process.name.startswith("stage"):
            return 0.02
        scale = self.plan.speed[int(process.host.split()[1])] if self.stormy else 0.02
        return scale * self.rng.random() * (self.plan.slow_disk if isinstance(executor, DaemonThread) else 1.0)

    def _writes_late(self, executor: Any) -> bool:
        """Whether a shard is there only when all of its time is over; else at once, and nobody knows of it until then."""
        return isinstance(executor, DaemonThread) and self.rng.random() < 0.5

    # Dying -------------------------------------------------------------------------------------------------------------

    def _fsync(self, descriptor: int) -> None:
        self._may_die("sync")
        self.disk.fsync(descriptor)

    def _hit(self, name: str, stage: int, tick: int) -> None:
        assert name in POINTS
        self._may_die(name)

    def _may_die(self, where: str) -> None:
        process = CURRENT.get()
        if process is None or not (self.begun and self.stormy) or self.rng.random() >= self.plan.failpoint:
            return
        if process.name == "anchor" and self._may_lose_anchor():
            self.judge.note("the anchor died")
            self._kill(process)
            raise Died(where)
        for stage, (mine, _) in self.stages.items():
            if mine is process and self._may_lose(stage):
                self.judge.note(f"died at {where}")
                self._kill_stage(stage)
                raise Died(where)

    def _may_lose(self, stage: int) -> bool:
        """Somebody who is at work, or the anchor, must remain: a house that went dark begins at its newest checkpoint."""
        process = self.stages[stage][0]
        anchor = self.anchor is not None and self.anchor[0].alive and self.anchor[1].roster.started
        return process.alive and (anchor or self._at_work(stage))

    def _begun(self) -> bool:
        """Whether every stage has its log. Who dies in the very first start, before anything was trained, leaves nothing."""
        return len({log for host in self.hosts for log in host.glob("redo/*/tick-00000000.log")}) == self.plan.stages

    def _may_lose_anchor(self) -> bool:
        return (
            self.anchor is not None
            and self.anchor[0].alive
            and (recall(self.out, self.manifest.digest()) is None or self._at_work())
        )

    def _at_work(self, besides: int = -1) -> bool:
        others = (shell for i, (p, shell) in self.stages.items() if i != besides and p.alive)
        return any(hasattr(shell, "epochs") and shell.epochs._worked for shell in others)

    def _kill(self, process: Process, silent: bool = False) -> None:
        process.kill()
        self.wan.died(process, silent)

    def _kill_stage(self, stage: int) -> None:
        """kill -9, or the power goes: then what was not synced may be gone."""
        process, shell = self.stages[stage]
        self.deaths[stage] += 1
        power = self.rng.random() < self.plan.power
        self._kill(process, silent=power)
        host = self.hosts[stage]
        folder = host / "redo" / f"stage-{stage:02d}-of-{self.plan.stages:02d}"
        sizes = {path: path.stat().st_size for path in folder.glob("*.log")}
        epochs = getattr(shell, "epochs", None)
        if epochs is not None:
            epochs.redo.close()  # what was not yet handed to the kernel dies with the process
        for path, size in sizes.items():
            os.truncate(path, size)
        if power:
            self.judge.note("power cuts")
            self.disk.power_cut(folder)
            for checkpoint in sorted((host / "checkpoints").glob("tick-*")):
                self.disk.power_cut(checkpoint, f"{folder.name}.")
        copied = self.anchor is not None and self.anchor[1].off_host.copies[stage].tick > 0
        if self.plan.apart and copied and self.rng.random() < 0.4:
            self.judge.note("hosts lost")
            self.judge.lost_hosts += 1
            self.hosts[stage] = self.out.with_name(f"host {stage}, {self.loop.now}")

    # The processes -----------------------------------------------------------------------------------------------------

    async def _keep_up(self, name: str, host: str, main: Callable[[Process], Any]) -> None:
        """Start a process again whenever it ends before the run does."""
        while not self.reason:
            process = Process(self.loop, name, host)
            task = process.spawn(main(process))
            await asyncio.wait({task})
            gone = not process.alive
            if not gone:
                self._kill(process)
            error = None if task.cancelled() else task.exception()
            stranger = isinstance(error, NothingHeld) and "stranger" in process.name
            if isinstance(error, (*MEANT, Died)) or stranger:
                self.judge.note(f"{name.split()[0]} ended: {type(error).__name__}", not gone)
            elif error is not None and not gone:
                self._object(f"{name} ended with {type(error).__name__}: {error}", error)
            elif not gone and name.startswith("stage"):
                return
            await asyncio.sleep(self.rng.uniform(0.2, 5.0))

    async def _stage(self, stage: int, process: Process) -> None:
        arguments = StageArguments(stage, ANCHOR, f"10.0.0.{stage}:0", out=self.hosts[stage], wait_s=600.0, entry=PLAIN)
        if (
            self.begun and self.stormy and not self.plan.apart and self.rng.random() < 0.05
        ):  # somebody has the wrong folder
            self.judge.note("strangers")
            process.name += ", a stranger"
            arguments = replace(arguments, out=self.out.with_name(f"stranger {self.loop.now}"))
        shell = StageProcess(arguments, signals=False)
        self.stages[stage] = process, shell
        await shell.run()

    async def _anchor(self, process: Process) -> None:
        memory = recall(self.out, self.manifest.digest())
        kept = found(self.out)
        service = AnchorService(self.manifest, _Screen(), self.out, kept[::-1], Ledger(), memory)
        self.anchor = process, service
        process.at_death.append(lambda: service.over.cancel())
        await service.server.start(ANCHOR)
        service.books = Books(self.out, service.memory)
        service.slow.use(_Keeper(kept_bases(self.out) if memory is not None else BasisSet()))  # type: ignore[arg-type]
        service.slow.keeper_at_start = service.slow.keeper
        service.open()
        refreshing = asyncio.create_task(self._refresh(service))
        self.reason = await service.over
        refreshing.cancel()
        await service.close()

    async def _refresh(self, service: AnchorService) -> None:
        """New bases now and then, which change what packets mean."""
        while True:
            await asyncio.sleep(self.rng.uniform(2.0, 8.0))
            if not self.begun:
                continue
            keeper: Any = service.slow.keeper
            keeper.current = BasisSet(keeper.version + 1, service.tick)
            service.slow._send_bases(keeper)

    async def _sampler(self, process: Process) -> None:
        digest, self.sampler = self.manifest.digest(), process
        hello = Hello(role="feed", manifest_digest=digest)
        while not self.reason:
            address = next((a for a in self.wan.servers if a.startswith("10.0.0.0:")), "10.0.0.0:1")
            try:
                stream = await self.wan.dial(address, "Stage/Feed", Ledger(), "stage 0", 1.0)
                await stream.send(Frame(Header(FrameKind.HELLO), to_bytes(hello)))
                await stream.expect(FrameKind.WELCOME)
                while (frame := await stream.receive()) is not None:
                    order = from_bytes(Order, frame.payload)
                    await asyncio.sleep(self.rng.uniform(0.0, 2.0))
                    message = rollouts_message(self.plan.rollouts(order.batch, order.weight_version))
                    await stream.send(Frame(Header(FrameKind.ROLLOUTS, batch=order.batch), to_bytes(message)))
            except (PeerLost, Unreachable):
                await asyncio.sleep(0.3)

    # A bad day -----------------------------------------------------------------------------------------------------------

    async def _storm(self) -> None:
        until = self.loop.now + self.plan.storm_s
        hosts = [f"host {i}" for i in range(self.plan.stages)] + ["host anchor"]
        weather, self.wan.weather = self.wan.weather, replace(self.wan.weather, loss=0.0)
        while not self._begun():
            await asyncio.sleep(0.1)
        self.wan.weather, self.begun = weather, True
        while self.loop.now < until and not self.reason:
            await asyncio.sleep(self.rng.expovariate(self.plan.rate) if self.plan.rate else self.plan.storm_s)
            if self.loop.now >= until or not self.plan.rate:
                break
            self._mishap(hosts)
        await asyncio.sleep(max(0.0, until - self.loop.now))
        self.stormy = False
        self.wan.heal()
        self.judge.note("calm again")

    def _mishap(self, hosts: list[str]) -> None:
        rng, stage = self.rng, self.rng.randrange(self.plan.stages)
        what = rng.choice(("stage", "stage", "stage", "anchor", "sampler", "freeze", "partition"))
        if what == "stage" and stage in self.stages and self._may_lose(stage):
            self.judge.note("stages killed")
            self._kill_stage(stage)
        elif what == "anchor" and self._may_lose_anchor():
            assert self.anchor is not None
            self.judge.note("anchors killed")
            self._kill(self.anchor[0], silent=rng.random() < 0.3)
        elif what == "sampler" and self.sampler is not None:
            self.judge.note("samplers killed")
            self._kill(self.sampler, silent=rng.random() < 0.3)
        elif what == "freeze" and stage in self.stages:
            seconds = rng.choice((0.5, 5.0, 25.0)) * rng.random()
            process = rng.choice([self.stages[stage][0], *([self.anchor[0]] if self.anchor else [])])
            process.frozen_until = self.loop.now + seconds
            self.judge.note("frozen")
            self.wan.froze(process, seconds)
        elif what == "partition":
            a, b = rng.sample(hosts, 2)
            self.judge.note("partitions")
            self.wan.partition(a, b, rng.choice((1.0, 8.0, 40.0)) * rng.random())

    # A run ---------------------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        loop = asyncio.get_running_loop()
        keeping = [loop.create_task(self._keep_up("anchor", "host anchor", self._anchor))]
        for stage in range(self.plan.stages):
            main = lambda process, stage=stage: self._stage(stage, process)
            keeping.append(loop.create_task(self._keep_up(f"stage {stage}", f"host {stage}", main)))
        keeping.append(loop.create_task(self._keep_up("sampler", "host 0", self._sampler)))
        keeping.append(loop.create_task(self._storm()))
        while not self.reason and not self.judge.trouble:
            await asyncio.sleep(0.5)
            if self.loop.now > self.plan.storm_s + HEALED_S:
                self.judge.trouble = f"no progress in {HEALED_S:.0f} s after all was well again: {self._standstill()}"
        await asyncio.sleep(8.0)  # whoever is told to leave leaves

    def _standstill(self) -> str:
        said = [
            f"{i}: epoch {s._turns.epoch}, {'at work' if s.worker else 'waiting'}"
            for i, (_, s) in sorted(self.stages.items())
        ]
        rounds = self.anchor[1].epochs.rounds if self.anchor else None
        return f"stages {said}; anchor {rounds and (rounds.epoch, rounds.phase.value, rounds.missing())}"

    def run(self) -> str:
        """To the end; returns the first objection, or nothing."""
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            self.loop.run_until_complete(self._live())
            if not self.judge.trouble:
                if self.reason != f"all {self.plan.ticks} ticks are done":
                    self.judge.object(f"the run ends with {self.reason!r}")
                check_end(self.plan, self.judge, self.out, self.hosts[0], stage_0_died=self.deaths[0] > 0)
        except (Objection, Stuck) as error:
            self._object(str(error))
        finally:
            logging.disable(level)
            for _, shell in self.stages.values():
                if hasattr(shell, "epochs"):
                    shell.epochs.redo.close()
            self._end_tasks()
            self.loop.close()
        return self.judge.trouble

    def _end_tasks(self) -> None:
        for process in (*(p for p, _ in self.stages.values()), *([self.anchor[0]] if self.anchor else [])):
            process.kill()
        while tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(tasks))


def shake(seed: int, folder: Path, mutate: Patch | None = None, **changes: Any) -> ShakenSwarm:
    """Run the plan of a seed in a new folder; the swarm after it, with `judge.trouble` if there was any."""
    with pytest.MonkeyPatch.context() as monkey:
        if mutate is not None:
            mutate(monkey)
        swarm = ShakenSwarm(replace(Plan.of(seed), **changes), folder, monkey)
        swarm.run()
        return swarm
