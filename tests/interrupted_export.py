"""Convert a checkpoint over and over, killed at random moments; prints what came of it as JSON.

A process of its own, since it forks: `python -m tests.interrupted_export CHECKPOINT FOLDER KILLS`.
A killed export is begun again by the same call until it is done; then the next one starts afresh.
It is done, too, where it was killed while it removed its journals, after all files had their names.
Exits with 1 where a file under its final name is not what an uninterrupted export writes.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from convert import gguf_export
from convert.checkpoint import Checkpoint
from convert.gguf_export import export_planned
from convert.journal import journal_path
from convert.plan import FilePlan, plan_file
from convert.recipe import RECIPES

SLICE_N_WEIGHTS = 6_000


def plans_in(checkpoint: Checkpoint, folder: Path) -> list[FilePlan]:
    """A whole file and one in parts, of types that are quick."""
    return [
        plan_file(checkpoint, RECIPES["Q8_0"], folder / "whole.gguf"),
        plan_file(checkpoint, RECIPES["Q4_0"], folder / "parts.gguf", split_nbytes=150_000),
    ]


def export(source: Path, folder: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        plans = plans_in(checkpoint, folder)
        export_planned(checkpoint, plans, threads=2, slice_n_weights=SLICE_N_WEIGHTS)


def run_and_die(work: Callable[[], None], delay_s: float) -> bool:
    """Work in a child that is killed after delay_s; whether it was done before."""
    child = os.fork()
    if not child:
        killer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL))
        killer.daemon = True
        killer.start()
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def main() -> None:
    source, root, n_kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    gguf_export.COMMIT_INTERVAL_S = 0.0
    start_s = time.monotonic()
    export(source, root / "reference")
    duration_s = time.monotonic() - start_s
    reference = {path.name: path.read_bytes() for path in (root / "reference").iterdir()}
    delays = random.Random(20261123)
    n_killed = n_done = n_continued = n_in_a_row = 0
    while n_killed < n_kills:
        folder = root / f"run-{n_done}"
        was_journalled = any(folder.glob("*.journal"))
        longest_s = duration_s * (1 + n_in_a_row / 4)  # the machine may have become slower
        is_done = run_and_die(partial(export, source, folder), delays.uniform(0, longest_s))
        n_killed += not is_done
        n_continued += was_journalled
        names = [path.name for path in folder.glob("*.gguf")]
        for name in names:
            assert (folder / name).read_bytes() == reference[name], (n_killed, name)
        if is_done:
            assert sorted(path.name for path in folder.iterdir()) == sorted(reference)
        if not journal_path(folder / "whole.gguf").exists() and set(names) == set(reference):
            is_done = True
        n_done += is_done
        n_in_a_row = 0 if is_done else n_in_a_row + 1
    print(json.dumps({"killed": n_killed, "done": n_done, "continued": n_continued}))  # noqa: T201


if __name__ == "__main__":
    main()
