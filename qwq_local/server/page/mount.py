"""The page's place on the server: its paths, its headers, and signing in where a key is asked for.

One server in a process can have it, since NiceGUI's own app is one for the process.
"""

from collections.abc import MutableMapping
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.routing import Match, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwq_local.server.engine_room import EngineRoom
from qwq_local.server.guard import Access
from qwq_local.server.page.shelf import Shelf
from qwq_local.server.sign_in import PATH, sign_in

_PATHS = ("/", "/favicon.ico")
_FOLDERS = ("/_nicegui/", "/_nicegui_ws/")
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" '
    'rx="7" fill="#3949ab"/><circle cx="15" cy="15" r="7" fill="none" stroke="#fff" '
    'stroke-width="3"/><path d="M19 19l6 6" stroke="#fff" stroke-width="3"/></svg>'
)


def has_page() -> bool:
    """Whether the extra [web] is installed."""
    return all(map(find_spec, ("nicegui", "latex2mathml", "mdit_py_plugins")))


def mount_page(
    app: FastAPI, room: EngineRoom, shelf: Shelf, *, model_name: str, access: Access
) -> None:
    """Put the page on the server's app."""
    from nicegui import app as nicegui_app
    from nicegui import core, ui

    from qwq_local.server.page.desk import Desk
    from qwq_local.server.page.markup import code_css
    from qwq_local.server.page.view import View

    desk = Desk(room, shelf, model_name)
    here = files("qwq_local.server.page")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    style = here.joinpath("page.css").read_text(encoding="utf-8") + code_css()
    ui.add_head_html(f"<script>{script}</script><style>{style}</style>", shared=True)
    nicegui_app.colors(primary="#3949ab")

    @ui.page("/")
    def show(chat: str = "") -> None:
        View(desk, chat)

    ui.run_with(
        app,
        title=f"{model_name} · qwq-local",
        favicon=_ICON,
        dark=None,
        language="en-US",
        tailwind=False,
        show_welcome_message=False,
    )
    core.sio.eio.cors_allowed_origins = []  # no headers: the guard decides about origins
    app.router.routes[-1] = _PageMount("/", _WithPolicy(nicegui_app))
    if access.key is not None:
        app.router.routes.insert(0, Route(PATH, partial(sign_in, key=access.key), methods=["POST"]))


class _PageMount(Mount):
    """Takes the page's own paths alone, so that all others stay the server's to answer."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope.get("path", "")
        if scope["type"] in ("http", "websocket") and (path in _PATHS or path.startswith(_FOLDERS)):
            return super().matches(scope)
        return Match.NONE, {}


class _WithPolicy:
    """Tells browsers to fetch nothing from elsewhere, and to put the page into no frame."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_policy(message)
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _add_policy(message: MutableMapping[str, Any]) -> None:
    headers = MutableHeaders(scope=message)
    headers["content-security-policy"] = _POLICY
    headers["x-content-type-options"] = "nosniff"
    headers["referrer-policy"] = "same-origin"
