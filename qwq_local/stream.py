"""A reply that is being made: read in one thread, steered from any."""

import asyncio
import queue
import threading
from collections.abc import Callable, Generator
from typing import Self

from convert.errors import UsageError
from qwq_local.reply import THOUGHT_CLOSE, Done, Event, Reply, collect


class Control:
    """What other threads ask of a reply; whoever makes it looks here between two tokens."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.answer_now = threading.Event()
        self.hints: queue.SimpleQueue[str] = queue.SimpleQueue()


class Stream:
    """Iterates over the events of one reply, the last of which is Done.

    Nothing is computed ahead of what is read. The methods may be called from any thread.
    """

    def __init__(self, make: Callable[[Control], Generator[Event]]) -> None:
        self._control = Control()
        self._events = make(self._control)
        self._lock = threading.Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        with self._lock:
            event = next(self._events)
            if isinstance(event, Done):
                self._events.close()  # at once: not whenever a collector comes by
            return event

    def cancel(self) -> None:
        """End the reply within one micro-batch; Done("cancelled") is its last event."""
        self._control.cancelled.set()

    def answer_now(self) -> None:
        """Close the thought, if the reply is still in it, and let the answer follow."""
        self._control.answer_now.set()

    def steer(self, hint: str) -> None:
        """Put a hint into the thought. Raises UsageError where it would close the thought."""
        if not hint.strip() or THOUGHT_CLOSE in hint:
            raise UsageError(f"steer: {hint!r} is no hint; give a text without {THOUGHT_CLOSE}")
        self._control.hints.put(hint.strip())

    @property
    def cancelled(self) -> bool:
        """Whether cancel was called."""
        return self._control.cancelled.is_set()

    def reply(self) -> Reply:
        """Read on to the end: the whole of what was not read yet."""
        return collect(self)

    def close(self) -> None:
        """Cancel, and let go of the reply without reading on; waits for one micro-batch at most."""
        self.cancel()
        with self._lock:
            self._events.close()


class AsyncStream:
    """A Stream for asyncio; a task that is cancelled while it waits cancels the reply."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.cancel = stream.cancel
        self.answer_now = stream.answer_now
        self.steer = stream.steer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await asyncio.to_thread(next, self._stream, None)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if event is None:
            raise StopAsyncIteration
        return event

    async def reply(self) -> Reply:
        """Read on to the end: the whole of what was not read yet."""
        return collect([event async for event in self])

    async def aclose(self) -> None:
        """Cancel, and let go of the reply without reading on."""
        await asyncio.to_thread(self._stream.close)
