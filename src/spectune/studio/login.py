"""The password: a page that asks for it, and a cookie for the session."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from time import monotonic
from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from spectune.studio.rendering import error_response, render

COOKIE = "spectune_studio"
FREE_TRIES, LONGEST_WAIT_SECONDS = 3, 60
_OPEN = ("/login", "/static/")


class Login:
    """The sessions of one server. A restart ends them."""

    def __init__(self, password: str) -> None:
        self._digest = _digest(password)
        self._sessions: set[str] = set()
        self._wrong = 0
        self._closed_until = 0.0  # of monotonic()
        self.router = self._make_router()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Return ASGI middleware that lets only sessions and the login page through."""

        async def check(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and not self._is_open(request := Request(scope)):
                await _ask(request)(scope, receive, send)
                return
            await app(scope, receive, send)

        return check

    def check(self, password: str) -> bool:
        """Return whether a password is right. After some wrong ones, refuse all for a growing time."""
        if hmac.compare_digest(_digest(password), self._digest):
            self._wrong = 0
            return True
        self._wrong += 1
        if self._wrong >= FREE_TRIES:
            pause = min(2.0 ** (self._wrong - FREE_TRIES), LONGEST_WAIT_SECONDS)
            self._closed_until = monotonic() + pause
        return False

    def _is_open(self, request: Request) -> bool:
        path = request.scope["path"]
        return path.startswith(_OPEN) or request.cookies.get(COOKIE, "") in self._sessions

    def _make_router(self) -> APIRouter:
        router = APIRouter()

        @router.get("/login")
        def form(request: Request) -> Response:
            return render(request, "login.html", title="Log in")

        @router.post("/login")
        def submit(request: Request, password: Annotated[str, Form(max_length=1000)]) -> Response:
            wait = self._closed_until - monotonic()
            if wait > 0:
                problem = f"Too many wrong passwords. Try again in {wait:.0f} seconds."
                response = render(request, "login.html", 429, title="Log in", problem=problem)
                response.headers["retry-after"] = f"{wait:.0f}"
                return response
            if not self.check(password):
                return render(request, "login.html", 403, title="Log in", problem="This password is wrong.")
            session = secrets.token_urlsafe(32)
            self._sessions.add(session)
            response = RedirectResponse("/", 303)
            response.set_cookie(COOKIE, session, httponly=True, samesite="strict")
            return response

        return router


def _ask(request: Request) -> Response:
    if request.scope["path"].startswith("/api"):
        return error_response(request, 401, "log in first")
    return RedirectResponse("/login", 303)


def _digest(password: str) -> bytes:
    """Return a hash, so that the comparison takes the same time for passwords of all lengths."""
    return hashlib.sha256(password.encode("utf-8", "surrogatepass")).digest()
