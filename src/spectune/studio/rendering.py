"""Templates, static files, and errors as pages or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.templating import Jinja2Templates

HERE = Path(__file__).resolve().parent
STATIC = HERE / "static"
TEMPLATES = Jinja2Templates(directory=HERE / "templates")

# The links at the top of every page: (path, text). The first part of the path marks the current page.
NAVIGATION = (
    ("/", "Home"),
    ("/new", "New tune"),
    ("/recipe", "Recipe"),
    ("/data", "Pictures"),
    ("/tools", "Tools"),
    ("/settings", "Settings"),
)
TEMPLATES.env.globals["navigation"] = NAVIGATION


def render(request: Request, template: str, status: int = 200, **context: Any) -> Response:
    """Return a page. Templates also get `theme`, `here` (the current path) and `workspace`."""
    workspace = request.app.state.workspace
    shared = {
        "workspace": workspace,
        "theme": workspace.settings.now.theme,
        "here": f"/{request.url.path.split('/')[1]}",
    }
    return TEMPLATES.TemplateResponse(request, template, {**shared, **context}, status_code=status)


def error_response(request: Request, status: int, what: str, hint: str | None = None) -> Response:
    """Return an error: JSON `{"error": {"what", "hint"}}` below /api/, otherwise a page."""
    if request.url.path.startswith("/api/") or request.url.path == "/api":
        return JSONResponse({"error": {"what": what, "hint": hint}}, status)
    return render(request, "error.html", status, title="Error", what=what, hint=hint)
