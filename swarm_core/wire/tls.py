"""Who is who on a stream: the names in certificates, what each may call, one process's key and certificate. Issues none.

Names, not addresses, are certified: `kedge://run/RUN/stage/2` and, for the TLS handshake of whoever dials it,
`stage-2.kedge`. So a certificate holds behind NAT, a tunnel or a new address, and a machine that has one of stage 2 can be
nothing else. RUN is the authority's own number: every run folder has an authority of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import ssl
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from swarm_core.wire.errors import NotAllowed, Refused, Unauthenticated

URI = re.compile(r"kedge://run/([0-9a-f]{16})/(newcomer/)?(anchor|sampler|stage/(0|[1-9][0-9]{0,5}))")
PROBE_S = 3.0  # for one handshake that tells why another one failed
RENEW_AT = 2 / 3  # of a certificate's life: an anchor that is away has a third of it to come back
SKEW_S = 300.0  # certificates begin this long before they are issued: a newcomer's clock may be behind

# Who may call what, besides "the stage before" for Stage/Link. A method that is not here is nobody's.
CALLERS = {"Anchor/Attend": "stage", "Anchor/Sample": "sampler", "Stage/Link": "stage", "Stage/Feed": "sampler"}
ENROL = "Anchor/Enrol"
HOW_TO_ENTER = (
    "`anchor_node token create --out RUN --role stage --stage I` (or --role sampler) on the anchor's machine prints a token "
    "for --token or KEDGE_TOKEN"
)


@dataclass(frozen=True)
class Name:
    """What a certificate says of its holder. A newcomer holds no more than a token, and may only ask for a certificate."""

    run: str
    role: str  # anchor, stage, sampler
    stage: int | None = None
    newcomer: bool = False

    @property
    def uri(self) -> str:
        rank = f"/{self.stage}" if self.stage is not None else ""
        return f"kedge://run/{self.run}/{'newcomer/' if self.newcomer else ''}{self.role}{rank}"

    @property
    def dns(self) -> str:
        """The name that whoever dials checks in the handshake."""
        return f"{self.role}.kedge" if self.stage is None else f"{self.role}-{self.stage}.kedge"

    def __str__(self) -> str:
        holder = {"anchor": "the anchor", "sampler": "a sampler"}.get(self.role, f"stage {self.stage}")
        return f"a token for {holder}" if self.newcomer else holder


def read_name(uris: Iterable[str]) -> Name | None:
    """The one name among the URIs of a certificate; None where there is none, or several."""
    found = [match for uri in uris if (match := URI.fullmatch(uri))]
    if len(found) != 1:
        return None
    run, newcomer, role, stage = found[0].groups()
    return Name(run, role.partition("/")[0], None if stage is None else int(stage), newcomer is not None)


def name_of(certificate: x509.Certificate) -> Name | None:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None
    return read_name(names.get_values_for_type(x509.UniformResourceIdentifier))


def may_call(method: str, caller: Name, own: Name) -> bool:
    """Whether a certificate lets its holder call a method ("Stage/Link") of the process that is called `own`."""
    if caller.run != own.run:
        return False
    if method == ENROL:
        return caller.role in ("stage", "sampler")
    if method == "Anchor/Probe":  # a doctor comes before it joins, and is served nothing of the run
        return caller.role in ("stage", "sampler")
    if method == "Anchor/Status" and not caller.newcomer:
        return True
    if caller.newcomer or caller.role != CALLERS.get(method):
        return False
    return method != "Stage/Link" or caller.stage is not None and caller.stage + 1 == own.stage


def server_name(method: str, stage: int | None) -> str:
    """The name that a server of this method must prove in the handshake."""
    return Name("", "anchor").dns if method.startswith("Anchor/") else Name("", "stage", stage).dns


def fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256 over the whole certificate, in hex."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def new_key() -> ec.EllipticCurvePrivateKey:
    """P-256: what TLS stacks of every age accept, and small."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


@dataclass(frozen=True)
class Caller:
    """Who calls, as the handshake has proved it."""

    name: Name
    certificate: x509.Certificate


