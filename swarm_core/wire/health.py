"""A health service: /startup, /ready and /live over plain HTTP, each 200 or 503 with a line of JSON that says why.

For Kubernetes' probes and for people with curl. It answers from what it is told and never waits for anything; no request
changes anything, and nothing of the model is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable

from swarm_core.wire.errors import PortInUse
from swarm_core.wire.streams import is_loopback

log = logging.getLogger(__name__)
REQUEST_S = 2.0  # for a request line to come
REQUEST_BYTES = 4096
AT_ONCE = 32
Check = Callable[[], tuple[bool, str]]  # whether it is so, and why


class Health:
    """What one process says of itself. `startup`, `ready` and `live` are asked anew at every request."""

    def __init__(self) -> None:
        self.startup: Check = lambda: (False, "starting")
        self.ready: Check = lambda: (False, "starting")
        self.live: Check = lambda: (True, "the event loop answers")
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self, port: int | None, beside: str) -> None:
        """Answer on that port (None: not at all) to this machine alone, or to all where `beside`, the address that this
        process serves or dials otherwise, is not of this machine. Raises PortInUse."""
        if port is None:
            return
        host = "127.0.0.1" if is_loopback(beside) else "0.0.0.0"
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_BYTES)
        except OSError as error:
            raise PortInUse(f"{host}:{port} (--health-port)", error.strerror or str(error)) from None

    @property
    def address(self) -> str:
        """Where it answers; empty when it does not."""
        if self._server is None:
            return ""
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def answer(self, path: str) -> tuple[int, str]:
        """Status and body for a path."""
        checks = {"/startup": self.startup, "/ready": self.ready, "/live": self.live}
        if path not in checks:
            return 404, json.dumps({"ok": False, "why": f"there are {', '.join(checks)}"})
        try:
            fine, why = checks[path]()
        except Exception as error:  # a check that breaks is a finding, not the end of the service
            log.exception("the health check %s broke", path)
            fine, why = False, f"{type(error).__name__}: {error}"
        return 200 if fine else 503, json.dumps({"ok": fine, "why": why})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open > AT_ONCE:
                return
            with contextlib.suppress(TimeoutError, ValueError, OSError, asyncio.IncompleteReadError):
                async with asyncio.timeout(REQUEST_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    method, path, *_ = head.decode("latin-1").split(" ", 2)
                    code, body = self.answer(path.partition("?")[0])
                    if method not in ("GET", "HEAD"):
                        code, body = 405, json.dumps({"ok": False, "why": "GET or HEAD"})
                    writer.write(_response(code, body, empty=method == "HEAD"))
                    await writer.drain()
        except asyncio.LimitOverrunError:
            pass  # no request that anybody should wait for
        finally:
            self._open -= 1
            writer.close()


def _response(code: int, body: str, *, empty: bool) -> bytes:
    words = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}[code]
    data = body.encode() + b"\n"
    head = (
        f"HTTP/1.1 {code} {words}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if empty else data)
