"""What a process takes before, while and after it has a model open.

python -m tests.loading [here|isolated:PATH:CONTEXT:KV_TYPE:N_READ] ...   a line of JSON for each
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from qwq_local.engine import KvChoice
from tests.processes import run_whole


@dataclass(frozen=True, slots=True)
class Load:
    """n_read: so many ids are read before logits of some more are computed."""

    path: Path
    context: int
    kv_type: KvChoice = "auto"
    n_read: int = 0
    isolated: bool = False

    def __str__(self) -> str:
        how = "isolated" if self.isolated else "here"
        return f"{how}:{self.path}:{self.context}:{self.kv_type}:{self.n_read}"


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes, of the children too: before, and after closing; the most so far in between.

    planned: what was counted before the load, 0 where that is not known.
    """

    before: int
    most: int
    after: int
    planned: int


def measure(loads: Sequence[Load], log: Path) -> list[Memory]:
    """Open and close one after the other in one process; `most` counts where each is the largest.

    log: a file for what the process says.
    """
    run_whole([sys.executable, "-m", "tests.loading", *map(str, loads)], log=log)
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"before"')]
    return [Memory(**json.loads(line)) for line in lines]


def _load(load: Load) -> Memory:
    from qwq_local import QwQ

    before = _resident()
    qwq = QwQ.open(
        load.path,
        context=load.context,
        threads=1,
        kv_type=load.kv_type,
        speculation="off",
        isolated=load.isolated,
    )
    engine: Any = qwq.engine
    plan = getattr(engine, "memory_plan", None)
    ids = [10 + index % 200 for index in range(load.n_read)]
    for step in (engine.prefill(ids or [10]), engine.logits(ids[:512] or [10])):
        deque(step, maxlen=0)
    most = max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, _resident())
    qwq.close()
    del qwq, engine
    gc.collect()
    planned = 0 if plan is None else sum(share.nbytes for share in plan.shares)
    return Memory(before, most, _resident(), planned)


def _resident() -> int:
    import psutil

    process = psutil.Process()
    members = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in members)


def main() -> None:
    for argument in sys.argv[1:]:
        how, path, context, kv_type, n_read = argument.split(":")
        (kind,) = (one for one in get_args(KvChoice) if one == kv_type)
        load = Load(Path(path), int(context), kind, int(n_read), how == "isolated")
        sys.stdout.write(json.dumps(asdict(_load(load))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
