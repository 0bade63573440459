"""The README's commands work: each block under a line `<!-- run -->` is run in the repository.

A `console` block: lines that start with `$ ` are commands for the shell, all others are output and
not compared. A `python` block is a program. Blocks run in the order of the page. `make test` is
what runs this, so it is left out.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^<!-- run -->\n+```(?P<language>console|python)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """One block to run, and the line of the page it starts at."""

    line: int
    language: str
    body: str

    def command(self) -> list[str]:
        """Return the process to start."""
        if self.language == "python":
            return [sys.executable, "-c", self.body]
        typed = [line[2:] for line in self.body.splitlines() if line.startswith("$ ")]
        return ["sh", "-euc", "\n".join(line for line in typed if line != "make test")]


def blocks(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, found.start()) + 1, found["language"], found["body"])
        for found in BLOCK.finditer(text)
    ]


README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def test_blocks_are_found_by_their_mark() -> None:
    text = "```console\n$ no\n```\n<!-- run -->\n```console\n$ yes\nout\n$ too\n```\n"
    (block,) = blocks(text)
    assert block.line == 4
    assert block.command() == ["sh", "-euc", "yes\ntoo"]


@pytest.mark.slow
@pytest.mark.parametrize("block", README, ids=lambda block: f"line {block.line}")
def test_a_block_of_the_readme_runs(block: Block) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        block.command(),
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"README.md:{block.line}\n{done.stdout}\n{done.stderr}"
