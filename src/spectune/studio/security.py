"""What every request must satisfy, and the headers of every response.

Pages of other sites must neither start anything here nor read anything: a foreign `Host` is refused (DNS
rebinding), and so is everything that another site sends, except links to pages.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spectune.studio.rendering import error_response

SERVER = "spectune-studio"
HEADERS: Mapping[str, str] = {
    "server": SERVER,
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not no-referrer: browsers would then send `Origin: null` with forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
LONGEST_URL = 8192
LARGEST_BODY = 1_000_000  # bytes
# Other limits, by the begin of the address: files, and the undo of a replacement in many captions.
LIMITS = {"/api/uploads/": 256_000_000, "/api/data/captions": 32_000_000}
_SAFE = {"GET", "HEAD"}


class Guard:
    """ASGI middleware that refuses requests of other sites and bodies that are too large."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the Studio has none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        secured = _secured(send)
        refusal = _refusal(request)
        if refusal is not None:
            await refusal(scope, receive, secured)
            return
        await self.app(scope, _limited(receive, _limit_of(scope["path"])), secured)


def _refusal(request: Request) -> Response | None:
    """Return the response to a request that is refused."""
    path, query = request.scope["path"], request.scope["query_string"]
    if len(path) + len(query) > LONGEST_URL:
        return error_response(request, 414, "the address is too long")
    if "\0" in path or "\\" in path:
        return error_response(request, 400, "the address contains a character that no page has")
    if request.method in _SAFE:
        if is_foreign_request(request.headers):
            return error_response(request, 403, "other sites may not read from the Studio")
        return None
    if not is_same_origin(request.headers):
        return error_response(request, 403, "only pages of the Studio may change something")
    length = request.headers.get("content-length", "0")
    limit = _limit_of(path)
    if not length.isdecimal() or int(length) > limit:
        return error_response(request, 413, f"the request is too large: expected at most {limit:,} bytes")
    return None


def _limit_of(path: str) -> int:
    """Return how many bytes a request to this address may send."""
    return next((limit for begin, limit in LIMITS.items() if path.startswith(begin)), LARGEST_BODY)


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Return whether a request that changes something comes from a page of the Studio.

    Browsers send `Sec-Fetch-Site` to this computer and over https, and `Origin` with every such request.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site not in (None, "same-origin", "none"):
        return False
    if origin is None:
        return site == "same-origin"
    return origin.lower() in (f"{scheme}://{headers.get('host', '').lower()}" for scheme in ("http", "https"))


def is_foreign_request(headers: Mapping[str, str]) -> bool:
    """Return whether another site loads an address, unless the user follows a link."""
    if headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return False
    return (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) != ("navigate", "document")


def _limited(receive: Receive, limit: int) -> Receive:
    """Count the bytes of a body, also of one without a length."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, f"the request is too large: expected at most {limit:,} bytes")
        return message

    return counted


def _secured(send: Send) -> Send:
    """Add the headers to a response."""
    extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name, value) for name, value in message["headers"] if name.decode() not in HEADERS]
            if not any(name == b"cache-control" for name, _ in own):
                own.append((b"cache-control", b"no-cache"))
            message = {**message, "headers": [*own, *extra]}
        await send(message)

    return add
