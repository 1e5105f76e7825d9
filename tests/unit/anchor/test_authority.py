"""The authority: what certificates say, tokens that are good once and not for long, across restarts and at the same time."""

from __future__ import annotations

import asyncio
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import load_pem_x509_certificate

from anchor_node.admission import read_certificate_life, read_duration
from anchor_node.authority import TOKEN_S, Authority, AuthorityError
from swarm_core.errors import UserError
from swarm_core.wire.enrolment import read_request, read_token, request
from swarm_core.wire.errors import BadFrame, Unauthenticated
from swarm_core.wire.tls import Caller, Name, name_of, new_key

NOW = 1_800_000_000.0


def newcomer(line: str) -> Caller:
    """The caller that a server sees behind a token."""
    token = read_token(line)
    name = name_of(token.certificate)
    assert name is not None
    return Caller(name, token.certificate)


def use(authority: Authority, line: str, key: ec.EllipticCurvePrivateKey | None = None) -> Name | None:
    pem = asyncio.run(authority.enrol(newcomer(line), request(key or new_key())))
    return name_of(load_pem_x509_certificate(pem))


def test_an_authority_is_made_once_and_is_private(tmp_path: Path) -> None:
    first, second = Authority(tmp_path), Authority(tmp_path)
    assert first.certificate == second.certificate and first.run == second.run
    line = first.create_token("stage", 2)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path == tmp_path / "anchor", path
    secret = read_token(line).key.private_numbers().private_value.to_bytes(32, "big")
    kept = b"".join(path.read_bytes() for path in (tmp_path / "anchor" / "authority" / "tokens").iterdir())
    assert secret not in kept and line.rpartition(".")[2][:40].encode() not in kept


def test_a_damaged_authority_is_one_readable_line(tmp_path: Path) -> None:
    Authority(tmp_path)
    (tmp_path / "anchor" / "authority" / "authority.pem").write_text("nonsense")
    with pytest.raises(AuthorityError, match="does not hold an authority"):
        Authority(tmp_path)


