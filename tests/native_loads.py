"""Loads GGUF files one after the other in a process that may die of one, within limits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from qwq_local.child import Channel

MOST_NBYTES = 2 << 30
MOST_CPU_S = 20


def load_each(paths: Iterable[Path]) -> Iterator[str]:
    """What became of each file: "loaded", the error's text, or "died: " and how.

    A file may be written when it is asked for and go when it is done with.
    """
    child: subprocess.Popen[str] | None = None
    for path in paths:
        if child is None:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.native_loads"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"},
            )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{path}\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if line:
            yield line.rstrip("\n")
            continue
        yield f"died: {child.wait()}"
        _let_go(child)
        child = None
    if child is not None:
        _let_go(child)


def _let_go(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def die(channel: Channel) -> None:
    """An engine's process that native code ends while it loads."""
    channel.receive()
    os.abort()


def main() -> None:
    import resource
    import signal

    from convert.errors import QwqError

    outcomes = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native code prints is no outcome
    resource.setrlimit(resource.RLIMIT_AS, (MOST_NBYTES, MOST_NBYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)  # kills a hang, whatever else goes on
        try:
            _load(Path(line.rstrip("\n")))
            outcome = "loaded"
        except QwqError as error:
            outcome = " ".join(f"{type(error).__name__}: {error}".split())
        outcomes.write(outcome + "\n")
        outcomes.flush()


def _load(path: Path) -> None:
    """Load it as an engine does, tokenize, and make a few ids."""
    from convert.gguf_header import read_header
    from qwq_local.engine import EngineSettings
    from qwq_local.engines.gguf import GgufEngine
    from qwq_local.sampling import Sampling

    engine = GgufEngine(path, read_header(path), EngineSettings(64, 1, speculation="off"))
    try:
        ids = engine.tokenize("The <think> ☃ 9.11\n", parse_special=False)
        ids += engine.tokenize("<|im_end|>x", parse_special=True)
        generation = engine.generate(
            ids[:32] or [0], sampling=Sampling(), seed=1, max_tokens=3, stop_ids=()
        )
        for token_id in generation:
            engine.token_bytes(token_id)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
