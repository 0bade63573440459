"""TLS with a certificate of one's own, and what stands in the log."""

import contextlib
import http.client
import logging
import os
import re
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from qwq_local.server.guard import Access
from tests.qwq_local.server.running import THOUGHT, Repeating, Running, fake_qwq, running
from tests.qwq_local.test_cli import QWQ

KEY = "qwq-0123456789abcdef"
BODY = b'{"messages": [{"role": "user", "content": "a secret prompt"}]}'
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For localhost, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem"),
            *("-out", "cert.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.slow
def test_a_tls_handshake_and_a_quiet_log(
    certificate: tuple[Path, Path], bf16_gguf: Path, tmp_path: Path
) -> None:
    """A client that trusts this certificate alone is served; one that does not is not; plain HTTP
    is not; and the program's output names neither key nor prompt, whatever was sent.
    """
    cert, key = certificate
    command = [*QWQ, "serve", "-m", str(bf16_gguf), "--port", "0", "--context", "512"]
    command += ["--tls-cert", str(cert), "--tls-key", str(key), "--no-page"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QWQ_API_KEY": KEY}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            found = re.search(r"at https://127\.0\.0\.1:(\d+)/v1", line)
            assert found, line
            port = int(found[1])

            def models(context: ssl.SSLContext) -> int:
                connection = http.client.HTTPSConnection(
                    "localhost", port, timeout=120, context=context
                )
                connection.request("GET", "/v1/models", headers=HEADERS)
                response = connection.getresponse()
                response.read()
                connection.request("POST", "/v1/chat/completions", BODY[:-1], HEADERS)
                assert connection.getresponse().status in (400, 503)
                connection.close()
                return response.status

            assert models(ssl.create_default_context(cafile=str(cert))) == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                models(ssl.create_default_context())
            with pytest.raises((http.client.HTTPException, OSError)):
                _get(port, "/health")
        finally:
            process.terminate()
        log = process.stdout.read()
    assert KEY not in line + log
    assert "secret" not in log


def test_logs_hold_no_prompts_and_no_keys(caplog: pytest.LogCaptureFixture) -> None:
    """At the lowest level, through replies, errors, an unknown field and a wrong key."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.WARNING, logger="asyncio")
    with running(lambda: fake_qwq(engine=Repeating(THOUGHT)), access=Access(key=KEY)) as server:
        for body in (BODY, BODY[:-2], BODY[:-1] + b', "unheard_of": "a secret value"}'):
            _post(server, body, HEADERS)
        _post(server, BODY, HEADERS | {"Authorization": "Bearer a-secret-key-of-another"})
        _post(server, BODY, HEADERS | {"Origin": "https://evil.example/secret"})
    text = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records)
    assert "unheard_of" in text, "the log is not looked at"
    assert "secret" not in text
    assert KEY not in text


def test_cors_is_for_the_origins_that_are_named() -> None:
    """A preflight of another origin gets nothing; a named one may send a key, and no cookie."""
    access = Access(origins=frozenset({"https://app.example"}))
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with running(fake_qwq, access=access) as server:
        allowed = _options(server, ask | {"Origin": "https://app.example"})
        refused = _options(server, ask | {"Origin": "https://evil.example"})
    assert allowed["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in allowed
    assert "access-control-allow-origin" not in refused
    with running(fake_qwq) as server:
        unnamed = _options(server, ask | {"Origin": "https://app.example"})
    assert not [name for name in unnamed if name.startswith("access-control")]


def test_no_documentation_is_fetched_from_elsewhere() -> None:
    """FastAPI's /docs would load its scripts from another host."""
    with running(fake_qwq) as server:
        statuses = [_get(server.port, path) for path in ("/docs", "/redoc", "/openapi.json")]
    assert statuses == [404, 404, 200]


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one function that is made for it: header and cookie alike."""
    import hmac

    from starlette.datastructures import Headers

    from qwq_local.server import guard, sign_in

    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return hmac.compare_digest(left, right)

    stand_in = type("hmac", (), {"compare_digest": compare, "digest": hmac.digest})
    monkeypatch.setattr(guard, "hmac", stand_in)
    monkeypatch.setattr(sign_in, "hmac", stand_in)
    headers = Headers({"host": "localhost", "cookie": "qwq_page=x"})
    error = guard.refusal(Access(key=KEY, page=True), headers, "/v1/models")
    assert error is not None
    assert compared == [KEY.encode(), sign_in.page_token(KEY).encode()]


def _post(server: Running, body: bytes, headers: dict[str, str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("POST", "/v1/chat/completions", body, headers)
    connection.getresponse().read()
    connection.close()


def _options(server: Running, headers: dict[str, str]) -> dict[str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("OPTIONS", "/v1/chat/completions", headers=headers)
    found = connection.getresponse().getheaders()
    connection.close()
    return {name.lower(): value for name, value in found}


def _get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status
