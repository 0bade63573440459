"""Who gets in: every attack has its test."""

import http.client
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from qwq_local import QwqError, UsageError
from qwq_local.server.app import MOST_BODY_NBYTES, ServerSettings
from qwq_local.server.errors import ApiError
from qwq_local.server.guard import Access, refusal
from qwq_local.server.keys import find_key, key_file
from qwq_local.server.schema_bounds import check_schema
from qwq_local.server.serving import Listening, serve
from tests.qwq_local.server.running import Running, fake_qwq, running

KEY = "qwq-0123456789abcdef"
HERE = "localhost:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(fake_qwq, access=Access(key=KEY)) as server:
        yield server


def status(server: Running, method: str, path: str, body: bytes = b"", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        return connection.getresponse().status
    finally:
        connection.close()


def refused(access: Access, path: str = "/v1/models", **headers: str) -> str | None:
    error = refusal(access, Headers({k.replace("_", "-"): v for k, v in headers.items()}), path)
    return error.code if error else None


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]:8000", "localhost:99999"]
)
def test_its_own_names_are_served(host: str) -> None:
    assert refused(Access(), host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:8000",
        "evil.example@localhost",
        "localhost/evil.example",
        "192.168.0.7",
        "[::1",
        "",
        "localhost#",
    ],
)
def test_a_rebound_name_is_refused(host: str) -> None:
    """DNS rebinding: the attacker's name points at this machine, and Host gives it away."""
    assert refused(Access(), host=host) == "host_not_allowed"


def test_hosts_that_are_named_and_addresses_where_it_listens_on_all() -> None:
    assert refused(Access(frozenset({"box.example"})), host="box.example:443") is None
    assert refused(Access(any_address=True), host="192.168.0.7:8000") is None
    assert refused(Access(any_address=True), host="evil.example") == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "code"),
    [
        (f"http://{HERE}", None),
        ("https://app.example", None),
        ("https://evil.example", "origin_not_allowed"),
        ("http://localhost:9999", "origin_not_allowed"),
        ("null", "origin_not_allowed"),
        ("", "origin_not_allowed"),
        (f"https://evil.example://{HERE}", "origin_not_allowed"),
        (f"https://evil.example/{HERE}", "origin_not_allowed"),
    ],
)
def test_pages_from_elsewhere_are_refused(origin: str, code: str | None) -> None:
    """Cross-site requests: a page on the web may not use the model behind its reader's back."""
    access = Access(origins=frozenset({"https://app.example"}))
    assert refused(access, host=HERE, origin=origin) == code


def test_cross_site_requests_without_an_origin_are_refused() -> None:
    """An image or script tag sends none; following a link to the page is no attack."""
    assert refused(Access(), host=HERE, sec_fetch_site="cross-site") == "origin_not_allowed"
    assert refused(Access(), path="/", host=HERE, sec_fetch_site="cross-site") is None
    assert refused(Access(), host=HERE, sec_fetch_site="same-origin") is None


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"authorization": f"Bearer {KEY}"}, None),
        ({"x_api_key": KEY}, None),
        ({}, "invalid_api_key"),
        ({"authorization": f"Bearer {KEY[:-1]}"}, "invalid_api_key"),
        ({"authorization": f"Bearer {KEY}x"}, "invalid_api_key"),
        ({"authorization": f"Basic {KEY}"}, "invalid_api_key"),
        ({"authorization": "Bearer \xe4"}, "invalid_api_key"),
        ({"authorization": "Bearer "}, "invalid_api_key"),
    ],
)
def test_the_key_is_needed(headers: dict[str, str], code: str | None) -> None:
    assert refused(Access(key=KEY), host=HERE, **headers) == code


def test_the_guard_stands_before_every_path(server: Running) -> None:
    """Would catch middleware that is in the wrong order, or a route that goes round it."""
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        assert status(server, "GET", path) == 401, path
        assert status(server, "GET", path, Host="evil.example") == 403, path
    assert status(server, "GET", "/health") == 200
    assert status(server, "GET", "/v1/models", Authorization=f"Bearer {KEY}") == 200


def test_two_hosts_are_refused(server: Running) -> None:
    """What one reader takes for the name, another may not."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.putrequest("GET", "/health", skip_host=True)
    connection.putheader("Host", "localhost")
    connection.putheader("Host", "evil.example")
    connection.endheaders()
    assert connection.getresponse().status in (400, 403)
    connection.close()


def test_no_cors_and_no_simple_posts(server: Running) -> None:
    """A form can post text/plain across sites without being asked; JSON it cannot."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("GET", "/health")
    names = {name.lower() for name, _ in connection.getresponse().getheaders()}
    connection.close()
    assert not {name for name in names if name.startswith("access-control")}
    body = b'{"messages": [{"role": "user", "content": "x"}]}'
    headers = {"Authorization": f"Bearer {KEY}", "Content_Type": "text/plain"}
    assert status(server, "POST", "/v1/chat/completions", body, **headers) == 400


def test_bodies_are_bounded(server: Running) -> None:
    """Before anything of them is read."""
    headers = {"Authorization": f"Bearer {KEY}", "Content_Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.putrequest("POST", "/v1/chat/completions")
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.putheader("Content-Length", str(MOST_BODY_NBYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$ref": "https://evil.example/schema.json"}, "not within the schema"),
        ({"$ref": "file:///etc/passwd"}, "not within the schema"),
        ({"type": "string", "maxLength": 10**9}, "maxLength"),
        ({"type": "array", "minItems": 10**9}, "minItems"),
        ({"type": "string", "pattern": "^((a{999}){999})$"}, "pattern"),
        ({"type": "string", "pattern": "a" * 2000}, "pattern"),
        ({"enum": ["x" * 70_000]}, "bytes"),
    ],
)
def test_schemas_are_bounded(schema: dict[str, Any], problem: str) -> None:
    """A grammar spells repeats out, and a reference would be fetched."""
    with pytest.raises(ApiError, match=problem) as caught:
        check_schema({"type": "object", "properties": {"x": schema}}, "schema")
    assert caught.value.status == 400


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ApiError, match="levels deep"):
        check_schema(schema, "schema")


def test_other_machines_need_a_key() -> None:
    settings = ServerSettings("x", Access())
    with pytest.raises(UsageError, match="needs a key"):
        serve(fake_qwq, settings, Listening("0.0.0.0"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_what_is_this_machine_alone(host: str) -> None:
    assert Listening(host).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "box.example"])
def test_what_others_reach(host: str) -> None:
    assert not Listening(host).is_loopback


def test_the_key_is_made_once_and_kept_to_its_owner(tmp_path: Path) -> None:
    path = key_file({"XDG_CONFIG_HOME": str(tmp_path)})
    key, is_new = find_key(path, {})
    assert is_new
    assert len(key) > 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert find_key(path, {}) == (key, False)
    assert find_key(path, {"QWQ_API_KEY": KEY}) == (KEY, False)
    os.chmod(path, 0o644)  # noqa: PTH101
    with pytest.raises(QwqError, match="mode is 644"):
        find_key(path, {})


@pytest.mark.parametrize("key", ["", "short", "ä" * 20, "has\nlines in it, two"])
def test_a_weak_key_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(QwqError, match="16 or more"):
        find_key(tmp_path / "key", {"QWQ_API_KEY": key})
