"""The threads that make the replies: as many at once as the engine decodes together, fairly."""

import asyncio
import contextlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Literal

from qwq_local import Done, EngineError, QwQ, QwqError, Stream
from qwq_local.engine import OnProgress
from qwq_local.reply import Event

State = Literal["loading", "ready", "down", "closed"]
Ask = Callable[[QwQ, OnProgress], Stream]
"""How a reply is begun, in a thread of the engine's."""
_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """So many requests wait already that one more is refused."""


class Job:
    """One reply that was asked for: read in asyncio's thread, made in one of the engine's."""

    def __init__(self, ask: Ask, loop: asyncio.AbstractEventLoop) -> None:
        self._ask = ask
        self._loop = loop
        self._arrived: asyncio.Queue[Event | QwqError | None] = asyncio.Queue()
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._cancelled = False
        self._answer_now = False
        self._hints: list[str] = []
        self.ended = False
        self.progress: tuple[int, int] | None = None  # tokens of the prompt: read, and all

    async def next(self) -> Event | None:
        """The next event, the last of which is Done; None after leave().

        Raises QwqError where the reply failed.
        """
        event = await self._arrived.get()
        if isinstance(event, QwqError):
            raise event
        return event

    def leave(self) -> None:
        """Cancel the reply, since nobody reads it any more."""
        self.cancel()
        self._arrived.put_nowait(None)

    def cancel(self) -> None:
        """End the reply early, with Done if it was begun; a second call does nothing."""
        with self._lock:
            self._cancelled = True
            if self._stream is not None:
                self._stream.cancel()

    def answer_now(self) -> None:
        """Close the thought, and let the answer follow."""
        with self._lock:
            self._answer_now = True
            if self._stream is not None:
                self._stream.answer_now()

    def steer(self, hint: str) -> None:
        """Put a hint into the thought, once it has begun. Raises UsageError where it is none."""
        with self._lock:
            self._hints.append(hint)
            if self._stream is not None:
                self._pass_hints(self._stream)

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def run(self, qwq: QwQ) -> Done | None:
        """Make the reply, in a thread of the engine's. Raises EngineError where the engine died."""
        try:
            stream = self._ask(qwq, self._note_progress)
            with self._lock:
                self._stream = stream
                if self._cancelled:
                    stream.cancel()
                if self._answer_now:
                    stream.answer_now()
                self._pass_hints(stream)
            with contextlib.closing(stream):  # here, and not wherever memory is next collected
                for event in stream:
                    self._put(event)
                    if isinstance(event, Done):
                        return event
        except EngineError:
            raise
        except QwqError as error:
            self.fail(error)
        return None

    def fail(self, error: QwqError) -> None:
        """Tell whoever waits that there will be no reply, or no more of it."""
        self._put(error)

    def _note_progress(self, n_read: int, n_all: int) -> None:
        self.progress = (n_read, n_all)

    def _pass_hints(self, stream: Stream) -> None:
        hints, self._hints = self._hints, []
        for hint in hints:
            stream.steer(hint)

    def _put(self, event: Event | QwqError) -> None:
        self.ended = isinstance(event, Done | QwqError)
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, event)


class EngineRoom:
    """Opens the model, makes replies until closed, and restarts an engine that died.

    Clients whose requests wait take turns. n_waiting: how many may wait at most. n_parallel: how
    many replies are made at once, each in a thread of its own. on_done: told of each whole reply.
    on_failure: told why the model could not be opened.
    """

    def __init__(
        self,
        open_model: Callable[[], QwQ],
        *,
        n_waiting: int = 32,
        n_parallel: int = 1,
        on_done: Callable[[Done], None] | None = None,
        on_failure: Callable[[QwqError], None] | None = None,
    ) -> None:
        self._open_model = open_model
        self._most_waiting = n_waiting
        self._n_parallel = n_parallel
        self._on_done = on_done
        self._on_failure = on_failure
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._running: set[Job] = set()
        self._qwq: QwQ | None = None
        self._threads: list[threading.Thread] = []
        self.state: State = "loading"

    @property
    def n_waiting(self) -> int:
        with self._changed:
            return self._count_waiting()

    @property
    def n_running(self) -> int:
        return len(self._running)

    def start(self) -> None:
        """Begin to load the model."""
        thread = threading.Thread(target=self._work, name="qwq-engine", daemon=True)
        with self._changed:
            self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
            thread.start()

    def submit(self, ask: Ask, client: str) -> Job:
        """Queue a reply. Call it from asyncio's thread. Raises QueueFullError, EngineError."""
        job = Job(ask, asyncio.get_running_loop())
        with self._changed:
            if self.state == "closed":
                raise EngineError("server: it is shutting down; ask again later")
            n_free = self._n_parallel - len(self._running)  # for these nobody will have to wait
            if self._count_waiting() >= self._most_waiting + n_free:
                raise QueueFullError
            self._waiting.setdefault(client, deque()).append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Cancel what runs and what waits, and free the model."""
        with self._changed:
            self.state = "closed"
            for job in self._running:
                job.cancel()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if self._qwq is not None:
            self._qwq.close()

    def _count_waiting(self) -> int:
        return sum(not job.cancelled for jobs in self._waiting.values() for job in jobs)

    def _work(self) -> None:
        job: Job | None = None
        try:
            if self._qwq is None:
                self._qwq = self._open_model()
                self._become("ready")
                for _ in range(1, self._n_parallel):
                    self.start()
            while (job := self._next(job)) is not None:
                self._make(job, self._qwq)
        except QwqError as error:
            _log.error("the model cannot be opened: %s", error)
            if self._on_failure is not None:
                self._on_failure(error)
            self._become("closed")
        finally:
            self._end_thread(job)

    def _make(self, job: Job, qwq: QwQ) -> None:
        try:
            done = job.run(qwq)
        except EngineError as error:
            _log.error("the engine died: %s", error)
            was_ready = self._become("down") == "ready"
            job.fail(error)
            if was_ready:  # else another thread sees to it
                self._revive(qwq)
            return
        if done is not None and self._on_done is not None:
            self._on_done(done)

    def _revive(self, qwq: QwQ) -> None:
        """The engine's process starts anew with the next reply: make a short one."""
        try:
            qwq.reply([{"role": "user", "content": "Hi"}], max_tokens=1).reply()
        except QwqError as error:
            _log.error("the engine does not start again: %s", error)
        else:
            self._become("ready")

    def _next(self, last: Job | None) -> Job | None:
        """The job whose client waited longest for a turn; None when there will be no more."""
        with self._changed:
            self._running -= {last}
            while True:
                while not self._waiting and self.state != "closed":
                    self._changed.wait()
                if self.state == "closed":
                    return None
                client, jobs = self._waiting.popitem(last=False)
                job = jobs.popleft()
                if jobs:
                    self._waiting[client] = jobs  # at the end of the line
                if not job.cancelled:
                    self._running.add(job)
                    return job

    def _become(self, state: State) -> State:
        """The state before."""
        with self._changed:
            before = self.state
            if before != "closed":
                self.state = state
        return before

    def _end_thread(self, job: Job | None) -> None:
        """Leave nobody waiting; after a bug of ours in one reply, go on with the next."""
        with self._changed:
            self._running -= {job}
            if job is not None and not job.ended:
                job.fail(EngineError("server: an error of its own ended the reply; see its log"))
            if self.state == "closed":
                for waiting in (one for jobs in self._waiting.values() for one in jobs):
                    waiting.fail(EngineError("server: it is shutting down; ask again later"))
                self._waiting.clear()
            elif self._qwq is not None:
                self.start()
            else:
                self.state = "closed"
