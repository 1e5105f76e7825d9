"""Opening a connection to a server: its options, TLS by name, and an early word where the two ends cannot agree. No frames."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc

from swarm_core.wire.errors import Refused, Unreachable
from swarm_core.wire.frames import MAX_MESSAGE_BYTES
from swarm_core.wire.tls import Identity, server_name, why_refused

# The keepalive that acts in Python is the ping timeout; the server must permit the pings or it says "too many pings".
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_concurrent_streams", 4),  # on one connection; ours carry one each
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share its calls
]


async def open_channel(
    address: str,
    method: str,
    who: str,
    wait_s: float,
    on_wait: Callable[[float], None] | None = None,
    identity: Identity | None = None,
    stage: int | None = None,
) -> grpc.aio.Channel:
    """A connection to the server of `method`, waiting up to `wait_s` for it to come up. Arguments as of `dial`.

    Raises Unreachable, and Unauthenticated or NotAllowed as soon as the two ends do not believe each other.
    """
    name = server_name(method, stage)
    started = time.monotonic()
    if identity is None:
        channel = grpc.aio.insecure_channel(address, options=OPTIONS)
    else:
        named = [*OPTIONS, ("grpc.ssl_target_name_override", name)]
        channel = grpc.aio.secure_channel(address, identity.channel_credentials(), options=named)

    async def refusal() -> Refused:
        while True:
            while (state := channel.get_state()) is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                await channel.wait_for_state_change(state)
            if (error := await why_refused(address, who, identity, name)) is not None:
                return error
            await asyncio.sleep(2.0)

    ready, refused = asyncio.ensure_future(channel.channel_ready()), asyncio.ensure_future(refusal())
    try:
        while not ready.done():
            waited = time.monotonic() - started
            if waited >= wait_s:
                raise Unreachable(who, address, wait_s)
            await asyncio.wait({ready, refused}, timeout=min(2.0, wait_s - waited), return_when=asyncio.FIRST_COMPLETED)
            if refused.done() and not ready.done():
                raise refused.result()
            if on_wait is not None and not ready.done():
                on_wait(time.monotonic() - started)
    except BaseException:
        ready.cancel()
        await channel.close()
        raise
    finally:
        refused.cancel()
    return channel
