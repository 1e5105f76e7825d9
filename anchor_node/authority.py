"""A run's certificate authority: its key, the certificates it gives, and tokens, each good once. Opens no connection.

    OUT/anchor/authority/authority.pem      key and certificate, made on first need, nobody else's to read
    OUT/anchor/authority/tokens/ID.json     what a token is for; ID is a hash of its certificate. Its secret is nowhere
    OUT/anchor/authority/tokens/ID.used     by whose key it was used, or "revoked": made once, by a link, so that of two
                                            uses at the same time one wins, also across processes and restarts

Whoever holds the folder can admit anybody. Deleting it, with the anchor stopped, shuts everybody out who is not connected.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from anchor_node.memory import FOLDER
from swarm_core.errors import UserError
from swarm_core.wire.enrolment import Token, read_request
from swarm_core.wire.errors import Unauthenticated
from swarm_core.wire.tls import (
    HOW_TO_ENTER,
    SKEW_S,
    Caller,
    Identity,
    Name,
    certificate_pem,
    fingerprint_of,
    key_pem,
    new_key,
)

AUTHORITY_S = 10 * 365 * 86400.0  # longer than any run: it goes when the run folder goes
CERTIFICATE_S = 24 * 3600.0  # what a stolen key is worth; a renewal costs one call
TOKEN_S = 3600.0  # and no longer: time enough to carry it to the other machine
KEPT_S = 7 * 86400.0  # for the list, once a token has expired; the handshake refuses it anyway
REVOKED = "revoked"


class AuthorityError(UserError):
    """A token or an authority that cannot be made, found or used, in one line."""


@dataclass(frozen=True)
class TokenRecord:
    """What is kept of a token. Times in seconds since 1970."""

    id: str
    role: str
    stage: int | None
    created: float
    expires: float
    used: str = ""  # by which key (a hash), or REVOKED

    def state(self, now: float) -> str:
        if self.used:
            return REVOKED if self.used == REVOKED else "used"
        return "expired" if self.expires <= now else "open"


class Authority:
    """One run's authority. `clock` is the wall clock, in seconds since 1970."""

    def __init__(self, out: Path, clock: Callable[[], float] = time.time, certificate_s: float = CERTIFICATE_S) -> None:
        """Open the authority of a run folder, or make one. Raises AuthorityError."""
        self.folder, self.clock, self.certificate_s = out / FOLDER / "authority", clock, certificate_s
        self.tokens = self.folder / "tokens"
        try:
            (out / FOLDER).mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, self.tokens):
                folder.mkdir(exist_ok=True, mode=0o700)
            self._key, self.certificate = self._open()
        except (OSError, ValueError, TypeError) as error:
            raise AuthorityError(f"{self.folder} does not hold an authority, and none can be made: {error}") from None
        self.run = _run_of(self._key.public_key())

    def _open(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        path = self.folder / "authority.pem"
        self.made = not path.exists()  # now: a folder that was meant has one already
        if self.made:
            key = new_key()
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"kedge {_run_of(key.public_key())}")])
            builder = self._builder(key.public_key(), name, name, AUTHORITY_S)
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            made = builder.sign(key, SHA256())
            with contextlib.suppress(FileExistsError):  # another process was faster: then it is that one's
                _make_once(path, key_pem(key) + certificate_pem(made))
        data = path.read_bytes()
        held = load_pem_private_key(data, None)
        assert isinstance(held, ec.EllipticCurvePrivateKey)
        return held, x509.load_pem_x509_certificate(data)

    @property
    def digest(self) -> str:
        """SHA-256 of the authority's certificate, as tokens show it."""
        return fingerprint_of(self.certificate)

    # Certificates ------------------------------------------------------------------------------------------------------

    def issue(self, key: ec.EllipticCurvePublicKey, name: Name, lifetime_s: float) -> x509.Certificate:
        """A certificate for a name: servers (the anchor, stages) also get the name that is checked when they are dialled."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(name.uri)]
        serves = name.role != "sampler" and not name.newcomer
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if serves:
            names.append(x509.DNSName(name.dns))
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = self._builder(key, x509.Name([]), self.certificate.subject, lifetime_s)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        return builder.sign(self._key, SHA256())

    def _builder(
        self, key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, lifetime_s: float
    ) -> x509.CertificateBuilder:
        now = self.clock()
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        builder = builder.not_valid_before(_date(now - SKEW_S)).not_valid_after(_date(now + lifetime_s))
        return builder.serial_number(x509.random_serial_number())

    def identity(self) -> Identity:
        """The anchor's own, with a key that is only in memory."""
        key = new_key()
        name = Name(self.run, "anchor")
        return Identity(key, self.issue(key.public_key(), name, self.certificate_s), self.certificate, self.clock)

    async def renew(self, identity: Identity) -> None:
        """Another key and certificate for the anchor itself."""
        key = new_key()
        identity.replace(key, self.issue(key.public_key(), identity.name, self.certificate_s))

    async def enrol(self, caller: Caller, wanted: bytes) -> bytes:
        """Answer Anchor/Enrol: a certificate for the role and stage that the caller's own certificate says, and no other.

        A newcomer's token is used up by the first key that comes with it. The same key may ask again while the token
        lives: its answer may have been lost. Raises Unauthenticated, BadFrame.
        """
        key, name = read_request(wanted), caller.name
        if name.newcomer:
            self._use(fingerprint_of(caller.certificate), _hash_of(key))
        given = Name(self.run, name.role, name.stage)
        return certificate_pem(self.issue(key, given, self.certificate_s))

    # Tokens ------------------------------------------------------------------------------------------------------------

    def create_token(self, role: str, stage: int | None, lifetime_s: float = TOKEN_S) -> str:
        """A token, as one line, for one machine that is to be a stage or a sampler. Raises AuthorityError."""
        if (
            role not in ("stage", "sampler")
            or (role == "stage") != (stage is not None)
            or stage is not None
            and stage < 0
        ):
            raise AuthorityError("a token is for --role stage --stage I, counted from 0, or for --role sampler")
        if not 0 < lifetime_s <= TOKEN_S:
            raise AuthorityError(
                f"a token lives 1 s to {TOKEN_S / 3600:.0f} h, not {lifetime_s:.0f} s: make it when needed"
            )
        key, name = new_key(), Name(self.run, role, stage, newcomer=True)
        token = Token(key, self.issue(key.public_key(), name, lifetime_s), self.certificate)
        token_id, now = fingerprint_of(token.certificate)[:16], self.clock()
        record = TokenRecord(token_id, role, stage, now, now + lifetime_s)
        self._prune(now)
        _make_once(self.tokens / f"{token_id}.json", json.dumps(asdict(record)).encode())
        return token.line()

    def list_tokens(self) -> list[TokenRecord]:
        """All that are known, the oldest first."""
        return sorted(self._records(), key=lambda record: record.created)

    def revoke_token(self, prefix: str) -> TokenRecord:
        """A token that nobody has used is not to be used any more. Raises AuthorityError."""
        found = [record for record in self._records() if prefix and record.id.startswith(prefix)]
        if len(found) != 1:
            raise AuthorityError(f"{len(found)} tokens begin with {prefix!r}: `anchor_node token list` shows them")
        (record,) = found
        if (by := self._claim(record.id, REVOKED)) != REVOKED:
            raise AuthorityError(
                f"token {record.id} was used already, by the key {by[:16]}: its certificate is renewed as long as this "
                f"authority stands; see docs/operations.md, Strangers"
            )
        return record

    def _use(self, fingerprint: str, by: str) -> None:
        token_id = fingerprint[:16]
        if not (self.tokens / f"{token_id}.json").exists():
            raise Unauthenticated(f"this anchor knows no token {token_id}: {HOW_TO_ENTER}")
        stands = self._claim(token_id, by)
        if stands != by:
            why = "was revoked" if stands == REVOKED else "was used already, by another machine or folder"
            raise Unauthenticated(f"token {token_id} {why}, and is good once: {HOW_TO_ENTER}")

    def _claim(self, token_id: str, by: str) -> str:
        """Who has it: `by`, if nobody had it before."""
        path = self.tokens / f"{token_id}.used"
        with contextlib.suppress(FileExistsError):
            _make_once(path, by.encode())
        return path.read_text()

    def _records(self) -> Iterator[TokenRecord]:
        for path in self.tokens.glob("*.json"):
            used = path.with_suffix(".used")
            record = json.loads(path.read_text())
            yield TokenRecord(**record | {"used": used.read_text() if used.exists() else ""})

    def _prune(self, now: float) -> None:
        for record in self._records():
            if record.expires + KEPT_S < now:
                for suffix in ("json", "used"):
                    (self.tokens / f"{record.id}.{suffix}").unlink(missing_ok=True)


def _make_once(path: Path, data: bytes) -> None:
    """Make a private file with its content, whole, durably, if nobody has. Raises FileExistsError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _hash_of(key: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _run_of(key: ec.EllipticCurvePublicKey) -> str:
    """The authority's number in all names: nobody else can have certificates with it that its key has signed."""
    return _hash_of(key)[:16]


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