def test_a_token_names_role_stage_and_the_authority(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    line = authority.create_token("stage", 2)
    assert "\n" not in line and line.split(".")[1:4] == ["stage", "2", authority.digest]
    token = read_token(line + "\n")
    assert token.authority == authority.certificate
    assert token.identity().name == Name(authority.run, "stage", 2, newcomer=True)
    assert authority.create_token("sampler", None).split(".")[1:3] == ["sampler", "-"]


@pytest.mark.parametrize("role, stage", [("stage", None), ("sampler", 1), ("stage", -1), ("anchor", None)])
def test_tokens_for_nobody_are_refused(tmp_path: Path, role: str, stage: int | None) -> None:
    with pytest.raises(AuthorityError, match="--role stage --stage I"):
        Authority(tmp_path).create_token(role, stage)


def test_what_is_not_a_whole_token_is_said(tmp_path: Path) -> None:
    line = Authority(tmp_path).create_token("sampler", None)
    other = Authority(tmp_path / "other").create_token("sampler", None)
    swapped = ".".join([*line.split(".")[:3], other.split(".")[3], line.split(".")[4]])
    for wrong in ("", "kedge1", line[:-40], line.replace("kedge1", "kedge9"), swapped, line.replace(line[100:104], "")):
        with pytest.raises(Unauthenticated, match="not a whole token"):
            read_token(wrong).identity()


def test_a_token_is_used_once_and_the_same_key_may_ask_again(tmp_path: Path) -> None:
    authority, key = Authority(tmp_path), new_key()
    line = authority.create_token("stage", 2)
    given = Name(authority.run, "stage", 2)
    assert use(authority, line, key) == given
    restarted = Authority(tmp_path)
    assert use(restarted, line, key) == given  # its answer was lost
    with pytest.raises(Unauthenticated, match="used already"):
        use(restarted, line)
    assert [record.state(authority.clock()) for record in restarted.list_tokens()] == ["used"]


def test_of_many_uses_at_the_same_time_one_wins(tmp_path: Path) -> None:
    line = Authority(tmp_path).create_token("sampler", None)
    barrier = threading.Barrier(8)

    def attempt(_: int) -> bool:
        authority = Authority(tmp_path)
        barrier.wait()
        try:
            return use(authority, line) is not None
        except Unauthenticated:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


def test_tokens_expire_and_are_revoked(tmp_path: Path) -> None:
    now = [NOW]
    authority = Authority(tmp_path, clock=lambda: now[0])
    line = authority.create_token("stage", 0, 60.0)
    assert read_token(line).certificate.not_valid_after_utc.timestamp() == NOW + 60
    assert [record.state(now[0]) for record in authority.list_tokens()] == ["open"]
    (record,) = authority.list_tokens()
    assert authority.revoke_token(record.id[:4]).id == record.id
    with pytest.raises(Unauthenticated, match="was revoked"):
        use(authority, line)
    now[0] += 61
    later = authority.create_token("stage", 1)
    assert [record.state(now[0]) for record in authority.list_tokens()] == ["revoked", "open"]
    use(authority, later)
    with pytest.raises(AuthorityError, match="used already"):
        authority.revoke_token(read_token_id(authority, 1))
    with pytest.raises(AuthorityError, match="0 tokens begin"):
        authority.revoke_token("nothing")
    now[0] += 30 * 86400
    authority.create_token("stage", 2)
    assert [record.stage for record in authority.list_tokens()] == [2], "what expired long ago is forgotten"
    with pytest.raises(Unauthenticated, match="knows no token"):
        use(authority, line)
    for lifetime_s in (0.0, TOKEN_S + 1):
        with pytest.raises(AuthorityError, match="lives"):
            authority.create_token("stage", 0, lifetime_s)


def read_token_id(authority: Authority, stage: int) -> str:
    return next(record.id for record in authority.list_tokens() if record.stage == stage)


def test_a_certificate_says_what_the_token_said_whatever_the_request(tmp_path: Path) -> None:
    authority = Authority(tmp_path, clock=lambda: NOW, certificate_s=3600.0)
    line = authority.create_token("stage", 2)
    certificate = load_pem_x509_certificate(asyncio.run(authority.enrol(newcomer(line), request(new_key()))))
    certificate.verify_directly_issued_by(authority.certificate)
    assert certificate.not_valid_after_utc.timestamp() == NOW + 3600
    name = name_of(certificate)
    assert name == Name(authority.run, "stage", 2)
    renewed = asyncio.run(authority.enrol(Caller(name, certificate), request(new_key())))
    assert name_of(load_pem_x509_certificate(renewed)) == name


def test_requests_that_prove_nothing_are_refused() -> None:
    good = request(new_key())
    assert read_request(good)
    forged = bytearray(good)
    forged[-1] ^= 1
    for wrong in (b"", b"x" * 5000, good[:-3], bytes(forged), request_of(ec.SECP384R1())):
        with pytest.raises(BadFrame, match="signing request"):
            read_request(wrong)


def request_of(curve: ec.EllipticCurve) -> bytes:
    return request(ec.generate_private_key(curve))


def test_the_anchors_identity_renews_itself_before_it_ends(tmp_path: Path) -> None:
    now = [NOW]
    authority = Authority(tmp_path, clock=lambda: now[0], certificate_s=3600.0)
    identity = authority.identity()
    assert (identity.renew_at, identity.expires_at) == (NOW + 2400, NOW + 3600)
    now[0] += 2400
    asyncio.run(authority.renew(identity))
    assert identity.expires_at == NOW + 6000 and identity.name == Name(authority.run, "anchor")


def test_durations() -> None:
    assert [read_duration(text) for text in ("90s", "30m", "1h", "2d")] == [90, 1800, 3600, 172800]
    for wrong in ("", "1", "h", "-1h", "1.5h", "0s", "1w", "١h"):
        with pytest.raises(UserError, match="duration"):
            read_duration(wrong)
    for wrong in ("59s", "91d"):
        with pytest.raises(UserError, match="--certificate-life"):
            read_certificate_life(wrong)