class Identity:
    """One process's key, its certificate and the authority it trusts; the first two are replaced while it runs.

    What is served shows the new certificate from the next handshake on, what is dialled from the next stream on. Streams
    that are open stay. `clock` is the wall clock, in seconds since 1970.
    """

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        authority: x509.Certificate,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.authority, self.clock = authority, clock
        self.replace(key, certificate)

    def replace(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        """Go on with another certificate. Raises Unauthenticated where it is not this key's or not this authority's."""
        name = name_of(certificate)
        try:
            certificate.verify_directly_issued_by(self.authority)
        except (ValueError, TypeError, InvalidSignature):
            raise Unauthenticated("the certificate was issued by another authority than the one trusted") from None
        if name is None or _public(certificate.public_key()) != _public(key.public_key()):
            raise Unauthenticated("the certificate does not belong to this machine's key, or names nobody")
        self.name, self.key, self.certificate = name, key, certificate
        pair = (key_pem(key), certificate_pem(certificate))
        self._served = grpc.ssl_server_certificate_configuration([pair], certificate_pem(self.authority))

    @property
    def expires_at(self) -> float:
        return self.certificate.not_valid_after_utc.timestamp()

    @property
    def renew_at(self) -> float:
        issued = self.certificate.not_valid_before_utc.timestamp() + SKEW_S
        return issued + RENEW_AT * (self.expires_at - issued)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """To dial with. Whom one dials is checked by name: see `server_name`."""
        own = certificate_pem(self.certificate)
        return grpc.ssl_channel_credentials(certificate_pem(self.authority), key_pem(self.key), own)

    def server_credentials(self) -> grpc.ServerCredentials:
        """To serve with: nobody gets past the handshake without a certificate of the authority. To be kept alive."""
        return grpc.dynamic_ssl_server_credentials(self._served, lambda: self._served, True)

    def admit(self, method: str, auth: Mapping[str, Iterable[bytes]]) -> Caller:
        """Who calls `method`, from gRPC's auth context. Raises Unauthenticated, NotAllowed."""
        (pem,) = auth.get("x509_pem_cert") or (b"",)
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            certificate.verify_directly_issued_by(self.authority)  # by none that was issued itself, whatever TLS thinks
            name = name_of(certificate)
        except (ValueError, TypeError, InvalidSignature):
            name = None
        if name is None:
            raise Unauthenticated(f"{method} wants a certificate of this run: {HOW_TO_ENTER}")
        if certificate.not_valid_after_utc.timestamp() <= self.clock():  # its connection may be older than that
            raise Unauthenticated(f"the certificate of {name} expired at {_time(certificate)}: {HOW_TO_ENTER}")
        if not may_call(method, name, self.name):
            raise NotAllowed(
                f"{name} may not call {method} of {self.name}: certificates say who may call what, so join with a token "
                f"for the right role and stage"
            )
        return Caller(name, certificate)

    def save(self, path: Path) -> None:
        """Key, certificate and authority in one file, which is replaced whole and is nobody else's to read."""
        pems = (key_pem(self.key), certificate_pem(self.certificate), certificate_pem(self.authority))
        write_private(path, b"".join(pems))


def load_identity(path: Path) -> Identity:
    """What `Identity.save` wrote. Raises OSError, and Unauthenticated where it is damaged."""
    data = path.read_bytes()
    try:
        key = load_pem_private_key(data, None)
        certificate, authority = x509.load_pem_x509_certificates(data)
    except (ValueError, TypeError):
        raise Unauthenticated(
            f"{path} does not hold a key and two certificates: delete it and join with a token"
        ) from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Identity(key, certificate, authority)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file that only its owner may read, durably."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _public(key: object) -> bytes:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _time(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"


async def why_refused(address: str, who: str, identity: Identity | None, name: str) -> Refused | None:
    """Why a handshake with a server failed; None where it did not, or where nobody answers. gRPC does not tell.

    Does the handshake once more with Python's own TLS, which names what this side does not believe. A server of gRPC that
    does not believe this side completes the handshake (of TLS 1.3) and closes, without an alert.
    """
    where, (host, _, port) = f"{who} at {address}", address.rpartition(":")
    try:
        async with asyncio.timeout(PROBE_S):
            context = await asyncio.to_thread(_context, identity)
            reader, writer = await asyncio.open_connection(host.strip("[]"), port, ssl=context, server_hostname=name)
            try:
                taken = bool(await reader.read(1))  # the HTTP/2 settings
            finally:
                writer.close()
    except ssl.SSLCertVerificationError as error:
        return _unbelieved(where, who, error)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return None  # a forwarder with nobody behind it, say
    except ssl.SSLError as error:
        if identity is None:
            return None  # plain, like us: something else is wrong
        reason = (error.reason or str(error)).lower()
        return Unauthenticated(f"{where} does not speak TLS ({reason}): start it with --tls, or join with --insecure")
    except (OSError, TimeoutError, UnicodeError):
        return None
    if identity is None:
        return Unauthenticated(f"{where} wants TLS and a certificate: {HOW_TO_ENTER}; a stored certificate wants --tls")
    return None if taken else _not_taken(where, identity)


def _context(identity: Identity | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if identity is None:  # only to see whether anybody speaks TLS there; nothing is sent
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    context.load_verify_locations(cadata=certificate_pem(identity.authority).decode())
    with tempfile.NamedTemporaryFile() as file:  # which Python's TLS insists on; only this user can read it
        file.write(key_pem(identity.key) + certificate_pem(identity.certificate))
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _unbelieved(where: str, who: str, error: ssl.SSLCertVerificationError) -> Refused:
    match error.verify_code:
        case 62:  # X509_V_ERR_HOSTNAME_MISMATCH
            return NotAllowed(
                f"{where} has a certificate, but not that of {who}: check the address, or its --advertise"
            )
        case 9 | 10:  # not yet valid, expired
            now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            return Unauthenticated(
                f"{where}: {error.verify_message} (it is {now} here): check the clocks of both machines"
            )
        case _:
            return Unauthenticated(
                f"{where} has a certificate of another run ({error.verify_message}): the token or the stored certificate "
                f"here was not made by this anchor"
            )


def _not_taken(where: str, identity: Identity) -> Refused:
    what = f"{where} does not take this machine's certificate"
    if identity.expires_at <= identity.clock():
        return Unauthenticated(f"{what}, which expired at {_time(identity.certificate)}: {HOW_TO_ENTER}")
    return Unauthenticated(
        f"{what}, which ends at {_time(identity.certificate)}: its clock is ahead of this one, or the certificate is of "
        f"another run; {HOW_TO_ENTER}"
    )
