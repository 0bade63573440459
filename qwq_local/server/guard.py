"""Who may talk to the server: Host, Origin and key of a request are looked at before all else."""

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qwq_local.server.errors import ApiError
from qwq_local.server.sign_in import PATH, has_signed_in, sign_in_form

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN_PATHS = ("/health",)


@dataclass(frozen=True, slots=True)
class Access:
    """hosts: names that the server goes by. origins: pages elsewhere that may use it, as in
    "https://app.example". any_address: whether it goes by IP addresses too, which no rebinding of
    a name can reach. key: None asks for none. page: whether there is one, with a form for the key.
    """

    hosts: frozenset[str] = frozenset(LOOPBACK)
    origins: frozenset[str] = frozenset()
    any_address: bool = False
    key: str | None = None
    page: bool = False


class Guard:
    """ASGI middleware that answers what may not pass with an error."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        error = refusal(self._access, Headers(scope=scope), scope["path"])
        if error is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is open: status 403
        elif self._access.page and error.status == 401 and scope["path"] == "/":
            await sign_in_form()(scope, receive, send)
        else:
            await error.response(scope["path"])(scope, receive, send)


def refusal(access: Access, headers: Headers, path: str) -> ApiError | None:
    """Why a request may not pass, None where it may."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _knows_host(access, hosts[0]):
        return ApiError(
            403,
            "Host: the server does not go by this name; start it with --allow-host NAME",
            code="host_not_allowed",
        )
    origins = headers.getlist("origin")
    for origin in origins:
        if origin not in access.origins and origin.partition("://")[2] != hosts[0]:
            return ApiError(
                403,
                "Origin: pages from elsewhere may not use the server; "
                "start it with --allow-origin ORIGIN",
                code="origin_not_allowed",
            )
    if not origins and headers.get("sec-fetch-site") == "cross-site" and path != "/":
        return ApiError(
            403, "Sec-Fetch-Site: other sites may not use the server", code="origin_not_allowed"
        )
    if access.key is None or path in _OPEN_PATHS or _has_key(headers, access.key):
        return None
    if access.page and (path == PATH or has_signed_in(headers, access.key)):
        return None
    return ApiError(
        401,
        "Authorization: the key is missing or wrong; send it as `Authorization: Bearer KEY`",
        code="invalid_api_key",
    )


def client_of(headers: Mapping[str, str], peer: str) -> str:
    """Whose turn it is when requests wait: a key's, or an address's."""
    return headers.get("authorization") or headers.get("x-api-key") or peer


def _knows_host(access: Access, host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    if not name or any(c in host for c in "/?#@\\"):
        return False
    if name in access.hosts:
        return True
    return access.any_address and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _has_key(headers: Headers, key: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    return hmac.compare_digest(given.strip().encode(), key.encode())
