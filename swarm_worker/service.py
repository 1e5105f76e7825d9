"""The stage's server side: who may open which stream, and what a sampler gets. No tensor work, no schedule."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from safetensors.torch import save
from torch import Tensor

from swarm_core.wire.errors import BadFrame, ManifestMismatch, PeerLost, StaleEpoch
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    PROTOCOL,
    Fetch,
    FrameKind,
    Hello,
    Order,
    Rollouts,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.streams import FrameStream, Server

ROLLOUT_LIMIT = 256 << 20  # a few million tokens


class StageService:
    """Accepts the link of the stage before and the feeds of samplers, once the worker knows its run."""

    def __init__(
        self,
        stage: int,
        ledger: Ledger,
        on_link: Callable[[FrameStream], Coroutine[Any, Any, None]],
        on_rollouts: Callable[[Rollouts], None],
    ) -> None:
        self.stage = stage
        self._on_link = on_link
        self._on_rollouts = on_rollouts
        self._known = asyncio.Event()
        self._digest, self._epoch = "", 0
        self._served: set[asyncio.Task[None]] = set()
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._published = asyncio.Condition()
        self._order: Order | None = None  # not yet given to anybody
        self._given: tuple[FrameStream, Order] | None = None  # to whom, and not yet answered with rollouts
        self._feeds: list[FrameStream] = []
        self._handing: set[asyncio.Task[None]] = set()
        self._order_lock = asyncio.Lock()
        self.server = Server("Stage", {"Link": self._link, "Feed": self._feed}, ledger)

    def open(self, manifest_digest: str, epoch: int) -> None:
        """From now on streams of this epoch are answered; before, they wait."""
        self._digest, self._epoch = manifest_digest, epoch
        self.server.door.begin_epoch()
        self._known.set()

    async def shut(self) -> None:
        """The epoch is over: end its streams, and let those of the next one wait."""
        self._known.clear()
        for task in self._served:
            task.cancel()
        await asyncio.gather(*self._served, return_exceptions=True)
        self._order = self._given = None
        self._weights = {}

    async def _serve(self, work: Coroutine[Any, Any, None]) -> None:
        """One stream's work, for as long as the epoch lasts."""
        task = asyncio.get_running_loop().create_task(work)
        self._served.add(task)
        task.add_done_callback(self._served.discard)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        if not task.cancelled():
            task.result()

    async def _greet(self, stream: FrameStream) -> Hello:
        hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
        await self._known.wait()
        if hello.protocol != PROTOCOL or hello.manifest_digest != self._digest:
            raise ManifestMismatch(
                f"stage {self.stage} runs manifest {self._digest[:12]}... (protocol {PROTOCOL}), the caller "
                f"{hello.manifest_digest[:12]}... (protocol {hello.protocol}): both must join the same anchor"
            )
        return hello

    async def _link(self, stream: FrameStream) -> None:
        hello = await self._greet(stream)
        if hello.stage != self.stage - 1:
            raise BadFrame(f"stage {hello.stage} dialled stage {self.stage}; only stage {self.stage - 1} may")
        stream.name(f"stage{hello.stage}-stage{self.stage}", "up")
        if hello.epoch != self._epoch:
            raise StaleEpoch(f"stage {hello.stage} links up for epoch {hello.epoch}; this is epoch {self._epoch}")
        stream.peer = f"stage {hello.stage}"
        await stream.send(Frame(Header(FrameKind.WELCOME), to_bytes(Welcome(manifest_digest=self._digest))))
        await self._serve(self._on_link(stream))

    # Samplers ----------------------------------------------------------------------------------------------------------

    async def publish(self, version: int, weights: dict[str, Tensor], keep: set[int]) -> None:
        """Let samplers fetch this version; forget those no longer kept."""
        async with self._published:
            self._weights[version] = weights
            self._weights = {v: w for v, w in self._weights.items() if v in keep}
            self._published.notify_all()

    def offer(self, version: int, weights: dict[str, Tensor]) -> None:
        """Before the service is open: the version that a resumed run starts from."""
        self._weights[version] = weights

    async def order(self, order: Order) -> None:
        """Hand an order to a sampler, now or as soon as one is there."""
        self._order = order
        await self._give_order()

    async def _give_order(self) -> None:
        async with self._order_lock:
            if self._order is not None and self._feeds:
                feed, order = self._feeds[0], self._order
                self._order, self._given = None, (feed, order)
                with contextlib.suppress(PeerLost):  # its reader meets the same end, and hands the order on
                    await feed.send(Frame(Header(FrameKind.ORDER, batch=order.batch), to_bytes(order)))

    async def _hand_on(self, gone: FrameStream) -> None:
        """What a sampler that left did not finish goes to the next one."""
        if self._given is not None and self._given[0] is gone:
            order, self._given = self._given[1], None
            self._order = self._order or order
            await self._give_order()

    async def _feed(self, stream: FrameStream) -> None:
        await self._greet(stream)
        stream.name(f"sampler-stage{self.stage}", "up", {FrameKind.ROLLOUTS: ROLLOUT_LIMIT})
        stream.peer = "the sampler"
        await stream.send(Frame(Header(FrameKind.WELCOME), to_bytes(Welcome(manifest_digest=self._digest))))
        await self._serve(self._feed_on(stream))

    async def _feed_on(self, stream: FrameStream) -> None:
        self._feeds.append(stream)
        try:
            await self._give_order()
            while (frame := await stream.receive()) is not None:
                if frame.header.kind is FrameKind.FETCH:
                    await self._send_weights(stream, from_bytes(Fetch, frame.payload).version)
                elif frame.header.kind is FrameKind.ROLLOUTS:
                    self._on_rollouts(from_bytes(Rollouts, frame.payload))
                    if self._given is not None and self._given[0] is stream:
                        self._given = None  # only now: rollouts that were refused leave the order to the next sampler
                else:
                    raise BadFrame(f"a sampler sent {frame.header.kind.name}")
        finally:
            self._feeds.remove(stream)
            # On a task of its own: gRPC cancels this call when its peer is gone, also in the middle of handing on.
            task = asyncio.get_running_loop().create_task(self._hand_on(stream))
            self._handing.add(task)
            task.add_done_callback(self._handing.discard)

    async def _send_weights(self, stream: FrameStream, version: int) -> None:
        async with self._published:
            # A version older than what is kept was replaced while the sampler was away: it gets the newest.
            await self._published.wait_for(lambda: any(v >= version for v in self._weights))
            version = min(v for v in self._weights if v >= version)
            weights = self._weights[version]
        payload = await asyncio.to_thread(save, weights)
        await stream.send(Frame(Header(FrameKind.WEIGHTS, tick=version), payload))
