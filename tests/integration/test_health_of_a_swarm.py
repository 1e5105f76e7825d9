"""--health-port on every program of a swarm: what it answers before, during and after the start."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anchor_node.serve import ServeArguments
from swarm_core.config import load
from swarm_core.run_folder import ADDRESS_FILE
from swarm_worker.sampler.process import SamplerArguments, serve_rollouts
from swarm_worker.stage_process import StageArguments, hold_stage

Answer = tuple[int, str]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def ask(port: int, path: str) -> Answer:
    """Status and words; 0 where nobody listens."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return 0, ""
    writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), json.loads(answer.partition("\r\n\r\n")[2])["why"]


async def until(port: int, path: str, code: int, words: str) -> Answer:
    while True:
        answer = await ask(port, path)
        if answer[0] == code and words in answer[1]:
            return answer
        await asyncio.sleep(0.005)


def test_every_program_tells_its_health(recipe: Callable[..., Any], anchor: Callable[..., Any], tmp_path: Path) -> None:
    run_file, out = recipe(batches=20).run_file(run={"ticks": 60}), tmp_path / "run"
    at, stage, sampler = free_port(), free_port(), free_port()

    async def watch(address: str, tasks: asyncio.TaskGroup) -> None:
        assert (await ask(at, "/startup"))[0] == 200
        assert await ask(at, "/ready") == (200, "waiting for stages 0, 1, 2")
        arguments = StageArguments(0, address, out=out, health_port=stage)
        tasks.create_task(hold_stage(arguments, signals=False))
        await until(stage, "/ready", 200, "waits for the start")
        assert await ask(stage, "/startup") == (200, "waits for the start")
        tasks.create_task(serve_rollouts(SamplerArguments(address, out=out, health_port=sampler), signals=False))
        for number in (1, 2):
            tasks.create_task(hold_stage(StageArguments(number, address, out=out), signals=False))
        await until(stage, "/ready", 200, "tick 1")
        await until(at, "/ready", 200, "at work")
        await until(sampler, "/ready", 200, "at work")
        for port in (at, stage, sampler):
            assert (await ask(port, "/live"))[0] == 200

    async def run() -> None:
        async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
            given = ServeArguments(load(run_file, {}), run_file, "127.0.0.1:0", out, False, health_port=at)
            ending = tasks.create_task(anchor(given))
            while not (out / ADDRESS_FILE).exists():
                assert not ending.done()
                await asyncio.sleep(0.005)
            await watch((out / ADDRESS_FILE).read_text().strip(), tasks)
        for port in (at, stage, sampler):
            assert (await ask(port, "/live"))[0] == 0, "and it goes with its program"

    asyncio.run(run())
