"""Strangers at the door: every RPC with every kind of certificate over real servers, entering by token, and a run over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from anchor_node.admission import Admission
from anchor_node.authority import Authority
from anchor_node.serve import ServeArguments
from swarm_core.config import load
from swarm_core.run_folder import ADDRESS_FILE
from swarm_core.wire.channel import open_channel
from swarm_core.wire.enrolment import asks, enrol, keep_valid, read_token
from swarm_core.wire.errors import NotAllowed, PeerLost, Refused, Unauthenticated, Unencrypted, Unreachable, WireError
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.framing import OPENING, OPENING_TLS, frame_wire
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Hello, Welcome, from_bytes, to_bytes
from swarm_core.wire.streams import FrameStream, Server, dial
from swarm_core.wire.tls import Identity, Name, certificate_pem, key_pem, load_identity, new_key
from swarm_worker.entry import Entry, enter
from swarm_worker.sampler.process import SamplerArguments, serve_rollouts
from swarm_worker.stage_process import StageArguments, hold_stage

PAST_S = 2 * 86400.0
STREAMS = ("Anchor/Attend", "Anchor/Sample", "Stage/Link", "Stage/Feed")
METHODS = (*STREAMS, "Anchor/Enrol")


def named(authority: Authority, role: str, stage: int | None = None, life_s: float = 3600.0) -> Identity:
    """An identity straight from the authority."""
    key = new_key()
    certificate = authority.issue(key.public_key(), Name(authority.run, role, stage), life_s)
    return Identity(key, certificate, authority.certificate)


@dataclass
class Doors:
    """An anchor and stage 2, with handlers that note who came in."""

    authority: Authority
    anchor: str = ""
    stage: str = ""
    entered: list[str] = field(default_factory=list)
    servers: list[Server] = field(default_factory=list)

    async def open(self) -> Doors:
        async def attend(stream: FrameStream) -> None:
            hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
            stream.must_be_stage(hello.stage)
            await self.welcome("Anchor/Attend", stream)

        def taker(method: str) -> Callable[[FrameStream], Coroutine[Any, Any, None]]:
            async def take(stream: FrameStream) -> None:
                await stream.expect(FrameKind.HELLO)
                await self.welcome(method, stream)

            return take

        anchor = Server("Anchor", {"Attend": attend, "Sample": taker("Anchor/Sample")}, Ledger())
        anchor.identity = self.authority.identity()
        anchor.add_answer("Enrol", self.authority.enrol)
        stage = Server("Stage", {name: taker(f"Stage/{name}") for name in ("Link", "Feed")}, Ledger())
        stage.identity = named(self.authority, "stage", 2)
        self.servers = [anchor, stage]
        self.anchor, self.stage = await anchor.start("127.0.0.1:0"), await stage.start("127.0.0.1:0")
        return self

    async def welcome(self, method: str, stream: FrameStream) -> None:
        self.entered.append(method)
        await stream.name("a-b", "up").send(Frame(Header(FrameKind.WELCOME), to_bytes(Welcome())))

    async def knock(self, method: str, identity: Identity | None, says: int = 1, wait_s: float = 10.0) -> None:
        """Call a method, as stage `says`, up to the server's first word."""
        address, stage = (self.anchor, None) if method.startswith("Anchor/") else (self.stage, 2)
        if method == "Anchor/Enrol":
            channel = await open_channel(address, method, "the anchor", wait_s, None, identity)
            try:
                assert identity is not None
                await enrol(identity, asks(channel, "the anchor"))
            finally:
                await channel.close()
            return
        stream = await dial(
            address, method, Ledger(), f"stage {stage}" if stage else "the anchor", wait_s, None, identity, stage
        )
        try:
            await stream.name("a-b", "down").send(Frame(Header(FrameKind.HELLO), to_bytes(Hello(stage=says))))
            await stream.expect(FrameKind.WELCOME)
        finally:
            await stream.close()


@contextlib.asynccontextmanager
async def doors(out: Path) -> AsyncIterator[Doors]:
    opened = await Doors(Authority(out)).open()
    try:
        yield opened
    finally:
        for server in opened.servers:
            await server.stop()


class Chained(Identity):
    """Shows a certificate that it has made itself, behind the one that it was given."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        key, uri = new_key(), Name(self.name.run, "sampler").uri
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name.from_rfc4514_string("CN=a sampler"))
            .issuer_name(self.certificate.subject)
        )
        builder = builder.public_key(key.public_key()).serial_number(1).add_extension(names, critical=True)
        builder = builder.not_valid_before(datetime.now(UTC) - timedelta(1))
        forged = builder.not_valid_after(datetime.now(UTC) + timedelta(1)).sign(self.key, SHA256())
        chain = certificate_pem(forged) + certificate_pem(self.certificate)
        return grpc.ssl_channel_credentials(certificate_pem(self.authority), key_pem(key), chain)


class Bare(Identity):
    """Believes the authority, and has nothing to show."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(certificate_pem(self.authority))


