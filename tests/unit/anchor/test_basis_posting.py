"""A new basis version goes as changes to whoever was sent the one before, whole to others, and all hold the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from anchor_node.books import Books
from anchor_node.calibrator import BasisKeeper
from anchor_node.service import AnchorService
from codec.fit import Fit, orthonormalise
from codec.spec import Direction
from swarm_core.config import RunConfig
from swarm_core.knobs import DataSection, LinksSection, ModelSection
from swarm_core.learning.partition import Span
from swarm_core.manifest import Manifest
from swarm_core.wire.bases import Key, matrix_of
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import Frame
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import BasisSet, FrameKind, from_bytes
from swarm_worker.membership import Membership, read_bases

WIDTH, RANK = 64, 16
KEYS: list[Key] = [(boundary, direction) for boundary in (0, 1) for direction in Direction]
LINKS = LinksSection(rank_forward=RANK, rank_backward=RANK)
CONFIG = RunConfig(model=ModelSection(path="m"), data=DataSection(train="t.jsonl"), links=LINKS)
MANIFEST = Manifest(CONFIG, tuple(Span(i, 3, i, i + 1) for i in range(3)), WIDTH, 40, "")


def q(seed: int) -> Tensor:
    return orthonormalise(torch.randn(WIDTH, RANK, generator=torch.Generator().manual_seed(seed)))


class Member:
    """The end of a member's stream: what is posted to it, and what it makes of that."""

    def __init__(self, stage: int | None) -> None:
        self.stage = stage
        self.membership = Membership(cast(Any, None), MANIFEST, "", cast(Any, None))
        self.frames: list[BasisSet] = []
        self.digests: dict[Key, str] = {}

    def post(self, frame: Frame) -> None:
        assert frame.header.kind is FrameKind.BASIS
        self.frames.append(from_bytes(BasisSet, frame.payload))
        bases = read_bases(self.membership.take_bases(frame), MANIFEST, self.stage)
        self.digests = {key: basis.digest() for key, basis in bases.items()}


class Quiet:
    def update(self, row: dict[str, Any]) -> None:
        self.row = row

    def bytes_update(self, totals: dict[str, list[int]]) -> None: ...


class Anchor:
    """A service with these members, who have all been sent version 0."""

    def __init__(self, folder: Path) -> None:
        self.screen = Quiet()
        self.service = AnchorService(MANIFEST, self.screen, folder, [], Ledger())
        self.service.books = Books(folder)
        first = BasisSet(0, 0, [matrix_of(key, q(i), step=0.5) for i, key in enumerate(KEYS)])
        self.keeper = self.service.slow.keeper = BasisKeeper(MANIFEST.link(), 2, first)
        self.stages, self.sampler = [Member(i) for i in range(3)], Member(None)
        for stage in self.stages:
            self.join(stage)
        self.join(self.sampler)

    def join(self, member: Member) -> None:
        box = cast(Any, member)
        if member.stage is None:
            self.service.samplers.boxes[len(self.service.samplers.boxes)] = box
        else:
            self.service.stages[member.stage] = box
        self.service.slow.post_bases(box, member.stage)

    def refresh(self, seed: int) -> None:
        fits = {key: Fit(q(seed + i), q(seed + i).T, torch.ones(RANK), float(WIDTH)) for i, key in enumerate(KEYS)}
        self.service.slow.adopt_bases(10 * seed, fits)
        assert self.keeper.current.tick == 10 * seed


def played(work: Callable[[Anchor], None], folder: Path) -> None:
    async def inside() -> None:
        anchor = Anchor(folder)
        try:
            work(anchor)
        finally:
            anchor.service.books.close()

    asyncio.run(inside())


def everybody_holds_the_newest(anchor: Anchor) -> bool:
    wanted = {key: basis.digest() for key, basis in anchor.keeper.bases.items()}
    near = [
        {k: d for k, d in wanted.items() if m.stage is None or k[0] in (m.stage - 1, m.stage)} for m in members(anchor)
    ]
    return [m.digests for m in members(anchor)] == near


def members(anchor: Anchor) -> list[Member]:
    return [*anchor.stages, anchor.sampler]


def test_versions_go_as_changes_in_a_row_and_a_newcomer_gets_the_newest_whole(tmp_path: Path) -> None:
    def work(anchor: Anchor) -> None:
        for version in (1, 2):
            anchor.refresh(100 * version)
            for member in members(anchor):
                sent = member.frames[-1]
                assert (sent.version, sent.delta, sent.base) == (version, True, version - 1)
            assert everybody_holds_the_newest(anchor)
        anchor.sampler = Member(None)
        anchor.join(anchor.sampler)
        assert (anchor.sampler.frames[-1].version, anchor.sampler.frames[-1].delta) == (2, False)
        anchor.refresh(300)
        assert all(member.frames[-1].delta for member in members(anchor)) and everybody_holds_the_newest(anchor)
        row = anchor.screen.row
        assert row["event"] == "basis" and "version 3" in row["message"] and "basis/condition_forward/boundary_1" in row

    played(work, tmp_path)


def test_a_member_that_missed_a_version_gets_the_next_one_whole(tmp_path: Path) -> None:
    def work(anchor: Anchor) -> None:
        away = anchor.service.stages.pop(1)
        anchor.refresh(100)
        anchor.service.stages[1] = away
        anchor.refresh(200)
        assert [m.frames[-1].delta for m in anchor.stages] == [True, False, True]
        assert everybody_holds_the_newest(anchor)

    played(work, tmp_path)


def test_a_member_refuses_changes_of_what_it_does_not_hold(tmp_path: Path) -> None:
    def work(anchor: Anchor) -> None:
        anchor.refresh(100)
        stranger = cast(Any, Member(0))
        anchor.service.slow._bases_sent[stranger] = 0  # it never was
        with pytest.raises(BadFrame, match="came as changes of version 0, here is no version"):
            anchor.service.slow.post_bases(stranger, 0)

    played(work, tmp_path)
