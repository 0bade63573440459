"""An engine in a process of its own that makes several replies at once."""

import itertools
import os
import queue
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from convert.errors import EngineError, QwqError
from qwq_local.child import Channel, Child, Message
from qwq_local.engine import EngineSettings, OnProgress
from qwq_local.engines.isolated import IsolatedEngine, open_engine, raise_error

_Box = queue.SimpleQueue[Message | EngineError]


def isolate(
    path: Path, settings: EngineSettings, *, on_progress: OnProgress | None = None
) -> IsolatedEngine:
    """An engine in a process of its own, for one reply at a time or for several."""
    kind = ParallelEngine if settings.parallel > 1 else IsolatedEngine
    return kind(path, settings, on_progress=on_progress)


class ParallelEngine(IsolatedEngine):
    """Hands calls to a BatchedEngine in a child process, as many at a time as come.

    A thread here finds who waits for an answer by its number. Where the process dies all that wait
    get EngineError, and the next call starts another.
    """

    entry = "qwq_local.engines.parallel:serve"

    def __init__(
        self, path: Path, settings: EngineSettings, *, on_progress: OnProgress | None = None
    ) -> None:
        self._numbers = itertools.count(1)
        self._boxes: dict[int, _Box] = {}
        self._reader: threading.Thread | None = None
        super().__init__(path, settings, on_progress=on_progress)

    def close(self) -> None:
        super().close()
        if self._reader is not None:
            self._reader.join()

    def _ask(self, request: Any, *, of: Child | None = None, data: bytes = b"") -> Message:
        box: _Box = queue.SimpleQueue()
        number = next(self._numbers)
        boxes = self._boxes
        try:
            with self._lock:
                self._check_open()
                if self._child is None:
                    self._start(None)
                child, boxes = self._child, self._boxes
                assert child is not None
                if of is not None and of is not child:
                    raise EngineError(self._last_death)
                boxes[number] = box
                try:
                    child.send(request, data, number=number)
                except EngineError as error:
                    self._last_death = str(error)
                    self._forget()
                    raise
            message = box.get()
        finally:
            boxes.pop(number, None)
        if isinstance(message, EngineError):
            self._check_open()
            raise message
        raise_error(message)
        return message

    def _check_open(self) -> None:
        if self._closed:
            raise QwqError(f"{self._path}: the model is closed; open it again")

    def _start(self, on_progress: OnProgress | None) -> Any:
        about = super()._start(on_progress)
        self._boxes = {}
        self._reader = threading.Thread(
            target=self._deliver, args=(self._child, self._boxes), name="qwq-answers", daemon=True
        )
        self._reader.start()
        return about

    def _deliver(self, child: Child, boxes: dict[int, _Box]) -> None:
        try:
            while True:
                message = child.receive()
                box = boxes.get(message.number)
                if box is not None:  # whoever asked still waits
                    box.put(message)
        except EngineError as error:
            with self._lock:
                if self._child is child:
                    self._last_death = str(error)
                    self._forget()
                for box in list(boxes.values()):
                    box.put(error)


def serve(channel: Channel) -> None:
    """The life of the process: a path and settings in, then numbered calls in and results out."""
    calls = open_engine(channel)
    if calls is None:
        return
    n_parallel: int = calls.engine.n_parallel
    sending = threading.Lock()

    def answer(request: Message) -> None:
        done = False
        try:
            value, data = calls.answer(request)
            with sending:
                channel.send(value, data, number=request.number)
            done = True
        finally:
            if not done:  # a bug, or the parent has gone: nobody is to wait for ever
                traceback.print_exc()
                os._exit(1)

    threads = ThreadPoolExecutor(max_workers=2 * n_parallel + 2)
    while True:
        threads.submit(answer, channel.receive())
