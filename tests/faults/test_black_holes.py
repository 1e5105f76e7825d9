"""A line that goes dead without a word: every process on a host of its own, over TLS, and every packet between two is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT_S, Processes
from warm_programs import WarmPrograms

from deploy.wan.link import Hosts, WanError, wan

NOTICED_S = 10.0
DEAD_S = 4.0  # from then on: what dials anew runs into the same hole
DELAY_MS = 20.0


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """For an anchor, three stages and a sampler."""
    try:
        with wan(5, rate_mbps=100, delay_ms=DELAY_MS) as made:
            yield made
    except WanError as error:
        pytest.skip(str(error))


@pytest.fixture
def processes(hosts: Hosts, run_file: Path, programs: WarmPrograms, tmp_path: Path) -> Iterator[Processes]:
    """Admitted by tokens, as TLS is the default off loopback."""
    swarm = Processes(programs, run_file, tmp_path / "run", 3, hosts=hosts)
    try:
        yield swarm
    finally:
        swarm.stop()


def seconds_until(condition: Callable[[], Any], processes: Processes) -> float:
    started = time.monotonic()
    while not condition():
        assert processes.see_to_it() and time.monotonic() - started < LIMIT_S
        time.sleep(0.02)
    return time.monotonic() - started


def test_a_dead_line_between_neighbours_ends_the_epoch_and_nothing_is_lost_once_it_is_mended(
    hosts: Hosts, processes: Processes, run_file: Path, calm: Any
) -> None:
    swarm, ends = type(calm)(run_file, processes.out), (processes.hosts["stage 1"], processes.hosts["stage 2"])
    assert processes.until(3)
    hosts.cut(*ends)
    noticed_s = seconds_until(lambda: swarm.events("fence"), processes)
    time.sleep(DEAD_S)
    at = processes.ticks
    hosts.heal(*ends)
    ticking_s = seconds_until(lambda: processes.ticks > at, processes)
    processes.end()
    print(f"cut to noticed {noticed_s:.1f} s, mended to ticking {ticking_s:.1f} s")
    assert "stage 2" in swarm.events("fence")[0]
    assert noticed_s < NOTICED_S
    assert all(row["lost_ticks"] == 0 for row in swarm.rows("event") if "lost_ticks" in row)
    swarm.check_equal(calm)


def test_a_dead_line_to_the_anchor_ends_no_epoch_and_stops_no_tick(
    hosts: Hosts, processes: Processes, run_file: Path, calm: Any
) -> None:
    swarm, ends = type(calm)(run_file, processes.out), (processes.hosts["anchor"], processes.hosts["stage 1"])
    assert processes.until(2)
    hosts.cut(*ends)
    at = processes.ticks
    noticed_s = seconds_until(lambda: "is away" in processes.words("stage 1"), processes)
    print(f"cut to noticed {noticed_s:.1f} s, {processes.ticks - at} ticks meanwhile")
    assert noticed_s < NOTICED_S and processes.ticks > at
    hosts.heal(*ends)
    processes.end()
    assert not swarm.events("fence")
    swarm.check_equal(calm)
