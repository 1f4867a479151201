"""The web application: middleware, static files, the routers of the pages, and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from spectune.errors import SpectuneError, one_line
from spectune.studio.jobs.api import router_of
from spectune.studio.login import Login
from spectune.studio.pages import PAGES
from spectune.studio.places import Refused
from spectune.studio.rendering import STATIC, error_response
from spectune.studio.security import Guard
from spectune.studio.workspace import Workspace


def create_app(workspace: Workspace) -> FastAPI:
    """Return the application for a workspace. The assistant starts and ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        workspace.assistant.start()
        workspace.jobs.start()
        try:
            yield
        finally:
            workspace.jobs.close()
            workspace.assistant.close()

    # The pages of FastAPI about its API load scripts of another site.
    app = FastAPI(title="spectune studio", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.workspace = workspace
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    for name in PAGES:
        app.include_router(import_module(f"spectune.studio.pages.{name}").router)
    app.include_router(router_of(workspace.jobs))
    # The last one that is added sees a request first.
    if workspace.password is not None:
        login = Login(workspace.password)
        app.include_router(login.router)
        app.add_middleware(login.middleware)
    app.add_middleware(Guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(workspace.hosts), www_redirect=False)
    _add_error_handlers(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(SpectuneError)
    def library_error(request: Request, error: SpectuneError) -> Response:
        return error_response(request, 404 if isinstance(error, Refused) else 422, error.what, error.hint)

    @app.exception_handler(OSError)  # a full disk, or no permission
    def system_error(request: Request, error: OSError) -> Response:
        name = "" if error.filename is None else f"{Path(str(error.filename)).name}: "
        return error_response(request, 422, one_line(f"{name}{error.strerror or error}"))

    @app.exception_handler(RequestValidationError)
    def wrong_values(request: Request, error: RequestValidationError) -> Response:
        problems = [
            f"`{'.'.join(str(part) for part in one['loc'][1:])}`: {one['msg']}" for one in error.errors()[:5]
        ]
        return error_response(request, 422, one_line("; ".join(problems)))

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> Response:
        words = {404: "there is no such page", 405: "this address does not accept this method"}
        response = error_response(request, error.status_code, words.get(error.status_code, error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)  # uvicorn prints the traceback
    def defect(request: Request, error: Exception) -> Response:
        return error_response(
            request,
            500,
            f"spectune has a defect here: {type(error).__name__}",
            "the details are in the window of the server; please report them",
        )
