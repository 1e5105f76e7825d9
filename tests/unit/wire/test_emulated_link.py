"""The virtual clock of the emulated link: the rate holds, order holds, a full queue drops; and cuts. No namespace is made here."""

from __future__ import annotations

import select
import socket
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.wan import link
from deploy.wan.link import Host, Link, Shaper, WanError

PACKETS = st.lists(st.tuples(st.floats(0, 0.2), st.integers(20, 1500)), min_size=2, max_size=80)


@settings(derandomize=True, max_examples=200)
@given(PACKETS, st.floats(1000, 1e6), st.floats(0, 1))
def test_the_rate_holds_however_late_packets_are_looked_at(
    packets: list[tuple[float, int]], rate: float, queue_s: float
) -> None:
    line, now, through = Link(rate, queue_s), 0.0, []
    for idle_s, n in packets:
        now += idle_s
        before = line.free_at
        at = line.through_at(now, n)
        if at is None:
            assert before - now > queue_s and line.free_at == before, "dropped only from a full queue, at no cost"
            continue
        through.append((at, n))
        assert n / rate - 1e-9 <= at - now <= queue_s + n / rate + 1e-9
    for (first, _), (second, n) in pairwise(through):
        assert second - first >= n / rate - 1e-9


def test_a_busy_line_is_never_idle() -> None:
    line = Link(bytes_per_s=1e6, queue_s=10)
    assert [line.through_at(0.0, 1000) for _ in range(3)] == pytest.approx([0.001, 0.002, 0.003])
    assert line.through_at(1.0, 500) == pytest.approx(1.0005)


def test_a_host_runs_commands_in_its_namespace() -> None:
    assert Host("kedge-1-0", "10.77.0.1").command(["python", "-m", "x", 3]) == [
        *("ip", "netns", "exec", "kedge-1-0"),
        *("python", "-m", "x", "3"),
    ]


def test_a_cut_loses_what_two_hosts_send_each_other_and_nothing_else() -> None:
    hosts, tuns = zip(*(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)), strict=True)
    for tun in tuns:
        tun.setblocking(False)
    shaper = Shaper([tun.fileno() for tun in tuns], bytes_per_s=1e9, delay_s=0, queue_s=1, loss=0, seed=0)

    def arrives(source: int, target: int) -> bool:
        hosts[source].send(bytes([0x45, *[0] * 15, 10, 77, 0, target + 1]))  # as much of IPv4 as the shaper reads
        shaper.step()
        if any(shaper._due):  # a moment later
            shaper.step()
        return bool(select.select([hosts[target]], [], [], 0)[0]) and hosts[target].recv(99) != b""

    shaper.obey("cut 0 2\n")
    assert [arrives(*ends) for ends in ((0, 2), (2, 0), (0, 1), (1, 2))] == [False, False, True, True]
    shaper.obey("heal 2 0\n")
    assert arrives(0, 2) and arrives(2, 0)
    for end in (*hosts, *tuns):
        end.close()


def test_without_the_right_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link.os, "geteuid", lambda: 1000)
    with pytest.raises(WanError, match="needs root and /dev/net/tun"), link.wan(rate_mbps=1, delay_ms=1):
        pass
