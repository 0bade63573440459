"""How a browser shows that it has the key: by a form once, and by a cookie from then on."""

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

PATH = "/sign-in"
COOKIE = "qwq_page"
_MOST_FORM_NBYTES = 4096


def page_token(key: str) -> str:
    """What the cookie holds: proof of the key, from which the key cannot be had."""
    return hmac.digest(key.encode(), b"qwq-local page", hashlib.sha256).hex()


def has_signed_in(headers: Headers, key: str) -> bool:
    """Whether a request brings the cookie of this key."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    given = "" if cookie is None else cookie.value
    return hmac.compare_digest(given.encode(), page_token(key).encode())


async def sign_in(request: Request, key: str) -> Response:
    """What the form is answered with."""
    body = (await request.body())[:_MOST_FORM_NBYTES].decode(errors="replace")
    given = parse_qs(body).get("key", [""])[0].strip()
    if not hmac.compare_digest(given.encode(), key.encode()):
        return sign_in_form("This is not the key.")
    response = RedirectResponse("/", 303)
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, page_token(key), httponly=True, samesite="strict", secure=secure)
    return response


def sign_in_form(problem: str = "") -> HTMLResponse:
    """The page that asks for the key."""
    html = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>qwq-local</title>'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" '
        'content="light dark"><body style="font:16px system-ui;max-width:24rem;margin:20vh auto;'
        f'padding:0 1rem"><form method="post" action="{PATH}"><label for="key">The server\'s key'
        '</label><p><input id="key" name="key" type="password" autofocus required '
        f'autocomplete="current-password"> <button>Sign in</button><p role="alert">{problem}'
    )
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, 401, {"content-security-policy": policy, "cache-control": "no-store"})
