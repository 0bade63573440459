"""Programs that models write: each limit bites, and sound programs run."""

import socket
import sys
from pathlib import Path

import pytest

from quant_eval.benchmarks.code import CodeLimits, last_block, run_program, same_output

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such limits")


def test_sound_programs_run() -> None:
    """Catches limits that honest programs meet: modules, recursion, several ways to read."""
    program = """
import bisect, collections, functools, heapq, itertools, math, random, re, sys
from fractions import Fraction
@functools.cache
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
words = open(0).read().split()
print(deep(3000), *words, Fraction(1, 3))
"""
    run = run_program(program, "a b\n")
    assert (run.end, run.output) == ("done", "3000 a b 1/3\n"), run.error
    assert run_program("import sys\nprint(sys.stdin.readline())", "one\ntwo").output == "one\n\n"
    assert run_program("import sys\nsys.exit(0)", "").end == "done"


def test_time_is_limited() -> None:
    """Catches a program that computes, or sleeps, for ever."""
    short = CodeLimits(cpu_s=1, wall_s=30)
    assert run_program("while True: pass", "", limits=short).end == "failed"
    asleep = run_program("import time; time.sleep(4)", "", limits=CodeLimits(wall_s=0.5))
    assert asleep.end == "timeout"


def test_memory_is_limited() -> None:
    """Catches a program that takes the machine's memory."""
    small = CodeLimits(memory_nbytes=1 << 28)
    run = run_program("x = bytearray(1 << 29); print(len(x))", "", limits=small)
    assert (run.end, run.error) == ("failed", "MemoryError")
    assert run_program("x = bytearray(1 << 26); print(1)", "", limits=small).end == "done"


def test_output_is_limited() -> None:
    """Catches a program that fills the disk by printing."""
    limits = CodeLimits(output_nbytes=1000)
    run = run_program("print('x' * 100_000, flush=True)", "", limits=limits)
    assert run.end == "failed"
    assert len(run.output) <= 1000


@pytest.mark.parametrize(
    "line",
    [
        "open({0!r}, 'w').write('x')",
        "import os; os.open({0!r}, os.O_CREAT | os.O_WRONLY)",
        "import os; open(os.__file__, 'r+')",
        "open({1!r}).read()",
        "import pathlib; pathlib.Path({1!r}).read_text()",
        "import os; os.remove({1!r})",
        "import os; os.rename({1!r}, {0!r})",
        "import os; os.mkdir({0!r})",
        "import shutil; shutil.rmtree('.')",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.execv('/bin/true', ['true'])",
        "import ctypes",
        "import multiprocessing",
    ],
)
def test_files_and_processes_are_refused(line: str, tmp_path: Path) -> None:
    """Catches what would change or read the user's files, or leave the limits behind."""
    secret = tmp_path / "secret"
    secret.write_text("told")
    line = line.format(str(tmp_path / "new"), str(secret))
    run = run_program(f"{line}\nprint('did it')", "")
    assert (run.end, run.output) == ("failed", "")
    assert "PermissionError: the program may not" in run.error
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_the_network_is_refused() -> None:
    """Catches a program that talks to a server, by name or by address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        for line in (
            f"socket.create_connection(('127.0.0.1', {port}), timeout=5)",
            f"socket.socket().connect(('127.0.0.1', {port}))",
            "socket.getaddrinfo('localhost', 80)",
        ):
            run = run_program(f"import socket\n{line}\nprint('did it')", "")
            assert run.end == "failed"
            assert "PermissionError: the program may not" in run.error
        with pytest.raises(BlockingIOError):
            server.accept()


def test_outputs_are_compared_by_words() -> None:
    """Catches blanks at line ends that count, and lines that do not."""
    assert same_output("1 2 \n3\n\n", "1 2\n3")
    assert same_output("0.50", "0.5")
    assert same_output("", "\n")
    assert not same_output("1\n2", "1 2")
    assert not same_output("1", "1 1")
    assert not same_output("yes", "Yes")


def test_the_last_block_is_the_program() -> None:
    """Catches a draft that is run in the place of what came after it."""
    assert last_block("```python\na\n```\nNo:\n```py\nb\n```") == "b\n"
    assert last_block("print(1)") is None
