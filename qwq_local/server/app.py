"""The routes."""

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.middleware.cors import CORSMiddleware

from qwq_local.reply import Event
from qwq_local.server.asking import UnknownFields, question_of, thinking_budget
from qwq_local.server.chat_wire import ChunkWriter, Heading, ReasoningForm, completion, usage_chunk
from qwq_local.server.engine_room import Ask, EngineRoom
from qwq_local.server.errors import ApiError, handle_errors
from qwq_local.server.following import Following, Register
from qwq_local.server.guard import Access, Guard
from qwq_local.server.metrics import Metrics
from qwq_local.server.schema import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ErrorBody,
    Health,
    ModelEntry,
    ModelList,
    Steering,
)

MOST_BODY_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """model_name: what the model is called. reasoning: where thoughts go unless a request says."""

    model_name: str
    access: Access
    reasoning: ReasoningForm = "separate"


_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_KEEP_ALIVE = ": the reply is still being made\n\n"


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Strict JSON: no NaN, no half of a surrogate pair, no endless depth."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


def create_app(room: EngineRoom, settings: ServerSettings, metrics: Metrics) -> FastAPI:
    """The server's routes over an engine room, which starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        room.start()
        yield
        room.close()

    app = FastAPI(
        title="qwq-local",
        lifespan=lifespan,
        docs_url=None,  # its page would be fetched from elsewhere
        redoc_url=None,
        max_body_size=MOST_BODY_NBYTES,
    )
    handle_errors(app)
    app.include_router(_Routes(room, settings, metrics).router)
    app.add_middleware(Guard, access=settings.access)
    if settings.access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(settings.access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


class _Routes:
    """What is answered under each path."""

    def __init__(self, room: EngineRoom, settings: ServerSettings, metrics: Metrics) -> None:
        self._room = room
        self._settings = settings
        self._metrics = metrics
        self._register = Register()
        self._unknown = UnknownFields()
        self._started = int(time.time())
        errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}}
        self.router = router = APIRouter(route_class=_JsonRoute, responses=errors)
        router.get("/health", response_model=Health)(self.health)
        router.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        router.get("/v1/models", response_model=ModelList)(self.models)
        router.get("/v1/models/{name:path}", response_model=ModelEntry)(self.model)
        chat = "/v1/chat/completions"
        router.post(chat, response_model=ChatCompletion)(self.chat)
        router.post(chat + "/{id_}/answer-now", status_code=202)(self.answer_now)
        router.post(chat + "/{id_}/steer", status_code=202)(self.steer)

    async def health(self) -> Response:
        state = self._room.state
        return JSONResponse(Health(status=state).model_dump(), 200 if state == "ready" else 503)

    async def metrics(self) -> str:
        return self._metrics.text(self._room)

    async def models(self) -> ModelList:
        return ModelList(data=[self._entry()])

    async def model(self, name: str) -> ModelEntry:
        if name != self._settings.model_name:
            raise ApiError(
                404,
                f"model: {name[:80]!r} is not served here; GET /v1/models lists what is",
                param="model",
                code="model_not_found",
            )
        return self._entry()

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Reply to messages, in chunks where `stream` is set."""
        self._unknown.note(body)
        heading = Heading(
            f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), self._settings.model_name
        )
        asks = [question_of(body, choice=choice).ask for choice in range(body.n or 1)]
        form = self._form(body)
        following = self._register.follow(self._room, request, heading.id, user=body.user)
        try:
            if not body.stream:
                return await _whole_chat(asks, heading, form, following)
            first = following.submit(asks[0])
            events = await _begun(following.events(first))
        except ApiError:
            following.end()
            raise
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = _chunks(asks, events, heading, form, following, with_usage=with_usage)
        return StreamingResponse(chunks, media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def answer_now(self, id_: str) -> dict[str, str]:
        """Close the thought of a reply that is being made, and let the answer follow."""
        self._register[id_].answer_now()
        return {"id": id_}

    async def steer(self, id_: str, body: Steering) -> dict[str, str]:
        """Put a hint into the thought of a reply that is being made."""
        self._register[id_].steer(body.hint)
        return {"id": id_}

    def _entry(self) -> ModelEntry:
        return ModelEntry(id=self._settings.model_name, created=self._started)

    def _form(self, body: ChatRequest) -> ReasoningForm:
        excluded = body.reasoning is not None and body.reasoning.exclude
        return "hidden" if excluded or thinking_budget(body) == 0 else self._settings.reasoning


async def _whole_chat(
    asks: Sequence[Ask], heading: Heading, form: ReasoningForm, following: Following
) -> Response:
    jobs = [following.submit(ask) for ask in asks]
    replies = [await following.whole(job) for job in jobs]
    following.end()
    listened = [reply for reply in replies if reply is not None]
    if len(listened) < len(replies):
        return Response(status_code=499)  # and nobody sees it
    return JSONResponse(completion(heading, listened, form).model_dump(exclude_none=True))


async def _begun(events: AsyncIterator[Event | None]) -> AsyncIterator[Event | None]:
    """The same events, once the first is there. Raises ApiError where the reply fails at once."""
    first = await anext(events, None)

    async def again() -> AsyncIterator[Event | None]:
        yield first
        async for event in events:
            yield event

    return again()


async def _chunks(
    asks: Sequence[Ask],
    events: AsyncIterator[Event | None],
    heading: Heading,
    form: ReasoningForm,
    following: Following,
    *,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events of all choices, one choice after the other; `events` is the first's."""
    dones = []
    try:
        for index, ask in enumerate(asks):
            writer = ChunkWriter(heading, form, index=index)
            yield _sse(writer.start())
            if index > 0:
                events = following.events(following.submit(ask))
            async for event in events:
                yield _KEEP_ALIVE if event is None else "".join(map(_sse, writer.write(event)))
            if writer.done is None:
                return  # nobody listens any more
            dones.append(writer.done)
        if with_usage:
            yield _sse(usage_chunk(heading, dones))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        following.end()


def _sse(chunk: ChatChunk) -> str:
    data = chunk.model_dump(exclude_none=True)
    for choice in data["choices"]:
        choice.setdefault("finish_reason", None)
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
