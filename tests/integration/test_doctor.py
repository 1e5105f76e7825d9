"""`swarm_worker doctor` against a real anchor: what it finds, that it is no member, and what it says where nobody answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchor_node import probing
from anchor_node.status import ask
from swarm_worker.doctor import Doctor, DoctorArguments, examine
from swarm_worker.machine import BAD, OK, SKIPPED, WARNING, Finding, device, disk


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in findings}


def test_a_healthy_swarm_at_work_is_found_healthy_and_not_joined(
    recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path
) -> None:
    found: list[list[Finding]] = []
    standing: list[dict[str, Any]] = []

    async def during(address: str) -> None:
        arguments = DoctorArguments(address, listen="127.0.0.1:0", out=tmp_path)
        found.append(await Doctor(arguments).run())  # while the members join
        while (await ask(address, 5.0))["tick"] < 1:
            await asyncio.sleep(0.05)
        found.append(await Doctor(arguments).run())
        standing.append(await ask(address, 5.0))

    run_swarm(recipe(batches=20).run_file(run={"ticks": 60}), tmp_path / "run", during=during)
    for findings in found:
        texts = {finding.name: finding.figure for finding in findings}
        known = {**verdicts(findings), "round trip": OK}  # of a machine that is busy: anything
        assert set(known.values()) == {OK}, findings
        assert "Mbit/s from the anchor" in texts["line down"] and "Mbit/s to the anchor" in texts["line up"]
        assert texts["reach-back"].startswith("the anchor reaches 127.0.0.1:")
    assert "run test: " in found[1][3].figure
    assert len(standing[0]["samplers"]) == 1 and len(standing[0]["stages"]) == 3


def test_what_is_wrong_is_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"127.0.0.1:{held.getsockname()[1]}"
        found = asyncio.run(Doctor(DoctorArguments(address)).run())
        assert verdicts(found) == {
            "name": OK, "TCP": BAD, "protocol": SKIPPED, "round trip": SKIPPED, "reach-back": SKIPPED, "line": SKIPPED,
        }  # fmt: skip
        assert "nobody listens there" in found[1].advice
        assert examine(DoctorArguments(address, out=tmp_path / "new")) == 1 and not (tmp_path / "new").exists()
        assert "1 bad" in capsys.readouterr().out
    nowhere = asyncio.run(Doctor(DoctorArguments("nowhere.invalid:7400")).run())
    assert nowhere[0].verdict == BAD and "nowhere.invalid" in nowhere[0].figure and len(nowhere) > 1


def test_a_port_that_leads_elsewhere_and_other_versions_are_seen(
    recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"kedge": "9.9", "torch": "1.0", "grpcio": "", "protobuf": ""}
    found: list[Finding] = []

    async def during(address: str) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            port = other.getsockname()[1]
            with monkeypatch.context() as patch:
                patch.setattr(probing, "installed", lambda: there)
                arguments = DoctorArguments(address, listen="127.0.0.1:0", advertise=f"127.0.0.1:{port}")
                found.extend(await Doctor(arguments).run())

    run_swarm(recipe().run_file(run={"ticks": 2}), tmp_path / "run", during=during)
    known = verdicts(found)
    assert known["versions"] == WARNING and known["reach-back"] == BAD
    text = next(finding for finding in found if finding.name == "versions")
    assert "torch" in text.figure and "1.0 at the anchor" in text.figure and "constraints.txt" in text.advice


def test_this_machine(tmp_path: Path) -> None:
    assert disk(tmp_path).verdict in (OK, WARNING) and "MB/s" in disk(tmp_path).figure
    assert disk(tmp_path / "new").verdict != BAD and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert disk(tmp_path / "file" / "below").verdict == BAD
    assert device().name == "device"
