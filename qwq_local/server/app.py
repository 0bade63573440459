"""The routes."""

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.middleware.cors import CORSMiddleware

from qwq_local.reply import Reply
from qwq_local.server import messages_wire, responses_wire
from qwq_local.server.asking import UnknownFields, question_of, thinking_budget
from qwq_local.server.chat_wire import ChatWriter, Heading, ReasoningForm, completion
from qwq_local.server.completing import CompletionWriter, continuations_of, text_completion
from qwq_local.server.engine_room import EngineRoom
from qwq_local.server.errors import ApiError, handle_errors
from qwq_local.server.following import Register
from qwq_local.server.guard import Access, Guard
from qwq_local.server.messages_wire import MessagesWriter
from qwq_local.server.metrics import Metrics
from qwq_local.server.responding import respond_streamed, respond_whole
from qwq_local.server.responses_wire import ResponsesWriter
from qwq_local.server.schema import (
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    Health,
    MessagesRequest,
    ModelEntry,
    ModelList,
    ResponsesRequest,
    Sampled,
    Steering,
)

MOST_BODY_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """model_name: what the model is called. reasoning: where thoughts go unless a request says.
    page: the folder of the chat page's conversations; None leaves the page out.
    """

    model_name: str
    access: Access
    reasoning: ReasoningForm = "separate"
    page: Path | None = None


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
    access = dataclasses.replace(settings.access, page=settings.page is not None)
    if settings.page is not None:
        from qwq_local.server.page.mount import mount_page
        from qwq_local.server.page.shelf import Shelf

        mount_page(app, room, Shelf(settings.page), model_name=settings.model_name, access=access)
    app.add_middleware(Guard, access=access)
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
        router.post("/v1/completions")(self.completions)
        router.post("/v1/messages")(self.messages)
        router.post("/v1/responses")(self.responses)
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
        heading = self._heading("chatcmpl-")
        asks = [question_of(body, choice=choice).ask for choice in range(body.n or 1)]
        form = self._form(body)
        following = self._register.follow(self._room, request, heading.id, user=body.user)
        if not body.stream:
            return await respond_whole(
                following,
                asks,
                lambda replies: completion(heading, replies, form).model_dump(exclude_none=True),
            )
        writer = ChatWriter(heading, form, with_usage=_with_usage(body))
        return await respond_streamed(following, asks, writer)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Go on from plain text."""
        self._unknown.note(body)
        asks = [continuation.ask for continuation in continuations_of(body)]
        heading = self._heading("cmpl-")
        following = self._register.follow(self._room, request, heading.id, user=body.user)
        if body.stream:
            writer = CompletionWriter(heading, n_choices=body.n or 1, with_usage=_with_usage(body))
            return await respond_streamed(following, asks, writer)
        return await respond_whole(
            following, asks, lambda replies: text_completion(heading, replies, body.n or 1)
        )

    async def messages(self, body: MessagesRequest, request: Request) -> Response:
        """The same in Anthropic's form."""
        self._unknown.note(body)
        asks = [question_of(messages_wire.chat_of(body)).ask]
        heading = self._heading("msg_")
        with_thinking = messages_wire.wants_thinking(body)
        following = self._register.follow(self._room, request, heading.id)
        if body.stream:
            writer = MessagesWriter(heading, with_thinking=with_thinking)
            return await respond_streamed(following, asks, writer)

        def whole(replies: Sequence[Reply]) -> dict[str, Any]:
            return messages_wire.message_of(heading, replies[0], with_thinking=with_thinking)

        return await respond_whole(following, asks, whole)

    async def responses(self, body: ResponsesRequest, request: Request) -> Response:
        """The same as OpenAI's responses."""
        self._unknown.note(body)
        chat = responses_wire.chat_of(body)
        asks = [question_of(chat).ask]
        heading = self._heading("resp_")
        with_reasoning = self._form(chat) != "hidden"
        following = self._register.follow(self._room, request, heading.id, user=body.user)
        if body.stream:
            writer = ResponsesWriter(heading, with_reasoning=with_reasoning)
            return await respond_streamed(following, asks, writer)

        def whole(replies: Sequence[Reply]) -> dict[str, Any]:
            return responses_wire.response_of(heading, replies[0], with_reasoning=with_reasoning)

        return await respond_whole(following, asks, whole)

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

    def _heading(self, prefix: str) -> Heading:
        name = self._settings.model_name
        return Heading(prefix + secrets.token_hex(12), int(time.time()), name)

    def _form(self, body: ChatRequest) -> ReasoningForm:
        excluded = body.reasoning is not None and body.reasoning.exclude
        return "hidden" if excluded or thinking_budget(body) == 0 else self._settings.reasoning


def _with_usage(body: Sampled) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage
