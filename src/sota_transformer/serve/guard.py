"""Checks between the network and the application: deadlines, sizes, hosts and the API key.

`Protocol` limits the time for a request to arrive, which uvicorn does not: its timer restarts with
each byte. `Guard` is ASGI middleware that rejects what no handler should see.
"""

import asyncio
import hmac
import ipaddress
from typing import Any, ClassVar

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

RECEIVE_SECONDS = 10.0
HEADER_BYTES = 16 << 10
UNWANTED_BYTES = 16 << 20  # how much of a rejected body is read
BODY_BYTES = 1 << 20
UNFINISHED = 64  # connections whose request has not fully arrived
FIRST_SECONDS = 1.0  # for a new connection's request, before it may displace or be displaced


class Protocol(H11Protocol):
    """HTTP/1.1 with a deadline for requests; new connections displace stalled ones."""

    unfinished: ClassVar[dict["Protocol", asyncio.TimerHandle]] = {}  # oldest first

    def connection_made(self, transport: Any) -> None:
        """Start the deadline."""
        super().connection_made(transport)
        self._await_request()
        # Not at once: of many clients that come together, none has sent its request yet.
        self.loop.call_later(FIRST_SECONDS, self._displace)

    def data_received(self, data: bytes) -> None:
        """Pass the bytes on; a complete request cancels the deadline."""
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._await_request()
        else:
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._arrived()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        if self not in self.unfinished:
            self.unfinished[self] = self.loop.call_later(RECEIVE_SECONDS, self._abort)

    def _arrived(self) -> None:
        if deadline := self.unfinished.pop(self, None):
            deadline.cancel()

    def _displace(self) -> None:
        """With too many incomplete requests, this one's among them, drop the oldest connection."""
        if self in self.unfinished and len(self.unfinished) > UNFINISHED:
            next(iter(self.unfinished))._abort()

    def _abort(self) -> None:
        self._arrived()
        self.transport.abort()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Rejects foreign hosts and origins, missing keys, wrong content types and large bodies."""

    HEADERS: ClassVar[dict[str, str]] = {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }
    OPEN: ClassVar[set[str]] = {"/", "/healthz", "/openapi.json"}  # need no key

    def __init__(self, app: ASGIApp, host: str, key: str, policy: str) -> None:
        self._app, self._key = app, key
        self._headers = self.HEADERS | {"content-security-policy": policy}
        self._hosts = {"localhost", "127.0.0.1", host}
        self._any_host = host == "0.0.0.0"  # `serve` requires a key for it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        # Even if it is refused: a client that is still sending would not see the answer.
        body = await _body(receive)
        if refusal := self._refuse(scope, Headers(scope=scope), body):
            status, text = refusal
            headers = {401: {"www-authenticate": "Bearer"}, 413: {"connection": "close"}}
            error = JSONResponse(error_body(status, text), status, headers.get(status))
            await error(scope, receive, answer)
            return
        pending = [body]

        async def again() -> Message:
            """The body in one piece, then the disconnect that follows it."""
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        await self._app(scope, again, answer)

    def _refuse(self, scope: Scope, headers: Headers, body: bytes | None) -> tuple[int, str] | None:
        """Status and reason, or None for a request that may pass."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            return 431, f"headers may have at most {HEADER_BYTES:,} bytes"
        host = headers.get("host", "")
        if not self._any_host and host.partition(":")[0] not in self._hosts:
            return 421, (
                "this server does not serve that host; ask for localhost or 127.0.0.1, or start "
                "the server with --host 0.0.0.0 and an API key"
            )
        origin = headers.get("origin")
        # A proxy may change the host; no site can change what its browser says of it.
        own = headers.get("sec-fetch-site") == "same-origin"
        if origin is not None and not own and origin.partition("://")[2] != host:
            return 403, "requests from other sites are not allowed (a proxy must pass on Host)"
        if self._key and scope["path"] not in self.OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("latin-1"), self._key.encode()):
                return 401, "missing or wrong API key: send Authorization: Bearer KEY"
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if scope["path"] == "/v1/completions" and kind != "application/json":
                return 415, "Content-Type must be application/json"
            if "content-encoding" in headers:
                return 415, "the body must not be compressed"
        if body is None:
            return 413, f"the request body may have at most {BODY_BYTES:,} bytes"
        return None


async def _body(receive: Receive) -> bytes | None:
    """The whole body, or None if it is too large; the excess is read and dropped."""
    parts: list[bytes] = []
    size = 0
    while size <= UNWANTED_BYTES:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        part = message.get("body", b"")
        size += len(part)
        if size <= BODY_BYTES:
            parts.append(part)
        if not message.get("more_body"):
            break
    return b"".join(parts) if size <= BODY_BYTES else None


def error_body(status: int, text: str) -> dict[str, Any]:
    """An error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": str(status)}}
