"""Following the replies to a request: a client that leaves, a long wait, an error in between."""

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request

from qwq_local import Done, QwqError
from qwq_local.reply import Event, Reply, collect
from qwq_local.server.engine_room import Ask, EngineRoom, Job, QueueFullError
from qwq_local.server.errors import ApiError, api_error
from qwq_local.server.guard import client_of

KEEP_ALIVE_S = 2.0
"""So often a client that waits is told that it is not forgotten, and so long a stream waits for
its first event before its status is sent: what fails by then has a status of its own."""


class Following:
    """The replies to one request, made while its client listens."""

    def __init__(
        self, room: EngineRoom, register: "Register", request: Request, id_: str, user: str | None
    ) -> None:
        self.id = id_
        self._room = room
        self._register = register
        self._request = request
        peer = request.client.host if request.client else ""
        self._client = user or client_of(request.headers, peer)
        self._jobs: list[Job] = []
        self._left = False
        self._watch = asyncio.create_task(self._end_when_left())

    def submit(self, ask: Ask) -> Job:
        """Queue a reply. Raises ApiError where the queue is full, or the model is not there."""
        if self._room.state == "loading":
            raise ApiError(
                503,
                "model: it is being loaded; ask again soon",
                code="model_loading",
                headers={"Retry-After": "5"},
            )
        try:
            job = self._room.submit(ask, self._client)
        except QueueFullError:
            raise ApiError(
                429,
                f"queue: {self._room.n_waiting} requests wait already; ask again later",
                code="queue_full",
                headers={"Retry-After": "5"},
            ) from None
        except QwqError as error:
            raise api_error(error) from error
        self._jobs.append(job)
        if self._left:
            job.leave()
        return job

    def answer_now(self) -> None:
        for job in self._jobs:
            job.answer_now()

    def steer(self, hint: str) -> None:
        """Raises ApiError where the hint is none."""
        try:
            for job in self._jobs:
                job.steer(hint)
        except QwqError as error:
            raise api_error(error) from error

    async def whole(self, job: Job) -> Reply | None:
        """A whole reply; None where nobody listens any more. Raises ApiError."""
        events = [event async for event in self.events(job) if event is not None]
        return collect(events) if events and isinstance(events[-1], Done) else None

    async def events(self, job: Job) -> AsyncIterator[Event | None]:
        """The events of a reply, with None in between where it takes long.

        Ends early where the client left. Raises ApiError where the reply failed.
        """
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    event = await job.next()
            except TimeoutError:
                yield None
                continue
            except QwqError as error:
                raise api_error(error) from error
            if event is None:
                return
            yield event
            if isinstance(event, Done):
                return

    def end(self) -> None:
        """Let go of all that is still being made; a second call does nothing."""
        self._left = True
        self._watch.cancel()
        self._register.drop(self.id)
        for job in self._jobs:
            job.leave()

    async def _end_when_left(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            continue
        self.end()


class Register:
    """The requests that are being answered, by id."""

    def __init__(self) -> None:
        self._following: dict[str, Following] = {}

    def follow(
        self, room: EngineRoom, request: Request, id_: str, *, user: str | None = None
    ) -> Following:
        """Begin to answer a request; end() it when that is done."""
        following = self._following[id_] = Following(room, self, request, id_, user)
        return following

    def drop(self, id_: str) -> None:
        self._following.pop(id_, None)

    def __getitem__(self, id_: str) -> Following:
        """Raises ApiError where there is no such request."""
        following = self._following.get(id_)
        if following is None:
            raise ApiError(
                404,
                f"id: no reply {id_[:80]!r} is being made; it may have ended",
                param="id",
                code="reply_not_found",
            )
        return following
