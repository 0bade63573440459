"""Quantize a checkpoint by GPTQ over and over, killed at random moments; prints JSON of the runs.

A process of its own, since it forks: `python -m tests.interrupted_gptq CHECKPOINT FOLDER KILLS`.
A killed run is begun again by the same call until it is done; then the next one starts afresh.
Exits with 1 where a folder under its final name is not what an uninterrupted run writes.
"""

import json
import os
import random
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401 # loaded once, before forking

from convert.checkpoint import Checkpoint
from convert.files import partial_path
from convert.gptq import GptqSettings
from convert.gptq_export import export_gptq
from convert.layer_work import JOURNAL
from tests.interrupted_export import run_and_die
from tests.synthetic import sums


def export(source: Path, out: Path) -> None:
    settings = GptqSettings(other_damps=(), clip_steps=0)
    with Checkpoint.open(source) as checkpoint:
        export_gptq(checkpoint, out, settings=settings, calibration=sums(4))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the journal, which goes last of all."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != JOURNAL}


def main() -> None:
    source, root, n_kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)  # threads do not outlive a fork
    start_s = time.monotonic()
    assert run_and_die(partial(export, source, root / "reference"), 300)
    duration_s = time.monotonic() - start_s
    reference = contents(root / "reference")
    delays = random.Random(20261128)
    n_killed = n_done = n_continued = n_in_a_row = 0
    while n_killed < n_kills:
        out = root / f"run-{n_done}"
        was_begun = (partial_path(out) / JOURNAL).exists()
        # The first run was slower than others are; the machine may have become slower meanwhile.
        longest_s = 0.6 * duration_s * (1 + n_in_a_row / 4)
        is_done = run_and_die(partial(export, source, out), delays.uniform(0, longest_s))
        n_killed += not is_done
        n_continued += was_begun
        if out.exists():
            assert contents(out) == reference, n_killed
            is_done = True
        n_done += is_done
        n_in_a_row = 0 if is_done else n_in_a_row + 1
    print(json.dumps({"killed": n_killed, "done": n_done, "continued": n_continued}))  # noqa: T201


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
