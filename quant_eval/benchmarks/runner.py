"""Runs one program of a model's and nothing else: started by code.py in a process of its own.

Arguments: seconds of processor time, bytes of memory, bytes of output, the program's file, and the
name of a function or "". Limits that the kernel keeps are set first; then a hook that cannot be
taken off refuses files, sockets, processes and foreign code. They hold against accidents and the
usual mischief; a program written to break out of Python may.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""
REFUSED = (
    "ctypes.",
    "ftplib.",
    "mmap.",
    "os.chdir",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "os.unlink",
    "os.utime",
    "pty.",
    "shutil.",
    "signal.pthread_kill",
    "smtplib.",
    "socket.",
    "subprocess.",
)
FOREIGN = frozenset(
    {"_ctypes", "_posixsubprocess", "_testcapi", "cffi", "ctypes", "multiprocessing"}
)


def main() -> None:
    seconds, memory, output = (int(text) for text in sys.argv[1:4])
    program, function = sys.argv[4:]
    with open(program, encoding="utf-8") as file:  # noqa: PTH123  # starts in half the time
        code = compile(file.read(), "<program>", "exec")
    for limit, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(limit, (most, most))
    sys.setrecursionlimit(20_000)
    sys.argv = ["program"]
    readable = tuple(os.path.realpath(place) + os.sep for place in (sys.base_prefix, sys.prefix))
    sys.addaudithook(_guard(readable))
    names: dict[str, Any] = {"__name__": "__main__"}
    if function:  # what the solutions of published benchmarks take for granted
        exec(PRELUDE, names)  # noqa: S102
    exec(code, names)  # noqa: S102  # what this process is for
    if function:
        called = getattr(names["Solution"](), function) if "Solution" in names else names[function]
        arguments = [json.loads(line) for line in sys.stdin.read().splitlines() if line.strip()]
        sys.stdout.write(json.dumps(called(*arguments)))


def _guard(readable: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], None]:
    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if path in (0, 1, 2, "/dev/stdin"):
                return
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            name = os.fsdecode(os.path.realpath(path)) if isinstance(path, str | bytes) else ""
            if writes or not name.startswith(readable):
                raise PermissionError(f"the program may not open {path!r}")
        elif event == "import" and arguments[0].partition(".")[0] in FOREIGN:
            raise PermissionError(f"the program may not import {arguments[0]}")
        elif event.startswith(REFUSED):
            raise PermissionError(f"the program may not do {event}")

    return guard


if __name__ == "__main__":
    main()
