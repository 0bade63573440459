"""`qwq serve`, as a user runs it."""

import os
import re
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from openai import OpenAI

from tests.qwq_local.test_cli import QWQ, run


def test_it_serves_until_it_is_interrupted(bf16_gguf: Path) -> None:
    """Catches a command that does not reach the server, or does not let go."""
    command = [*QWQ, "serve", "-m", str(bf16_gguf), "--port", "0", "--context", "512"]
    command += ["--parallel", "2"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "QWQ_API_KEY": "a-key-of-our-own"},
    ) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.search(r"serving nano-qwq-BF16.gguf at (http://127.0.0.1:\d+)/v1", line)
            assert found, line + process.stderr.read()
            url = f"{found[1]}/v1"
            with OpenAI(api_key="a-key-of-our-own", base_url=url, max_retries=20) as client:
                reply = client.chat.completions.create(
                    model="qwq", messages=[{"role": "user", "content": "Hi"}], max_tokens=9
                )
            assert reply.usage is not None
            assert 0 < reply.usage.completion_tokens <= 9
            with urllib.request.urlopen(f"{found[1]}/health", timeout=120) as response:
                assert response.status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tls-cert", "x.pem"], "go together"),
        (["--reasoning", "sideways"], "'sideways'"),
        (["--host", "203.0.113.7", "--port", "1"], "cannot listen there"),
        (["-m", "nowhere.gguf"], "nowhere.gguf: there is no such file"),
    ],
)
def test_what_cannot_be_is_said(
    bf16_gguf: Path,
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    result = run("serve", "-m", str(bf16_gguf), *arguments)
    assert result.returncode in (1, 2)
    assert problem in result.stderr
    assert "Traceback" not in result.stderr


def test_the_key_is_shown_once(
    bf16_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And kept where nobody else can read it; an address that others reach asks for it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("QWQ_API_KEY", raising=False)
    command = ("serve", "-m", str(bf16_gguf), "--host", "203.0.113.7", "--port", "1")
    first, second = run(*command).stderr, run(*command).stderr
    path = tmp_path / "qwq-local" / "api-key"
    assert f"key, shown this once and kept in {path}: {path.read_text()}" in first
    assert "shown this once" not in second
    assert path.read_text().strip() not in second
