"""How a machine comes by a certificate, and keeps one: tokens, the one call that gives certificates, renewal. No files.

A token holds the authority's certificate and a certificate of its own with the key, good for nothing but Anchor/Enrol, so
that a newcomer is a caller like any other: one port, one kind of handshake, and nothing that can be reached without a
certificate (docs/decisions/0014). Whoever holds a certificate already renews it by the same call.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from swarm_core.wire.errors import BadFrame, Unauthenticated, WireError, from_status
from swarm_core.wire.tls import ENROL, Identity, name_of, new_key

log = logging.getLogger(__name__)
FORMAT = "kedge1"
KEY_BYTES = 32  # a P-256 private key
LARGEST_REQUEST = 4096  # a P-256 request takes 250 bytes
ANSWER_S = 20.0  # for the anchor to sign; it does so in milliseconds
LOOK_S = 60.0  # between two looks at the clock: a machine that slept must not sleep on
AGAIN_S = 30.0  # before asking an anchor again that is away
Ask = Callable[[bytes], Awaitable[bytes]]


@dataclass(frozen=True)
class Token:
    """What `anchor_node token create` prints, as one line: kedge1.ROLE.STAGE.HASH.BODY, with "-" for a sampler's stage.

    HASH is the SHA-256 of the authority's certificate, for people to compare; the certificate itself is in BODY, with the
    key and the certificate of a newcomer.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    authority: x509.Certificate

    def line(self) -> str:
        name = name_of(self.certificate)
        assert name is not None
        ders = [certificate.public_bytes(Encoding.DER) for certificate in (self.authority, self.certificate)]
        secret = self.key.private_numbers().private_value.to_bytes(KEY_BYTES, "big")
        body = base64.urlsafe_b64encode(secret + len(ders[0]).to_bytes(2, "big") + b"".join(ders)).decode().rstrip("=")
        rank = "-" if name.stage is None else str(name.stage)
        return f"{FORMAT}.{name.role}.{rank}.{hashlib.sha256(ders[0]).hexdigest()}.{body}"

    def identity(self) -> Identity:
        """What a newcomer goes to the anchor with."""
        return Identity(self.key, self.certificate, self.authority)


def read_token(line: str) -> Token:
    """The token of a line. Raises Unauthenticated for anything that is not a whole one."""
    try:
        form, _role, _rank, digest, body = line.strip().split(".")
        data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        cut = KEY_BYTES + 2
        end = cut + int.from_bytes(data[KEY_BYTES:cut], "big")
        if form != FORMAT or hashlib.sha256(data[cut:end]).hexdigest() != digest:
            raise ValueError("the hash of the authority's certificate is not the token's")
        key = ec.derive_private_key(int.from_bytes(data[:KEY_BYTES], "big"), ec.SECP256R1())
        authority, own = (x509.load_der_x509_certificate(der) for der in (data[cut:end], data[end:]))
    except (ValueError, binascii.Error) as error:
        raise Unauthenticated(
            f"this is not a whole token ({error}): wanted the one line that `anchor_node token create` prints, "
            f"{FORMAT}.ROLE.STAGE.HASH.BODY, or a file that holds it"
        ) from None
    return Token(key, own, authority)


def request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """What is sent to Anchor/Enrol: a signing request, which proves that the caller holds the key. Names are not asked for."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


def read_request(data: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a signing request. Raises BadFrame."""
    try:
        if len(data) > LARGEST_REQUEST:
            raise ValueError(f"{len(data)} bytes, at most {LARGEST_REQUEST}")
        wanted = x509.load_der_x509_csr(data)
        key = wanted.public_key()
        if (
            not isinstance(key, ec.EllipticCurvePublicKey)
            or key.curve.name != "secp256r1"
            or not wanted.is_signature_valid
        ):
            raise ValueError("not a P-256 key, or not signed by it")
    except ValueError as error:
        raise BadFrame(f"not a signing request: {error}") from None
    return key


def asks(channel: grpc.aio.Channel, peer: str) -> Ask:
    """Anchor/Enrol on a channel that is up. Raises what the anchor refuses with, and PeerLost."""
    call: Any = channel.unary_unary(f"/swarm.v1.{ENROL}")

    async def ask(wanted: bytes) -> bytes:
        try:
            answer: bytes = await call(wanted, timeout=ANSWER_S)
        except grpc.aio.AioRpcError as error:
            raise from_status(error.code(), error.details() or "", peer) from None
        return answer

    return ask


async def enrol(identity: Identity, ask: Ask, key: ec.EllipticCurvePrivateKey | None = None) -> None:
    """Take a new certificate for a new key (or for `key`) into use. Raises what `ask` raises, and Unauthenticated."""
    key = key or new_key()
    answer = await ask(request(key))
    try:
        certificate = x509.load_pem_x509_certificate(answer)
    except ValueError:
        raise Unauthenticated("the anchor answered with something that is not a certificate") from None
    name = name_of(certificate)
    if name is None or (name.role, name.stage) != (identity.name.role, identity.name.stage):
        raise Unauthenticated(f"the anchor answered {identity.name} with a certificate for {name or 'nobody'}")
    identity.replace(key, certificate)


async def keep_valid(identity: Identity, renew: Callable[[], Awaitable[None]], again_s: float = AGAIN_S) -> None:
    """Renew for as long as the process runs, from two thirds of each certificate's life on. Nothing else waits for it."""
    failed = ""
    while True:
        left_s = identity.renew_at - identity.clock()
        if left_s > 0:
            await asyncio.sleep(min(left_s, LOOK_S))
            continue
        try:
            await renew()
            log.info("certificate of %s renewed until %s", identity.name, _until(identity))
            failed = ""
        except (WireError, OSError) as error:
            if str(error) != failed:
                log.warning("the certificate is not renewed, it ends at %s, trying on: %s", _until(identity), error)
            failed = str(error)
            await asyncio.sleep(again_s)


def _until(identity: Identity) -> str:
    return f"{identity.certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC"
