"""What a command takes, as a whole process, and a disk that takes too little."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_PROGRAM = """
import json, resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([status, usage.ru_utime + usage.ru_stime, unit * usage.ru_maxrss]))
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds on the clock and of processor time, peak of resident memory in bytes."""

    wall_s: float
    cpu_s: float
    peak_nbytes: int


def run_whole(command: Sequence[str], *, log: Path | None = None) -> Cost:
    """Run a command in the repository's root; what it prints goes to `log`, else to stderr.

    A small process starts it: the peak of a child is at least what its parent holds, as Linux
    counts. Raises CalledProcessError where the command fails.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        starter = subprocess.run(
            [sys.executable, "-S", "-c", _PROGRAM, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=None if log is None else stack.enter_context(log.open("ab")),
            check=True,
        )
    wall_s = time.perf_counter() - started
    status, cpu_s, peak_nbytes = json.loads(starter.stdout)
    if status:
        raise subprocess.CalledProcessError(status, command)
    return Cost(wall_s, cpu_s, peak_nbytes)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """While the context lasts, the system lets no file of this process grow beyond nbytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
