"""How the anchor lets strangers in: TLS on its server, the call that gives certificates, and `anchor_node token`."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from anchor_node.authority import CERTIFICATE_S, TOKEN_S, Authority, TokenRecord
from swarm_core.errors import UserError
from swarm_core.wire.enrolment import keep_valid
from swarm_core.wire.streams import Server, is_loopback

log = logging.getLogger(__name__)
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Admission:
    """What the command line of `anchor_node serve` says about strangers. At most one of the first three is given."""

    tls: bool = False
    insecure: bool = False
    trusted_network: bool = False
    certificate_s: float = CERTIFICATE_S


def secure(server: Server, listen: str, out: Path, admission: Admission) -> asyncio.Task[None] | None:
    """Give the anchor's server its identity, unless it keeps to this machine. The task renews it, for as long as it runs.

    Raises UserError where an address and a flag contradict each other, AuthorityError.
    """
    here = is_loopback(listen)
    if admission.insecure and not here:
        raise UserError(
            f"--insecure is for this machine alone, and others can reach {listen}: leave it out, or --listen on 127.0.0.1"
        )
    server.trusted_network = admission.trusted_network
    if admission.insecure or admission.trusted_network or here and not admission.tls:
        return None
    authority = Authority(out, certificate_s=admission.certificate_s)
    server.identity = identity = authority.identity()
    server.add_answer("Enrol", authority.enrol)
    log.info(
        "TLS by the authority %s of %s; to admit a machine, for each stage I and each sampler:", authority.digest, out
    )
    log.info("    anchor_node token create --out %s --role stage --stage I    (or --role sampler)", out)
    return asyncio.create_task(keep_valid(identity, lambda: authority.renew(identity)))


def read_duration(text: str) -> float:
    """Seconds of "90s", "30m", "1h", "2d". Raises UserError."""
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS_S or not number.isascii() or not number.isdigit() or int(number) == 0:
        raise UserError(f"{text!r} is not a duration: wanted a whole number and s, m, h or d, such as 30m")
    return float(int(number) * UNITS_S[unit])


def read_certificate_life(text: str) -> float:
    """Seconds that a certificate lives. Raises UserError."""
    if not 60.0 <= (life_s := read_duration(text)) <= 90 * 86400.0:
        raise UserError(f"--certificate-life {text}: wanted 1m to 90d; a stolen key is good for that long")
    return life_s


def create_token(out: Path, role: str, stage: int | None, ttl: str | None) -> None:
    """Print a token on stdout, alone, and on stderr what to do with it. Raises AuthorityError, UserError."""
    lifetime_s = read_duration(ttl) if ttl else TOKEN_S
    authority = Authority(out)
    print(authority.create_token(role, stage, lifetime_s), flush=True)
    if authority.made:
        print(f"{out} had no authority, and has a new one: is it the --out of the anchor?", file=sys.stderr)
    until = datetime.fromtimestamp(authority.clock() + lifetime_s, UTC)
    verb = f"join --stage {stage} --listen 0.0.0.0:PORT --advertise HOST:PORT" if role == "stage" else "sample"
    print(
        f"good once, until {until:%H:%M} UTC, of authority {authority.digest[:16]}...; on the other machine:\n"
        f"  KEDGE_TOKEN=TOKEN swarm_worker {verb} --anchor ANCHOR:7400",
        file=sys.stderr,
    )


def list_tokens(out: Path) -> None:
    """Print what is known of each token, a line each."""
    authority = _existing(out)
    for record in authority.list_tokens():
        until = datetime.fromtimestamp(record.expires, UTC)
        print(f"{record.id}  {_whom(record):9}  {record.state(authority.clock()):8} until {until:%Y-%m-%d %H:%M} UTC")


def revoke_token(out: Path, prefix: str) -> None:
    """Make a token useless. Raises AuthorityError."""
    record = _existing(out).revoke_token(prefix)
    print(f"token {record.id} for {_whom(record)} is revoked")


def _whom(record: TokenRecord) -> str:
    return "sampler" if record.stage is None else f"stage {record.stage}"


def _existing(out: Path) -> Authority:
    if not (out / "anchor" / "authority").is_dir():
        raise UserError(
            f"{out} has no authority yet: `anchor_node token create --out {out}` makes one with the first token"
        )
    return Authority(out)
