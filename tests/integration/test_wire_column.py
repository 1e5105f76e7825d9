"""The wire column against a kernel: a few frames between two network namespaces. Needs root; skipped without."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.wire.calibration import KB, MB, Case, calibrate
from experiments.wire.demo import sent_by
from experiments.wire.network import BenchError, Network

CASES = (
    Case("small", (KB,) * 40, gap_s=0.005),
    Case("tensors", (8 * KB,) * 40, answered=True),
    Case("bulk", (MB,) * 2),
)


@pytest.fixture
def namespaces() -> None:
    try:
        with Network(("probe",), "100mbit"):
            pass
    except BenchError as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("tls", [False, True])
def test_the_ledger_agrees_with_the_interface(tls: bool, tmp_path: Path) -> None:
    for case, down, up in calibrate(tmp_path / "wire", tls, "100mbit", CASES):
        again = down.sockets.retransmitted_bytes + up.sockets.retransmitted_bytes
        counted = down.interface + up.interface - again
        assert down.sockets.sent_bytes > sum(case.sizes) and down.ledger > down.sockets.sent_bytes
        assert abs(down.ledger + up.ledger - counted) < 0.03 * counted, case.name


def test_a_link_s_lower_end_sends_what_goes_up(tmp_path: Path) -> None:
    file = tmp_path / "ledger.csv"
    file.write_text(
        "tick,link,direction,kind,dense_bytes,packet_bytes,message_bytes,wire_bytes,frames\n"
        "0,stage0-stage1,down,activation,9,9,100,200,1\n0,stage0-stage1,up,control,0,0,0,40,0\n"
        "1,stage1-stage2,down,activation,9,9,10,20,1\n"
    )
    message, wire = sent_by(file)
    assert dict(message) == {"stage0": 100, "stage1": 10} and dict(wire) == {"stage0": 200, "stage1": 60}
