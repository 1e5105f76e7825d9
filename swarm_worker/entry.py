"""How a worker comes in: in plain on this machine, or with a certificate that a token has bought and that is kept and renewed.

OUT/identity/stage-2.pem            key, certificate and the authority trusted, nobody else's to read
OUT/identity/stage-2.pending.pem    the key of a first request, until its answer has come: the same key may ask again
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from swarm_core.errors import UserError
from swarm_core.wire.channel import open_channel
from swarm_core.wire.enrolment import asks, enrol, keep_valid, read_token
from swarm_core.wire.errors import Unauthenticated
from swarm_core.wire.streams import is_loopback, split_address
from swarm_core.wire.tls import (
    ENROL,
    HOW_TO_ENTER,
    Identity,
    fingerprint_of,
    key_pem,
    load_identity,
    new_key,
    write_private,
)

log = logging.getLogger(__name__)
TOKEN_VARIABLE = "KEDGE_TOKEN"
RENEWAL_WAIT_S = 10.0  # for the anchor to answer; it is asked again later
_renewals: set[asyncio.Task[None]] = set()  # the loop itself keeps no task alive


@dataclass(frozen=True)
class Entry:
    """What the command line says about coming in. At most one of the last three is given."""

    token: str = ""  # itself, or the file that holds it; otherwise of the environment
    tls: bool = False
    insecure: bool = False
    trusted_network: bool = False


async def enter(
    entry: Entry, anchor: str, listen: str | None, out: Path, role: str, stage: int | None, wait_s: float
) -> Identity | None:
    """The identity to dial and to serve with, renewed from now on; None: no TLS.

    A certificate that is kept and still holds is taken; a token is not used up then. Raises UserError where flags and
    addresses contradict each other, Unauthenticated, NotAllowed, Unreachable.
    """
    for address in filter(None, (anchor, listen)):
        split_address(address)
    beyond = [address for address in (anchor, listen) if address is not None and not is_loopback(address)]
    if entry.insecure and beyond:
        raise UserError(
            f"--insecure is for this machine alone, and {beyond[0]} is not on it: leave it out, use a token"
        )
    line = (
        ""
        if entry.insecure or entry.trusted_network
        else _token_line(entry.token or os.environ.get(TOKEN_VARIABLE, ""))
    )
    if entry.insecure or entry.trusted_network or not (beyond or line or entry.tls):
        return None
    path = out / "identity" / f"{role if stage is None else f'{role}-{stage}'}.pem"
    identity = _kept(path, line)
    if identity is None:
        if not line:
            where = f"with {beyond[0]}" if beyond else "with --tls"
            raise Unauthenticated(f"{where} a certificate is needed, and there is none in {path}: {HOW_TO_ENTER}")
        identity = await _enrolled(line, anchor, path, role, stage, wait_s)
    log.info(
        "certificate of %s until %s UTC", identity.name, f"{identity.certificate.not_valid_after_utc:%Y-%m-%d %H:%M}"
    )
    task = asyncio.create_task(keep_valid(identity, _renewal(identity, anchor, path)))
    _renewals.add(task)
    task.add_done_callback(_renewals.discard)
    return identity


def visit(entry: Entry, anchor: str, out: Path) -> Identity | None:
    """The identity to try an anchor out with, before joining: one that is kept below `out`, or a token, which is not used up.

    None: no TLS. Raises UserError, Unauthenticated.
    """
    line = _token_line(entry.token or os.environ.get(TOKEN_VARIABLE, ""))
    if entry.insecure or entry.trusted_network or not (line or entry.tls or not is_loopback(anchor)):
        return None
    for path in sorted((out / "identity").glob("*.pem")):
        if not path.name.endswith(".pending.pem") and (identity := _kept(path, line)) is not None:
            return identity
    if not line:
        raise Unauthenticated(f"with {anchor} a certificate is needed, and there is none below {out}: {HOW_TO_ENTER}")
    return read_token(line).identity()


def _token_line(given: str) -> str:
    """The token, from itself or from a file. Raises UserError."""
    if not given or given.startswith("kedge1."):
        return given
    try:
        return Path(given).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--token (or {TOKEN_VARIABLE}) {given[:40]!r} is neither a token, which begins with kedge1, nor a file that "
            f"can be read ({error.strerror if isinstance(error, OSError) else 'not text'})"
        ) from None


def _kept(path: Path, line: str) -> Identity | None:
    """The certificate of an earlier time, if it still holds and a token, where there is one, is of the same authority."""
    try:
        identity = load_identity(path)
    except OSError:
        return None
    except Unauthenticated:
        if line:
            return None  # a token makes another
        raise
    if line and fingerprint_of(identity.authority) != fingerprint_of(read_token(line).authority):
        return None  # of an earlier run
    if identity.expires_at > identity.clock():
        return identity
    if line:
        return None
    raise Unauthenticated(
        f"the certificate in {path} expired at {identity.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: {HOW_TO_ENTER}"
    )


async def _enrolled(line: str, anchor: str, path: Path, role: str, stage: int | None, wait_s: float) -> Identity:
    """The anchor's answer to a token, kept in `path`."""
    identity = read_token(line).identity()
    if (identity.name.role, identity.name.stage) != (role, stage):
        wanted = "a sampler" if stage is None else f"stage {stage}"
        raise Unauthenticated(f"this is {identity.name}, and {wanted} wants to join: {HOW_TO_ENTER}")
    pending = path.with_suffix(".pending.pem")
    key = _pending_key(pending)
    log.info("joining by token under the authority %s", fingerprint_of(identity.authority))
    await _ask(identity, anchor, wait_s, key)
    identity.save(path)
    pending.unlink(missing_ok=True)
    return identity


def _pending_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
    except (OSError, ValueError):
        key = new_key()
        write_private(path, key_pem(key))
    return key


async def _ask(identity: Identity, anchor: str, wait_s: float, key: ec.EllipticCurvePrivateKey | None = None) -> None:
    def waiting(waited_s: float) -> None:
        log.warning("no answer from the anchor at %s for %.0f s, trying on until %.0f s", anchor, waited_s, wait_s)

    channel = await open_channel(anchor, ENROL, "the anchor", wait_s, waiting, identity)
    try:
        await enrol(identity, asks(channel, f"the anchor at {anchor}"), key)
    finally:
        await channel.close()


def _renewal(identity: Identity, anchor: str, path: Path) -> Callable[[], asyncio.Future[None]]:
    async def renew() -> None:
        await _ask(identity, anchor, RENEWAL_WAIT_S)
        identity.save(path)

    return lambda: asyncio.ensure_future(renew())
