"""Ctrl-C at every moment at which Python can raise it, without a clock."""

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import IO, cast

import pytest

from qwq_local import child


class Narrow:
    """A pipe's end that passes on a few bytes at each call."""

    def __init__(self, end: IO[bytes], nbytes: int) -> None:
        self._end = end
        self._nbytes = nbytes

    def read(self, n: int) -> bytes:
        return self._end.read(min(n, self._nbytes))

    def write(self, data: memoryview) -> int:
        return self._end.write(data[: self._nbytes])


def use_narrow_pipes(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """On this side of all processes that are started from now on."""
    channel = child.Channel

    def narrow(*ends: IO[bytes]) -> child.Channel:
        incoming, outgoing = (cast(IO[bytes], Narrow(end, nbytes)) for end in ends)
        return channel(incoming, outgoing)

    monkeypatch.setattr(child, "Channel", narrow)


def interrupted(task: Callable[[], object], moment: int, *modules: ModuleType) -> bool:
    """Whether a task was still going on at a moment, and so was ended by KeyboardInterrupt.

    Moments are counted from 0: each beginning of a function of these modules, each end of a call
    of C from them, and each read and write of a narrow pipe before it is done. That is where
    Python looks for signals.
    """
    files = {module.__file__ for module in modules}
    pipes = Narrow.read.__code__, Narrow.write.__code__
    n_left = moment

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal n_left
        is_ours = event in ("call", "c_return") and frame.f_code.co_filename in files
        if is_ours or (event == "call" and frame.f_code in pipes):
            if n_left == 0:
                raise KeyboardInterrupt
            n_left -= 1

    sys.setprofile(look)
    try:
        task()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False
