"""The program, as a user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

QWQ = [sys.executable, "-m", "qwq_local.cli"]
ROOT = Path.cwd()
LONG = "Hi there. " * 2000  # takes a while to read, so that there is time to interrupt


def run(*arguments: str, piped: str = "", folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*QWQ, *arguments],
        input=piped,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_teaches() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in ("ask", "chat", "quantize", "convert", "eval"):
        assert re.search(rf"^\W*{command} +\w", plain(result.stdout), re.MULTILINE), command
    assert "Which is larger" in result.stdout


def test_help_is_fast() -> None:
    """Would catch a heavy import; 0.3 s of a processor, whatever else the machine does."""

    def processor_s() -> float:
        before = os.times()
        run("--help")
        after = os.times()
        return (after.children_user - before.children_user) + (
            after.children_system - before.children_system
        )

    assert min(processor_s() for _ in range(3)) < 0.6


def test_version() -> None:
    assert re.fullmatch(r"qwq \d+\.\d+\.\d+\n", run("--version").stdout)


def test_an_answer_is_on_stdout_and_the_rest_on_stderr(bf16_gguf: Path) -> None:
    result = run("ask", "Hi", "-m", str(bf16_gguf), "--seed", "1", "--max-tokens", "20")
    assert result.returncode == 0
    assert "the reply was cut after 20 tokens" in result.stderr
    again = run("ask", "Hi", "-m", str(bf16_gguf), "--seed", "1", "--max-tokens", "20")
    assert (again.stdout, again.stderr) == (result.stdout, result.stderr)
    quiet = run("ask", "Hi", "-q", "-m", str(bf16_gguf), "--seed", "1", "--max-tokens", "20")
    assert quiet.stdout == result.stdout
    assert len(quiet.stderr) < len(result.stderr)


def test_json_is_one_document(bf16_gguf: Path) -> None:
    arguments = ("--json", "-m", str(bf16_gguf), "--seed", "1", "--max-tokens", "9")
    result = run("ask", "Hi", *arguments)
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["usage"]["completion_tokens"] <= 9
    assert document["model"] == str(bf16_gguf)
    assert {"reasoning", "answer", "tool_calls", "finish_reason", "timings"} <= {*document}
    longer = json.loads(run("ask", "Hi", *arguments, piped="there\n" * 9).stdout)
    assert longer["usage"]["prompt_tokens"] > document["usage"]["prompt_tokens"]


@pytest.mark.slow
def test_a_gptq_folder_keeps_the_streams_clean(gptq_folder: Path) -> None:
    """Would catch what GPTQModel prints to stdout while it loads."""
    result = run("ask", "Hi", "--json", "-m", str(gptq_folder), "--max-tokens", "3")
    assert json.loads(result.stdout)["usage"]["completion_tokens"] <= 3
    assert result.stderr == ""


def test_without_a_model_it_takes_what_was_made_last(bf16_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "mine-BF16.gguf").symlink_to(bf16_gguf)
    result = run("ask", "Hi", "--max-tokens", "2", folder=tmp_path)
    assert result.returncode == 0
    assert "using models/mine/mine-BF16.gguf" in result.stderr


def test_chat_converses(bf16_gguf: Path) -> None:
    lines = "/help\n\nHi\n/nonsense\n/system Be brief.\n/clear\n/exit\nnever\n"
    result = run("chat", "-m", str(bf16_gguf), "--context", "300", "--seed", "1", piped=lines)
    assert result.returncode == 0
    assert "Ctrl-C stops a reply" in result.stderr
    assert "/nonsense: no such command" in result.stderr
    assert result.stderr.count("a new conversation") == 2


def test_interrupting_a_chat_keeps_it(bf16_gguf: Path) -> None:
    """Would catch a Ctrl-C that ends the program, or a reply that cannot be stopped."""
    with subprocess.Popen(
        [*QWQ, "chat", "-m", str(bf16_gguf), "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(f"{LONG}\n")
        process.stdin.flush()
        process.stderr.readline()
        while "greedy" not in process.stderr.readline():  # the reply has begun
            pass
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate("/exit\n", timeout=120)
    assert process.returncode == 0
    assert "stopped" in errors


def test_interrupting_ask_ends_it(bf16_gguf: Path) -> None:
    with subprocess.Popen(
        [*QWQ, "ask", LONG, "-m", str(bf16_gguf), "--temperature", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "greedy" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["ask", "Hi"], 1, "models: no model was found there; make one with `make quantize`"),
        (["ask", "Hi", "-m", "none"], 1, "none: there is no such file or folder; check"),
        (["ask", "Hi", "-m", "no.gguf"], 1, "no.gguf: "),
        (["ask"], 2, "ask: there is no question; give one"),
        (["ask", "--nonsense"], 2, "--nonsense"),
        (["ask", "Hi", "--top-k", "many"], 2, "--top-k"),
        (["nonsense"], 2, "nonsense"),
        (["convert", "--nonsense"], 2, "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(tmp_path: Path, arguments: list[str], code: int, error: str) -> None:
    (tmp_path / "no.gguf").write_text("no")
    result = run(*arguments, folder=tmp_path)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert error in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_prompt_that_is_too_long_is_an_error(bf16_gguf: Path) -> None:
    result = run("ask", "Hi " * 300, "-m", str(bf16_gguf), "--context", "256")
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: prompt: [\d,]+ tokens leave no room .* context of 256; .*\(--context\)\n",
        result.stderr,
    )


def test_commands_of_other_packages_are_found() -> None:
    """Would catch a command that was renamed where it lives."""
    for command in ("quantize", "convert", "eval"):
        result = run(command, "--help")
        assert result.returncode == 0, result.stderr
        assert f"qwq {command}" in plain(result.stdout)
