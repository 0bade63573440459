"""Calibrate a checkpoint over and over, killed at random moments; prints what came of it as JSON.

A process of its own, since it forks: `python -m tests.interrupted_calibration FOLDER KILLS`.
A killed calibration is begun again by the same call until it is done; then the next one starts
afresh. Exits with 1 where a folder under its final name is not what an uninterrupted run writes.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

# Loaded before the fork, so that a child spends its time on the work.
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer  # noqa: F401

from convert.calibrate import CalibrationSettings, calibrate, plan_calibration
from convert.checkpoint import Checkpoint
from convert.files import partial_path
from convert.layer_work import JOURNAL
from tests.synthetic import sums, write_checkpoint

SETTINGS = CalibrationSettings(
    hessians=True, sensitivities=True, n_sensitivity_tokens=300, batch_tokens=400
)


def run(source: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with Checkpoint.open(source) as checkpoint:
        plan = plan_calibration(
            checkpoint, out, passages=sums(9), settings=SETTINGS, evaluation=sums(11)[9:]
        )
        calibrate(plan)


def run_and_die(source: Path, out: Path, delay_s: float | None) -> bool:
    """Calibrate in a child that is killed after delay_s; whether it was done before."""
    child = os.fork()
    if not child:
        if delay_s is not None:
            killer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL))
            killer.daemon = True
            killer.start()
        run(source, out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the journal, which is the last to go."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != JOURNAL}


def main() -> None:
    root, n_kills = Path(sys.argv[1]), int(sys.argv[2])
    source = write_checkpoint(root / "source", config={"num_hidden_layers": 4})
    start_s = time.monotonic()
    assert run_and_die(source, root / "reference", None)
    duration_s = time.monotonic() - start_s
    reference = contents(root / "reference")
    delays = random.Random(20261128)
    n_killed = n_done = n_continued = n_in_a_row = 0
    while n_killed < n_kills:
        out = root / f"run-{n_done}"
        n_continued += (partial_path(out) / JOURNAL).exists()
        longest_s = duration_s * (1 + n_in_a_row / 4)  # the machine may have become slower
        is_done = run_and_die(source, out, delays.uniform(0, longest_s))
        n_killed += not is_done
        if out.exists():
            found = contents(out)
            differing = [
                name
                for name in sorted(found.keys() | reference.keys())
                if found.get(name) != reference.get(name)
            ]
            assert not differing, (out, differing, n_killed)
            assert not partial_path(out).exists()
            is_done = True
        n_done += is_done
        n_in_a_row = 0 if is_done else n_in_a_row + 1
    print(json.dumps({"killed": n_killed, "done": n_done, "continued": n_continued}))  # noqa: T201


if __name__ == "__main__":
    main()
