"""Programs that models write, run against tests with limits on time, memory, files and network."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal

from quant_eval.tasks.problem import Problem

RUNNER = Path(__file__).with_name("runner.py")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CodeLimits:
    """What a program may take on one test; wall_s counts what it sleeps too."""

    cpu_s: int = 6
    wall_s: float = 10.0
    memory_nbytes: int = 1 << 30
    output_nbytes: int = 1 << 24


@dataclass(frozen=True, slots=True)
class Run:
    """How a program ended, what it wrote, and the last line of its complaint."""

    end: Literal["done", "failed", "timeout"]
    output: str
    error: str


def grade(problem: Problem, answer: str) -> bool | None:
    """The last code block passes every test; None on a system without such limits."""
    if sys.platform == "win32":
        return None
    program = last_block(answer)
    if program is None:
        return False
    wanted = json.loads(problem.expected)
    function = wanted["function"] or ""
    for given, expected in wanted["tests"]:
        run = run_program(program, given, function=function)
        same = _same_value if function else same_output
        if run.end != "done" or not same(run.output, expected):
            return False
    return True


def last_block(text: str) -> str | None:
    """The last fenced block."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else None


def run_program(
    program: str, given: str, *, function: str = "", limits: CodeLimits | None = None
) -> Run:
    """Run a program on one input in a process of its own, in an empty folder.

    function: to be called with the input's lines, each one argument in JSON, and its result
    printed as JSON. "": the program reads the input itself.
    """
    limits = limits or CodeLimits()
    most = (limits.cpu_s, limits.memory_nbytes, limits.output_nbytes)
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder, name) for name in ("program.py", "input", "output", "errors")]
        for part, text in zip(parts, (program, given, "", ""), strict=True):
            part.write_text(text, encoding="utf-8", errors="replace")
        source, given_path, output, errors = parts
        command = [sys.executable, "-I", "-S", "-X", "utf8", str(RUNNER), *map(str, most)]
        with (
            given_path.open("rb") as stdin,
            output.open("wb") as stdout,
            errors.open("wb") as stderr,
        ):
            try:
                done = subprocess.run(
                    [*command, str(source), function],
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    cwd=folder,
                    env={"LANG": "C.UTF-8"},
                    timeout=limits.wall_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return Run("timeout", "", f"ran for more than {limits.wall_s:g} s")
        said, complaint = (part.read_text("utf-8", "replace") for part in (output, errors))
    last = complaint.strip().rpartition("\n")[2]
    if done.returncode < 0 and not last:
        last = f"was ended by signal {-done.returncode}"
    return Run("done" if done.returncode == 0 else "failed", said, last)


def same_output(found: str, expected: str) -> bool:
    """The same words on the same lines; numbers may be written otherwise."""
    ours, theirs = (text.strip().splitlines() for text in (found, expected))
    return len(ours) == len(theirs) and all(
        len(a.split()) == len(b.split())
        and all(_same_word(x, y) for x, y in zip(a.split(), b.split(), strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def _same_word(found: str, expected: str) -> bool:
    if found == expected:
        return True
    try:
        return Decimal(found) == Decimal(expected)
    except InvalidOperation:
        return False


def _same_value(found: str, expected: str) -> bool:
    try:
        return bool(json.loads(found) == json.loads(expected))
    except ValueError:
        return False
