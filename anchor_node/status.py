"""`anchor_node status`: asks a running anchor where its swarm stands, and prints it for people or as JSON."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from anchor_node.authority import Authority
from anchor_node.record import byte_text
from swarm_core.errors import KedgeError, UserError
from swarm_core.run_folder import ADDRESS_FILE, MANIFEST_FILE
from swarm_core.wire.errors import PeerLost, Unreachable
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Hello, Status, from_bytes, to_bytes
from swarm_core.wire.streams import dial
from swarm_core.wire.tls import Identity, load_identity

LONG_S = 30.0  # a wait that is worth a look; a stage says in its own log as well what it awaits by then
ANSWER_S = 5.0  # for an anchor that has taken the connection


class NoAnswer(KedgeError):
    """No anchor says where the swarm stands."""


def show_status(
    anchor: str | None, out: Path | None, *, as_json: bool, wait_s: float, certificate: Path | None, tls: bool
) -> int:
    """The command. Raises NoAnswer, UserError."""
    address, identity = anchor or address_in(out or Path()), None
    if certificate is not None:
        try:
            identity = load_identity(certificate)
        except OSError as error:
            raise UserError(f"--certificate {certificate}: cannot be read ({error.strerror})") from None
    elif tls and out is not None:
        identity = Authority(out).identity()
    found = asyncio.run(ask(address, wait_s, identity))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        Console(highlight=False).print(page(found))
    return 0


def address_in(out: Path) -> str:
    """Where the anchor of a run folder listens. Raises UserError, NoAnswer."""
    try:
        return (out / ADDRESS_FILE).read_text().strip()
    except OSError:
        pass
    if not (out / MANIFEST_FILE).exists():
        raise UserError(f"{out} is not a run folder: give the --out of an anchor, or --anchor HOST:PORT")
    raise NoAnswer(
        f"no anchor is at work in {out} (it holds no {ADDRESS_FILE}): the run has ended, or has not begun; "
        f"`anchor_node serve ... --out {out} --resume` continues it"
    )


async def ask(address: str, wait_s: float, identity: Identity | None = None) -> dict[str, Any]:
    """The standing of the swarm whose anchor listens there. Raises BadAddress, NoAnswer."""
    advice = "ticks go on without it; look at its log, and start it again with the same --out and --resume if it died"
    try:
        stream = await dial(address, "Anchor/Status", Ledger(), "the anchor", wait_s, identity=identity)
        try:
            async with asyncio.timeout(max(ANSWER_S, wait_s)):
                await stream.send(Frame(Header(FrameKind.HELLO), to_bytes(Hello(role="status"))))
                answer = await stream.expect(FrameKind.STATUS)
                found: dict[str, Any] = json.loads(from_bytes(Status, answer.payload).json)
                return found
        finally:
            await stream.close()
    except Unreachable as error:
        raise NoAnswer(f"{error}; {advice}") from None
    except TimeoutError:
        raise NoAnswer(f"the anchor at {address} takes connections but does not answer: {advice}") from None
    except PeerLost as error:
        raise NoAnswer(f"the anchor at {address} did not tell ({error}): is it of this version?") from None


def page(found: dict[str, Any]) -> Group:
    """The standing for people."""
    target = f" of {found['target_ticks']}" if found["target_ticks"] else ""
    since = found["since_last_tick_s"]
    moved = "" if since is None else f", last tick {seconds(since)} ago"
    hangs = since is not None and since > LONG_S and found["phase"] == "at work"
    lines = [
        Text.assemble((found["run"], "bold"), (f"  manifest {found['manifest']}, anchor at {found['address']}", "dim")),
        Text(
            f"{found['phase']}: epoch {found['epoch']}, tick {found['tick']}{target}{moved}", "yellow" if hangs else ""
        ),
    ]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    copies = ["copied"] if any(stage.get("copied_tick") for stage in found["stages"]) else []
    for name in ("member", "address", "state", "tick", "reported", *copies, "last heard", "awaits"):
        table.add_column(name, no_wrap=name != "awaits", overflow="fold")
    for stage in found["stages"]:
        table.add_row(f"stage {stage['stage']}", *_cells(stage, bool(copies)), style=_style(stage))
    for sampler in found["samplers"]:
        table.add_row("sampler", *_cells(sampler, bool(copies)), style=_style(sampler))
    if not found["samplers"]:
        table.add_row(
            "sampler",
            "",
            "none",
            "",
            "",
            *([""] if copies else []),
            "",
            f"start: swarm_worker sample --anchor {found['address']}",
        )
    facts = [
        ("checkpoint", _told(found["checkpoint"]) or found["resumed_from"] or "none yet", ""),
        (
            "bases",
            "none: these links keep no basis"
            if found["basis_version"] is None
            else f"version {found['basis_version']}",
            "",
        ),
        ("correction", _told(found["correction"]), ""),
        ("bytes", ", ".join(f"{kind} {byte_text(n)}" for kind, n in found["bytes"].items()), ""),
        ("last event", _told(found["last_event"], named=True), ""),
        ("last error", _told(found["last_error"], named=True), "red"),
    ]
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, text, style in facts:
        if text:
            grid.add_row(Text(name, "dim"), Text(text, style))
    return Group(*lines, Text(), table, Text(), grid)


def _cells(member: dict[str, Any], copies: bool) -> list[str]:
    awaits = member.get("awaits") or ""
    if awaits:
        awaits = f"{awaits}, for {seconds(member['awaits_s'])}"
    state = (
        member["state"]
        if member["state"] not in ("loading", "ready", "here")
        else member.get("phase") or member["state"]
    )
    heard = f"{seconds(member['silent_s'])} ago" if "silent_s" in member else ""
    tick, reported = member.get("tick"), member.get("report_tick")
    counts = (tick, reported, *([member.get("copied_tick")] if copies else []))
    shown = ["" if value is None else str(value) for value in counts]
    return [member.get("address") or "", state, *shown, heard, awaits]


def _style(member: dict[str, Any]) -> str | None:
    if member["state"] in ("missing", "away"):
        return "red"
    return "yellow" if member.get("awaits") and member["awaits_s"] > LONG_S else None


def _told(row: dict[str, Any] | None, *, named: bool = False) -> str:
    if row is None:
        return ""
    name = f"{row['name']}: " if named and row["name"] else ""
    return f"{name}{row['message']} (tick {row['tick']}, {seconds(row['age_s'])} ago)"


def seconds(value: float) -> str:
    """A time span as people say it."""
    for limit, unit in ((120.0, 1.0), (7200.0, 60.0)):
        if value < limit:
            return f"{value / unit:.0f} {'s' if unit == 1.0 else 'min'}"
    return f"{value / 3600:.1f} h"
