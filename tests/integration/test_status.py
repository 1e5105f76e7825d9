"""`anchor_node status`: where a swarm stands while it waits, works and hangs, and who is told that nobody answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anchor_node.status import NoAnswer, address_in, ask, page
from swarm_core.errors import UserError
from swarm_core.run_folder import ADDRESS_FILE, MANIFEST_FILE
from swarm_core.wire.messages import Order
from swarm_worker.sampler.collect import Collected
from swarm_worker.sampler.source import Source


def shown(found: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(page(found))
    return console.export_text()


def test_a_swarm_tells_where_it_stands_while_it_waits_works_and_hangs(
    recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs for want of rollouts: the third batch is held back until the status has told so."""
    opened, collect = threading.Event(), Source.collect
    found: dict[str, dict[str, Any]] = {}

    def held(source: Source, order: Order) -> Collected | None:
        assert order.batch < 2 or opened.wait(60)
        return collect(source, order)

    monkeypatch.setattr(Source, "collect", held)

    async def before(address: str) -> None:
        found["first"] = await ask(address, 5.0)

    async def during(address: str) -> None:
        while True:
            found["hangs"] = now = await ask(address, 5.0)
            lead, *others = now["stages"]
            if "rollouts of batch 2" in lead.get("awaits", "") and all(stage.get("tick") == 8 for stage in others):
                break
            await asyncio.sleep(0.05)
        opened.set()

    run_swarm(recipe().run_file(run={"ticks": 12}), tmp_path / "run", before=before, during=during)
    first, hangs = found["first"], found["hangs"]
    assert first["phase"].startswith("waiting for stages 0") and {s["state"] for s in first["stages"]} == {"missing"}
    assert "waiting for stages" in shown(first)
    assert not first["samplers"] and "swarm_worker sample --anchor" in shown(first), "said as long as there is none"
    assert (hangs["phase"], hangs["tick"], hangs["epoch"]) == ("at work", 8, 1)
    assert [stage["state"] for stage in hangs["stages"]] == ["at work"] * 3 and len(hangs["samplers"]) == 1
    assert {stage["report_tick"] for stage in hangs["stages"]} == {7} and hangs["bytes"]["activation"] > 0
    text = shown(hangs)
    assert (
        "rollouts of batch 2, which a sampler has been asked for, for " in text and "at work: epoch 1, tick 8" in text
    )


def test_nobody_who_answers_is_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(1)  # a frozen anchor: the kernel takes the connection, nobody answers
        with pytest.raises(NoAnswer, match=r"did not answer within 1 s.*ticks go on without it.*--resume"):
            asyncio.run(ask(f"127.0.0.1:{held.getsockname()[1]}", 1.0))
    with pytest.raises(UserError, match="is not a run folder"):
        address_in(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({}))
    with pytest.raises(NoAnswer, match="no anchor is at work in .* --resume` continues it"):
        address_in(tmp_path)
    (tmp_path / ADDRESS_FILE).write_text("127.0.0.1:7400\n")
    assert address_in(tmp_path) == "127.0.0.1:7400"
