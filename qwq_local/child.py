"""A Python process of our own that answers messages, and whose death is an exception."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, reduce
from operator import iadd
from typing import IO, Any

from convert.errors import EngineError

_FRAME = struct.Struct("<QQQ")  # number, nbytes of the JSON text, and of the bytes that follow it
_SMALL_NBYTES, _CHUNK_NBYTES = 1 << 12, 1 << 16
"""What is read at first, and where that is not all: a large buffer costs more than the read."""
_PIPE_NBYTES = 1 << 20  # for what comes from the process, where Linux allows so much
_LAST_WORDS_S = 5.0  # for a process that closed its pipes to end
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from qwq_local.child import enter; enter(sys.argv[2])"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """A JSON value, and bytes beside it. number: of the request that it is, or answers."""

    value: Any
    data: bytes | bytearray = b""
    number: int = 0


class Channel:
    """Messages over a pair of unbuffered pipes. Raises EOFError where the other side has gone.

    An exception that interrupts it, as Ctrl-C does, loses no byte of what goes either way: the next
    call begins with what the last one left. Python raises it between two steps of its own, so each
    read with the keeping of its bytes, and each write with the counting of them, is one step.
    """

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self._outgoing = outgoing
        self._small_chunks = iter(partial(incoming.read, _SMALL_NBYTES), b"")
        self._chunks = iter(partial(incoming.read, _CHUNK_NBYTES), b"")
        self._buffer = bytearray()
        self._parts: list[tuple[memoryview, list[int]]] = []  # to send; and what was written of it

    def send(self, value: Any, data: bytes | memoryview = b"", *, number: int = 0) -> None:
        """Send a value and bytes, which may be a memoryview of format "B"."""
        text = b"" if value is None else json.dumps(value).encode()
        head = _FRAME.pack(number, len(text), len(data)) + text
        parts = (head + data,) if len(data) < _CHUNK_NBYTES else (head, data)
        self._flush()
        self._parts = [(memoryview(part), []) for part in parts]
        self._flush()

    def _flush(self) -> None:
        try:
            for part, written in self._parts:
                while (n_sent := sum(written)) < len(part):
                    written.extend(map(self._outgoing.write, [part[n_sent:]]))
        except (OSError, ValueError) as error:
            raise EOFError from error
        self._parts = []

    def receive(self) -> Message:
        while (message := self._next()) is None:
            n_held = len(self._buffer)
            chunks = self._chunks if n_held else self._small_chunks
            try:
                reduce(iadd, itertools.islice(chunks, 1), self._buffer)
            except (OSError, ValueError) as error:
                raise EOFError from error
            if len(self._buffer) == n_held:
                raise EOFError
        return message

    def _next(self) -> Message | None:
        """The first message of the buffer, if it is whole."""
        if len(self._buffer) < _FRAME.size:
            return None
        number, n_text, n_data = _FRAME.unpack_from(self._buffer)
        start, end = _FRAME.size + n_text, _FRAME.size + n_text + n_data
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as buffer:
            value = json.loads(bytes(buffer[_FRAME.size : start])) if n_text else None
            is_last = n_data >= _CHUNK_NBYTES and len(buffer) == end
            data = b"" if is_last else bytes(buffer[start:end])
        if not is_last:
            del self._buffer[:end]
            return Message(value, data, number)
        whole, self._buffer = self._buffer, bytearray()  # large, and not worth a copy
        del whole[:start]
        return Message(value, whole, number)


class Child:
    """One process. `entry` is "module:function", called there with its Channel.

    It imports from where this process imports, leaves Ctrl-C to this process, and ends with it.
    """

    def __init__(self, entry: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), entry],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        _widen(process.stdout)
        self._channel = Channel(process.stdout, process.stdin)
        self._numbers = itertools.count(1)
        self._last_lines: deque[str] = deque(maxlen=5)
        self._listener = threading.Thread(
            target=_listen,
            args=(process.stderr, self._last_lines),
            name="qwq-child-stderr",
            daemon=True,
        )
        self._listener.start()
        self._end = weakref.finalize(self, _end, process, self._listener)  # at exit, at the latest

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, value: Any, data: bytes = b"") -> Message:
        """The answer to a request. Raises EngineError where the process has died.

        For one caller at a time, and a process that answers in order. What an exception, as Ctrl-C,
        gave up is sent to its end, and its answer passed over.
        """
        number = next(self._numbers)
        self.send(value, data, number=number)
        while (message := self.receive()).number != number:
            pass
        return message

    def send(self, value: Any, data: bytes = b"", *, number: int = 0) -> None:
        """Raises EngineError where the process has died."""
        try:
            self._channel.send(value, data, number=number)
        except EOFError:
            raise self._death() from None

    def receive(self) -> Message:
        """The next message. Raises EngineError where the process has died."""
        try:
            return self._channel.receive()
        except EOFError:
            raise self._death() from None

    def kill(self) -> None:
        """End it at once, from any thread; whoever waits for a message gets EngineError."""
        self._process.kill()

    def close(self) -> None:
        """Let it go, and wait until it is gone."""
        self._end()

    def _death(self) -> EngineError:
        try:
            code = self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._listener.join()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = "; ".join(self._last_lines) or "it left no message"
        remedy = "ask again"
        if code == -signal.SIGILL:
            remedy = "llama.cpp was compiled for another processor; compile it with `make setup`"
        return EngineError(f"process {self.pid}: it died with {how} ({why}); {remedy}")


def _widen(pipe: IO[bytes]) -> None:
    """Let a pipe hold more, since each time that it is full two processes wait for each other."""
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError):  # a user who has many pipes gets no more
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_NBYTES)


def _listen(stderr: IO[bytes], last_lines: deque[str]) -> None:
    for line in stderr:
        text = line.decode("utf-8", errors="replace").strip()
        if text:
            last_lines.append(text)
            _log.debug("%s", text)


def _end(process: subprocess.Popen[bytes], listener: threading.Thread) -> None:
    process.kill()
    process.wait()
    listener.join()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        try:
            pipe.close()
        except OSError:
            continue  # what was not flushed has no reader any more


def enter(entry: str) -> None:
    """Begin life as a child: what is printed goes to stderr, since stdout is the channel."""
    import importlib

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    outgoing = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    channel = Channel(os.fdopen(0, "rb", buffering=0, closefd=False), outgoing)
    module, _, function = entry.partition(":")
    try:
        getattr(importlib.import_module(module), function)(channel)
    except EOFError:
        os._exit(0)  # the parent has gone; nothing here needs an orderly end