def token_identity(authority: Authority, role: str = "stage", stage: int | None = 1) -> Identity:
    return read_token(authority.create_token(role, stage)).identity()


def wrong_authority(out: Path, role: str, stage: int | None) -> Identity:
    """Of another run, whose number it even claims not to have: only the signature tells."""
    return named(Authority(out / "elsewhere"), role, stage)


RIGHT = {
    "Anchor/Attend": ("stage", 1),
    "Anchor/Sample": ("sampler", None),
    "Anchor/Enrol": ("stage", 1),
    "Stage/Link": ("stage", 1),
    "Stage/Feed": ("sampler", None),
}
WRONG_ROLE = {method: ("stage", 1) if role == "sampler" else ("sampler", None) for method, (role, _) in RIGHT.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_matrix_of_calls_and_certificates(tmp_path: Path, method: str) -> None:
    async def run() -> None:
        async with doors(tmp_path) as house:
            past = Authority(tmp_path, clock=lambda: time.time() - PAST_S)
            role, stage = RIGHT[method]
            used = token_identity(house.authority)
            twin = Identity(used.key, used.certificate, used.authority)
            await house.knock("Anchor/Enrol", used)
            cells: list[tuple[str, Identity | None, type[WireError], str]] = [
                ("plain", None, Unauthenticated, "wants TLS and a certificate"),
                (
                    "of another run",
                    wrong_authority(tmp_path, role, stage),
                    Unauthenticated,
                    "certificate of another run",
                ),
                ("expired", named(past, role, stage), Unauthenticated, "expired"),
                ("expired token", token_identity(past), Unauthenticated, "expired"),
            ]
            if method == "Anchor/Enrol":
                cells += [
                    ("used token", twin, Unauthenticated, "used already"),
                    ("the anchor's own", named(house.authority, "anchor"), NotAllowed, "may not call"),
                ]
            else:
                cells += [
                    ("wrong role", named(house.authority, *WRONG_ROLE[method]), NotAllowed, "may not call"),
                    ("a token", token_identity(house.authority), NotAllowed, "a token for stage 1 may not call"),
                    ("used token", twin, NotAllowed, "may not call"),
                ]
            if method == "Stage/Link":
                for other in (0, 2, 3):
                    cells.append((f"stage {other}", named(house.authority, "stage", other), NotAllowed, "may not call"))
            if method == "Anchor/Attend":
                cells.append(("wrong stage", named(house.authority, "stage", 2), NotAllowed, "not as stage 1"))
            for label, identity, error, words in cells:
                with pytest.raises(error) as raised:
                    await house.knock(method, identity)
                assert words in str(raised.value) and "\n" not in str(raised.value), f"{label}: {raised.value}"
            forged = wrong_authority(tmp_path, role, stage)
            forged.authority = house.authority.certificate  # believes the servers, who do not believe it
            with pytest.raises(Unauthenticated, match="does not take this machine's certificate, which ends at"):
                await house.knock(method, forged)
            right = named(house.authority, role, stage)
            assert house.entered == [], "nobody got as far as a handler"
            bare = Bare(right.key, right.certificate, right.authority)
            with pytest.raises(Unreachable):
                await house.knock(method, bare, wait_s=1.0)
            given = named(house.authority, "stage", 1)
            with pytest.raises(WireError):
                await house.knock(method, Chained(given.key, given.certificate, given.authority), wait_s=1.0)
            assert house.entered == []
            await house.knock(method, right)
            assert house.entered == ([method] if method in STREAMS else [])

    asyncio.run(run())


def test_a_certificate_that_ends_while_its_connection_stands_opens_no_more_streams(tmp_path: Path) -> None:
    async def run() -> None:
        async with doors(tmp_path) as house:
            identity = house.servers[1].identity
            assert identity is not None
            identity.clock = lambda: time.time() + PAST_S
            with pytest.raises(Unauthenticated, match="the certificate of stage 1 expired at"):
                await house.knock("Stage/Link", named(house.authority, "stage", 1))
            assert not house.entered

    asyncio.run(run())


def test_who_dials_checks_that_the_server_is_the_one_it_should_be(tmp_path: Path) -> None:
    async def run() -> None:
        async with doors(tmp_path) as house:
            caller = named(house.authority, "sampler")
            for address, method, who, stage in (
                (house.stage, "Stage/Feed", "stage 1", 1),  # it is stage 2
                (house.stage, "Anchor/Sample", "the anchor", None),
                (house.anchor, "Stage/Feed", "stage 2", 2),
            ):
                with pytest.raises(NotAllowed, match=f"but not that of {who}"):
                    await dial(address, method, Ledger(), who, 10.0, None, caller, stage)
            plain = Server("Anchor", {}, Ledger())
            address = await plain.start("127.0.0.1:0")
            with pytest.raises(Unauthenticated, match="does not speak TLS"):
                await dial(address, "Anchor/Sample", Ledger(), "the anchor", 10.0, None, caller)
            await plain.stop()
            with pytest.raises(Unreachable):
                await dial(address, "Anchor/Sample", Ledger(), "the anchor", 0.5, None, caller)
            # A forwarder with nobody behind it: whoever is meant may come up yet.
            hollow = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
            port = hollow.sockets[0].getsockname()[1]
            for identity in (caller, None):
                with pytest.raises(Unreachable):
                    await dial(f"127.0.0.1:{port}", "Anchor/Sample", Ledger(), "the anchor", 0.5, None, identity)
            hollow.close()

    asyncio.run(run())


def test_the_wire_column_knows_that_a_stream_is_encrypted(tmp_path: Path) -> None:
    async def run() -> None:
        async with doors(tmp_path) as house:
            ledger = Ledger()
            stream = await dial(
                house.stage, "Stage/Feed", ledger, "stage 2", 10.0, None, named(house.authority, "sampler"), 2
            )
            await stream.name("a-b", "down").send(Frame(Header(FrameKind.HELLO), bytes(50_000)))
            await stream.close()
            (row,) = [row for row in ledger.take() if row.frames]
            wire = frame_wire(row.message_bytes, 1, tls=True).plus(OPENING_TLS)
            assert row.wire_bytes == wire.sent != frame_wire(row.message_bytes, 1).plus(OPENING).sent

    asyncio.run(run())


def test_two_newcomers_with_one_token(tmp_path: Path) -> None:
    async def run() -> None:
        async with doors(tmp_path) as house:
            line = house.authority.create_token("stage", 1)

            async def attempt(name: str) -> bool:
                try:
                    await enter(Entry(line), house.anchor, None, tmp_path / name, "stage", 1, 10.0)
                except Unauthenticated as error:
                    assert "used already" in str(error)
                    return False
                return True

            assert sum(await asyncio.gather(*(attempt(f"newcomer-{i}") for i in range(4)))) == 1

    asyncio.run(run())


def test_a_certificate_is_kept_and_needs_no_token_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEDGE_TOKEN", raising=False)
    out, kept = tmp_path / "worker", tmp_path / "worker" / "identity" / "stage-1.pem"

    async def come(entry: Entry, stage: int = 1) -> Identity | None:
        return await enter(entry, anchor, None, out, "stage", stage, 10.0)

    async def run() -> None:
        nonlocal anchor
        async with doors(tmp_path) as house:
            anchor = house.anchor
            assert await come(Entry()) is None, "plain is the default on loopback"
            with pytest.raises(Unauthenticated, match="with --tls a certificate is needed.*token create"):
                await come(Entry(tls=True))
            (tmp_path / "token").write_text(line := house.authority.create_token("stage", 1))
            with pytest.raises(Unauthenticated, match="this is a token for stage 1, and stage 0 wants to join"):
                await come(Entry(line), 0)
            first = await come(Entry(str(tmp_path / "token")))
            assert first is not None and first.name == Name(house.authority.run, "stage", 1)
            assert kept.stat().st_mode & 0o077 == 0 and [path.name for path in kept.parent.iterdir()] == [kept.name]
            again = await come(Entry(tls=True))
            with_used_token = await come(Entry(line))
            assert again is not None and with_used_token is not None
            assert again.certificate == with_used_token.certificate == first.certificate
            await house.knock("Anchor/Attend", again)
            past = Authority(tmp_path, clock=lambda: time.time() - PAST_S)
            named(past, "stage", 1).save(kept)
            with pytest.raises(Unauthenticated, match=r"stage-1\.pem expired at .* token create"):
                await come(Entry(tls=True))
            monkeypatch.setenv("KEDGE_TOKEN", house.authority.create_token("stage", 1))
            fresh = await come(Entry())
            assert fresh is not None and fresh.expires_at > time.time()
            named(Authority(tmp_path / "elsewhere"), "stage", 1).save(kept)  # of an earlier run in the same folder
            monkeypatch.setenv("KEDGE_TOKEN", house.authority.create_token("stage", 1))
            assert await come(Entry()) is not None and load_identity(kept).name.run == house.authority.run

    anchor = ""
    asyncio.run(run())


def test_certificates_are_renewed_and_servers_show_the_new_one(tmp_path: Path) -> None:
    async def shown(address: str, identity: Identity) -> bytes | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            return writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        finally:
            writer.close()

    async def run() -> None:
        async with doors(tmp_path) as house:
            identity = house.servers[1].identity
            assert identity is not None
            before, stood = identity.certificate, await shown(house.stage, identity)
            renewed = asyncio.Event()

            async def renew() -> None:
                if not failures:
                    failures.append("the anchor is away")
                    raise PeerLost(failures[0])
                channel = await open_channel(house.anchor, "Anchor/Enrol", "the anchor", 10.0, None, identity)
                await enrol(identity, asks(channel, "the anchor"))
                await channel.close()
                identity.clock = time.time
                renewed.set()

            failures: list[str] = []
            identity.clock = lambda: identity.renew_at - 1e9 if renewed.is_set() else identity.renew_at + 1.0
            task = asyncio.create_task(keep_valid(identity, renew, again_s=0.01))
            async with asyncio.timeout(20):
                await renewed.wait()
            task.cancel()
            assert (
                failures and identity.certificate != before and identity.name == Name(house.authority.run, "stage", 2)
            )
            assert await shown(house.stage, identity) != stood
            await house.knock("Stage/Link", named(house.authority, "stage", 1))

    asyncio.run(run())


def test_plain_servers_keep_to_this_machine() -> None:
    async def run() -> None:
        with pytest.raises(Unencrypted, match=r"0\.0\.0\.0:0 can be reached.*token create"):
            await Server("Stage", {}, Ledger()).start("0.0.0.0:0")
        server = Server("Stage", {}, Ledger())
        server.trusted_network = True
        await server.start("0.0.0.0:0")
        await server.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    "entry, anchor, listen, words",
    [
        (Entry(insecure=True), "anchor.example.org:7400", None, "--insecure is for this machine alone"),
        (Entry(insecure=True), "127.0.0.1:7400", "0.0.0.0:7401", "0.0.0.0:7401 is not on it"),
        (Entry(), "anchor.example.org:7400", None, "token create"),
        (Entry(), "127.0.0.1:7400", "0.0.0.0:7401", "with 0.0.0.0:7401 a certificate is needed"),
        (Entry("nothing/here"), "127.0.0.1:7400", None, "neither a token"),
        (Entry(), "http://anchor:7400/", None, "HOST:PORT"),
    ],
)
def test_flags_and_addresses_that_contradict_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: Entry, anchor: str, listen: str | None, words: str
) -> None:
    monkeypatch.delenv("KEDGE_TOKEN", raising=False)
    with pytest.raises(WireError if "token create" in words else Exception) as raised:
        asyncio.run(enter(entry, anchor, listen, tmp_path, "stage", 0, 1.0))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_over_tls(
    recipe: Callable[..., Any], tmp_path: Path, anchor: Callable[..., Coroutine[Any, Any, str]]
) -> None:
    out, run_file = tmp_path / "run", recipe(batches=2).run_file(run={"ticks": 2}, swarm={"stages": 2})
    refusals: list[str] = []

    async def strangers(address: str, authority: Authority) -> None:
        """The anchor itself, not a stand-in."""
        for identity, method in (
            (named(authority, "stage", 1), "Anchor/Attend"),  # and says that it is stage 0
            (named(authority, "sampler"), "Anchor/Attend"),
        ):
            stream = await dial(address, method, Ledger(), "the anchor", 10.0, None, identity)
            await stream.name("a-b", "down").send(
                Frame(Header(FrameKind.HELLO), to_bytes(Hello(role="stage", stage=0)))
            )
            with pytest.raises(Refused) as raised:
                await stream.expect(FrameKind.WELCOME)
            refusals.append(str(raised.value))
            await stream.close()

    async def run() -> str:
        config = load(run_file, {})
        arguments = ServeArguments(config, run_file, "127.0.0.1:0", out, False, "", Admission(tls=True))
        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            ending = tasks.create_task(anchor(arguments))
            while not (out / ADDRESS_FILE).exists():
                await asyncio.sleep(0.01)
            address, authority = (out / ADDRESS_FILE).read_text().strip(), Authority(out)
            await strangers(address, authority)
            for stage in range(2):
                entry = Entry(authority.create_token("stage", stage))
                tasks.create_task(hold_stage(StageArguments(stage, address, out=out, entry=entry), signals=False))
            entry = Entry(authority.create_token("sampler", None))
            tasks.create_task(serve_rollouts(SamplerArguments(address, out=out, entry=entry), signals=False))
        return ending.result()

    asyncio.run(run())
    assert "not as stage 0" in refusals[0] and "a sampler may not call Anchor/Attend" in refusals[1]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["tick"] for row in rows if row["type"] == "tick"] == [0, 1]
    assert {path.name for path in (out / "identity").iterdir()} == {"stage-0.pem", "stage-1.pem", "sampler.pem"}
    assert {record.state(time.time()) for record in Authority(out).list_tokens()} == {"used"}
