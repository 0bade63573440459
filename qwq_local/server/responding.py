"""Answering a request with its replies, whole or as a stream of server-sent events."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from qwq_local import Done
from qwq_local.reply import Event, Reply
from qwq_local.server.engine_room import Ask, Job
from qwq_local.server.errors import ApiError
from qwq_local.server.following import Following

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Writer(Protocol):
    """What an interface's stream looks like, as text of server-sent events."""

    def begin(self) -> str:
        """What comes before each reply."""

    def write(self, event: Event) -> str:
        """What an event of the reply adds."""

    def end(self) -> str:
        """What comes after the last reply."""

    def fail(self, error: ApiError) -> str:
        """What says that there is no more to come, and why."""


async def respond_whole(
    following: Following, asks: Sequence[Ask], write: Callable[[Sequence[Reply]], dict[str, Any]]
) -> Response:
    """One JSON document for all replies. Raises ApiError."""
    try:
        jobs = [following.submit(ask) for ask in asks]
        replies = [await following.whole(job) for job in jobs]
    finally:
        following.end()
    listened = [reply for reply in replies if reply is not None]
    if len(listened) < len(replies):
        return Response(status_code=499)  # and nobody sees it
    return JSONResponse(write(listened))


async def respond_streamed(
    following: Following, asks: Sequence[Ask], writer: Writer
) -> StreamingResponse:
    """One reply after the other; all are queued at once, and may be made at once.

    Raises ApiError where the first reply fails at once; what fails later is part of the stream.
    """
    try:
        jobs = [following.submit(ask) for ask in asks]
        events = following.events(jobs[0])
        first = await anext(events, None)
    except ApiError:
        following.end()
        raise
    lines = _lines(following, jobs, writer, _again(first, events))
    return StreamingResponse(lines, media_type="text/event-stream", headers=_HEADERS)


async def _lines(
    following: Following,
    jobs: Sequence[Job],
    writer: Writer,
    first: AsyncIterator[Event | None],
) -> AsyncIterator[str]:
    try:
        for index, job in enumerate(jobs):
            events = following.events(job) if index else first
            yield writer.begin()
            event = None
            async for event in events:
                yield _keep_alive(job) if event is None else writer.write(event)
            if not isinstance(event, Done):
                return  # nobody listens any more
        yield writer.end()
    except ApiError as error:
        yield writer.fail(error)
    finally:
        following.end()


async def _again(
    first: Event | None, rest: AsyncIterator[Event | None]
) -> AsyncIterator[Event | None]:
    yield first
    async for event in rest:
        yield event


def _keep_alive(job: Job) -> str:
    """A comment, which clients pass over and people may read."""
    if job.progress is None:
        return ": waiting\n\n"
    n_read, n_all = job.progress
    return f": {n_read} of {n_all} tokens of the prompt are read\n\n"
