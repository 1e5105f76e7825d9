"""The process of one sampler: takes orders from stage 0, fetches weights from all stages, delivers rollouts, evaluates.

The data cursor is not here: an order names its batch number, and prompts and draws are a function of that number. So a
sampler can be replaced at any moment: what it did not finish is drawn again, by the next one. A stage that is lost ends the
epoch: the sampler links up anew with the next START, and delivers what it has drawn to whoever asks for that batch then.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from swarm_core.models.architecture import fingerprint, read_shape
from swarm_core.models.reading import tensor_shapes
from swarm_core.run_folder import make_folder
from swarm_core.wire.errors import BadFrame, PeerLost, StaleEpoch, Unreachable
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.health import Health
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    Fetch,
    FrameKind,
    Hello,
    Order,
    Ready,
    Report,
    Rollouts,
    Start,
    Stop,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.rollouts import rollouts_message
from swarm_core.wire.streams import Dialled, dial
from swarm_worker.anchor_link import AnchorLink, Standing
from swarm_worker.entry import enter
from swarm_worker.membership import Membership, await_word, join, tell_failure
from swarm_worker.sampler.collect import Collected
from swarm_worker.sampler.evaluate import Evaluation
from swarm_worker.sampler.source import SamplerArguments, Source
from swarm_worker.sampler.verify import failures
from swarm_worker.sampler.weights import read_weights
from swarm_worker.vitals import watch_member

log = logging.getLogger(__name__)
LEAVE_S = 60.0  # for the last report, once the anchor has said that the run is over
WORD_S = 30.0  # for the anchor to say that a stage which cannot be reached is a lost one
SAFETENSORS_HEADER = 1 << 20  # names and shapes beside the weights themselves


async def serve_rollouts(arguments: SamplerArguments, *, signals: bool = True) -> None:
    """`swarm_worker sample`. `signals` False leaves SIGINT and SIGTERM alone."""
    await SamplerProcess(arguments, signals).run()


class SamplerProcess:
    """Everything from the command line to the exit of one sampler."""

    def __init__(self, arguments: SamplerArguments, signals: bool) -> None:
        self.arguments = arguments
        self._signals = signals
        self.ledger = Ledger()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._starts: asyncio.Queue[Start] = asyncio.Queue()
        self._epoch = 0
        self._drawn: tuple[int, int, Collected | None] | None = (
            None  # the last batch, the epoch it was drawn in, and it
        )
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._weights: asyncio.Queue[tuple[int, int, memoryview]] = asyncio.Queue()
        self._feeds: list[Dialled] = []
        self._tick = 0  # of the newest order
        self.health = Health()

    async def run(self) -> None:
        """Serve orders until the run ends. Raises typed errors with one readable line."""
        a = self.arguments
        make_folder(a.out)
        await self.health.start(a.health_port, a.anchor)
        try:
            await self._sample()
        finally:
            await self.health.stop()

    async def _sample(self) -> None:
        a = self.arguments
        hello = Hello(role="sampler")
        identity = await enter(a.entry, a.anchor, None, a.out, "sampler", None, a.wait_s)
        membership = await join(a.anchor, "Anchor/Sample", hello, self.ledger, a.wait_s, "anchor-sampler", identity)
        watch_member(self.health, membership.way.pulse)
        if membership.manifest.config.run.threads:
            torch.set_num_threads(membership.manifest.config.run.threads)
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        tasks: list[asyncio.Task[None]] = []
        source, link = None, None
        try:
            source = await self._call(Source, membership.manifest, a)
            ready = await self._ready(membership, source)
            start = await await_word(membership, ready, a.wait_s, source.hold_bases)
            if start is None:
                return
            link = AnchorLink(membership, lambda: Standing(self._epoch, self._tick, source.basis_version))
            pulse = membership.way.pulse
            pulse.phase, pulse.stands = "at work", lambda: (self._epoch, self._tick)
            if self._signals:
                self._on_signals(link)
            tasks = [
                asyncio.create_task(work)
                for work in (
                    self._serve(link, membership, source, start),
                    link.run(),
                    self._read_anchor(link, membership, source),
                )
            ]
            for task in tasks:
                task.add_done_callback(self._task_done)
            log.info("the run is over: %s", await self.over)
            tasks[0].cancel()  # orders: nothing is delivered any more, and the last report must be the last
            link.post_report(Report(type="ledger", tick=source.version))
            if not await link.leave(LEAVE_S):
                log.warning("the sampler leaves before the anchor has booked its last report")
        except Exception as error:
            if link is not None:
                await link.last_words("the sampler", error)
            else:
                await tell_failure(membership, "the sampler", error)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await membership.anchor.close()
            if source is not None:
                self._thread.submit(source.close)  # behind a generation under way, which cannot be interrupted
            self._thread.shutdown(wait=False)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _serve(self, link: AnchorLink, membership: Membership, source: Source, start: Start) -> None:
        """One epoch after the other. Stages may leave before this sampler hears that the run is over."""
        word = asyncio.create_task(self._starts.get())
        epoch = asyncio.create_task(self._serve_epoch(link, membership, source, start))
        try:
            while True:
                await asyncio.wait({word, epoch}, return_when=asyncio.FIRST_COMPLETED)
                if not word.done():
                    try:
                        epoch.result()
                    except (PeerLost, StaleEpoch) as error:
                        log.warning("%s: waiting for the anchor's word", error)
                        away = asyncio.create_task(link.away_for(link.end_wait_s))
                        await asyncio.wait({word, away}, return_when=asyncio.FIRST_COMPLETED)
                        away.cancel()
                        if not word.done():
                            raise
                    except Unreachable:  # nothing was ever heard of that stage
                        await asyncio.wait({word}, timeout=WORD_S)
                        if not word.done():
                            raise
                start, word = word.result(), asyncio.create_task(self._starts.get())
                epoch.cancel()
                await asyncio.wait({epoch})
                epoch = asyncio.create_task(self._serve_epoch(link, membership, source, start))
        finally:
            word.cancel()
            epoch.cancel()
            await asyncio.wait({epoch})

    async def _serve_epoch(self, link: AnchorLink, membership: Membership, source: Source, start: Start) -> None:
        """Link up with all stages and take their orders, until one of them is lost."""
        self._epoch, self._orders, self._weights = start.epoch, asyncio.Queue(), asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._dial_stages(membership, source, start)
            tasks = [asyncio.create_task(self._read_feed(stage, feed)) for stage, feed in enumerate(self._feeds)]
            tasks.append(asyncio.create_task(self._serve_orders(link, source)))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            feeds, self._feeds = self._feeds, []
            for feed in feeds:
                await feed.close()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        """A task that fails ends the sampler."""
        if not task.cancelled() and (error := task.exception()) is not None and not self.over.done():
            self.over.set_exception(error)

    async def _ready(self, membership: Membership, source: Source) -> Frame:
        found = await self._call(fingerprint, source.model_path)
        if not source.replaying and found != membership.manifest.model_fingerprint:
            raise BadFrame(
                f"{source.model_path} is not the checkpoint of this run (fingerprint {found[:12]}..., wanted "
                f"{membership.manifest.model_fingerprint[:12]}...): point --model at the same files"
            )
        return Frame(Header(FrameKind.READY), to_bytes(Ready(model_fingerprint=found)))

    async def _dial_stages(self, membership: Membership, source: Source, start: Start) -> None:
        shape = read_shape(source.model_path)
        hello = to_bytes(Hello(role="feed", manifest_digest=membership.digest))
        for stage, address in enumerate(start.stage_addresses):
            feed = await dial(
                address, "Stage/Feed", self.ledger, f"stage {stage}", self.arguments.wait_s,
                identity=membership.way.identity, stage=stage,
            )  # fmt: skip
            self._feeds.append(feed)
            shapes = tensor_shapes(shape, membership.manifest.spans[stage]).values()
            largest = sum(4 * math.prod(dims) for dims in shapes) + SAFETENSORS_HEADER
            feed.name(f"sampler-stage{stage}", "down", {FrameKind.WEIGHTS: largest})
            await feed.send(Frame(Header(FrameKind.HELLO, membership.run), hello))
            from_bytes(Welcome, (await feed.expect(FrameKind.WELCOME)).payload)

    async def _read_anchor(self, link: AnchorLink, membership: Membership, source: Source) -> None:
        while (frame := await link.receive()) is not None:
            match frame.header.kind:
                case FrameKind.BASIS:
                    await asyncio.to_thread(source.hold_bases, membership.take_bases(frame))
                case FrameKind.START:
                    self._starts.put_nowait(from_bytes(Start, frame.payload))
                case FrameKind.STOP:
                    if not self.over.done():
                        self.over.set_result(from_bytes(Stop, frame.payload).reason)
                    return
                case kind:
                    raise BadFrame(f"the anchor sent {kind.name}")

    async def _read_feed(self, stage: int, feed: Dialled) -> None:
        while (frame := await feed.receive()) is not None:
            match frame.header.kind:
                case FrameKind.ORDER:
                    self._orders.put_nowait(from_bytes(Order, frame.payload))
                case FrameKind.WEIGHTS:
                    self._weights.put_nowait((stage, frame.header.tick, memoryview(frame.payload)))
                case kind:
                    raise BadFrame(f"stage {stage} sent {kind.name}")
        raise PeerLost(f"stage {stage} closed its stream")

    async def _serve_orders(self, link: AnchorLink, source: Source) -> None:
        while True:
            order = await self._orders.get()
            self._tick = order.weight_version
            started = time.monotonic()
            if not source.replaying:
                await self._fetch(order.weight_version, source)
            fetched_s = time.monotonic() - started
            if order.generate:
                collected = await self._call(self._collect, source, order, self._epoch)
                generated_s = time.monotonic() - started - fetched_s
                await self._deliver(order, collected)
                verdicts = [sample.verdict for sample in collected.samples] if collected is not None else []
                _complain(link, order, failures(verdicts))
                if collected is not None and collected.metrics:
                    numbers = {**collected.metrics, "fetch_s": fetched_s, "generate_s": generated_s}
                    link.post_report(Report("rollout", order.weight_version, {"batch": order.batch, **numbers}))
            if order.evaluate and source.can_evaluate:
                plain, compressed = await self._call(source.evaluate)
                link.post_report(self._evaluated(order, plain, compressed))
                _complain(link, order, plain.failures and f"evaluation: {plain.failures}")
            elif order.evaluate:
                words = {"event": "no_evaluation", "message": "this sampler replays: it has no model to evaluate"}
                link.post_report(Report("event", order.weight_version, words=words))

    def _collect(self, source: Source, order: Order, epoch: int) -> Collected | None:
        """The rollouts of an order; those that were drawn for the same batch in an epoch that was cut off serve again."""
        if self._drawn is None or self._drawn[0] != order.batch or self._drawn[1] == epoch:
            self._drawn = order.batch, epoch, source.collect(order)
        self._drawn = order.batch, epoch, self._drawn[2]
        return self._drawn[2]

    async def _deliver(self, order: Order, collected: Collected | None) -> None:
        message = Rollouts(batch=order.batch, exhausted=True)
        if collected is not None:
            message = rollouts_message(collected.rollouts)
        await self._feeds[0].send(
            Frame(Header(FrameKind.ROLLOUTS, tick=order.weight_version, batch=order.batch), to_bytes(message))
        )

    async def _fetch(self, version: int, source: Source) -> None:
        """Bring the engine to a version; all stages must answer with the same one."""
        wanted = set(range(len(self._feeds)))
        while source.version < version:
            for stage in sorted(wanted):
                await self._feeds[stage].send(Frame(Header(FrameKind.FETCH, tick=version), to_bytes(Fetch(version))))
            got: dict[int, tuple[int, memoryview]] = {}
            while len(got) < len(wanted):
                stage, found, payload = await self._weights.get()
                got[stage] = (found, payload)
            version = max(found for found, _ in got.values())
            if any(found < version for found, _ in got.values()):
                continue  # a stage was still at the older one: ask all again for the newest
            for stage, (_, payload) in got.items():
                state = await self._call(read_weights, payload, stage, version)
                await self._call(source.load_weights, state, version)

    def _evaluated(self, order: Order, plain: Evaluation, compressed: Evaluation | None) -> Report:
        numbers: dict[str, float] = {
            "batch": order.batch,
            "eval/accuracy": plain.accuracy,
            "eval/interval95": 1.96 * plain.standard_error,
            "eval/mean_length": plain.mean_length,
            "eval/truncated_ratio": plain.truncated_share,
            "eval/prompts": plain.completions,
        }
        if compressed is not None:
            numbers["eval/accuracy_compressed"] = compressed.accuracy
        return Report("eval", order.weight_version, numbers)

    def _on_signals(self, link: AnchorLink) -> None:
        loop = asyncio.get_running_loop()
        asked = False

        def leave(name: str) -> None:
            nonlocal asked
            if asked:
                if not self.over.done():
                    self.over.set_exception(KeyboardInterrupt(name))
                return
            log.warning("%s: asking for the end of the run; once more to leave at once", name)
            link.post(Frame(Header(FrameKind.STOP), to_bytes(Stop(reason=f"the sampler got {name}"))))
            asked = True

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, leave, number.name)


def _complain(link: AnchorLink, order: Order, text: str) -> None:
    """Tell people, once a batch, that the reward function fails: a reward of 0 must not be all they see."""
    if text:
        log.warning("batch %d: %s", order.batch, text)
        words = {"event": "verifier_failed", "message": f"batch {order.batch}: {text}"}
        link.post_report(Report("event", order.weight_version, words=words))
