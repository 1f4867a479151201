"""The pages, one module each.

To add a page `name`:

1. `pages/name.py`: `router = APIRouter()` with `@router.get("/name")`, which returns
   `render(request, "name.html", title="Name", ...)`. JSON routes are below `/api/name/`, and routes that
   receive files below `/api/uploads/` (up to 256 MB; others accept 1 MB, see LIMITS in security.py). Add
   `name` to PAGES, and a link to NAVIGATION in rendering.py.
2. `templates/name.html`: `{% extends "base.html" %}`, with the blocks `content` and `scripts`.
3. `static/name.js`: `import { get, post, poll, toast } from "./app.js"`; put
   `<script type="module" src="/static/name.js"></script>` into the block `scripts`. Inline scripts,
   `onclick=` and `style=` do not work: the CSP refuses them. Styles are classes in `static/app.css`, or set
   by `element.style` in JavaScript.

Routes get the shared objects as a parameter:

    @router.get("/api/name/inspect")
    def inspect(space: Space, path: str) -> dict[str, Any]:
        model = space.places().file(path)  # never open a path of a request in another way
        return space.ask("inspect", {"model": str(model)})

`ask` (assistant/questions.py has the questions) blocks, so write `def`, not `async def`. With `topic="rank"`,
a newer question with the same topic cancels this one. Raise InputError or Refused for wrong input: the page
gets `{"error": {"what", "hint"}}` with status 422 or 404, and `get` and `post` of app.js throw it.
Import torch, numpy, PIL or an operation only in the assistant or in a job, never here.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from spectune.studio.workspace import Workspace

PAGES = ("home", "new_tune", "recipe", "data", "run", "result", "tools", "settings", "thumbnails")


def _space(request: Request) -> Workspace:
    return request.app.state.workspace


Space = Annotated[Workspace, Depends(_space)]
