"""A conversation that remembers."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, get_args

from convert.errors import UsageError
from qwq_local.engine import OnProgress
from qwq_local.functions import Function, as_text, call_function, describe_function
from qwq_local.messages import Message, normalise
from qwq_local.reply import Answer, Done, Event, Notice, Reasoning, Reply, ToolCall
from qwq_local.sampling import MAX_SEED, Sampling, choose_seed
from qwq_local.saved import Cached, Saved, read_saved, write_saved
from qwq_local.stream import AsyncStream, Control, Stream
from qwq_local.turn import Limits, Turn

if TYPE_CHECKING:
    from qwq_local.local import LocalModel
    from qwq_local.remote import RemoteModel

Tool = Mapping[str, Any] | Function
Overflow = Literal["error", "drop_oldest"]


class SendOptions(TypedDict, total=False):
    """How one reply is made; what is left out is without limit.

    max_tokens: longest reply, thought included. reasoning_tokens, reasoning_seconds: what the
    thought may take before it is closed and answered, the seconds from its first token. stop: texts
    that end the answer. answer_format: a JSON schema or a GBNF grammar for the answer alone.
    on_progress: told how much of a long prompt is read, in tokens.
    """

    max_tokens: int | None
    reasoning_tokens: int | None
    reasoning_seconds: float | None
    stop: str | Sequence[str]
    answer_format: Mapping[str, Any] | str | None
    on_progress: OnProgress | None


class Session:
    """Messages so far, and what each further reply is made with.

    It makes one reply at a time, and may be used from several threads. A turn whose reply was
    cancelled, failed or not read to its end leaves no trace in the messages. Thoughts are kept
    beside the answers as `reasoning_content`; the template leaves those of earlier turns out.
    """

    def __init__(
        self,
        model: LocalModel | RemoteModel,
        *,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        overflow: Overflow = "error",
    ) -> None:
        if overflow not in get_args(Overflow):
            raise UsageError(
                f"overflow: {overflow!r} is unknown; use one of {', '.join(get_args(Overflow))}"
            )
        self._model = model
        self._functions = {tool.__name__: tool for tool in tools if callable(tool)}
        self._tools = tuple(describe_function(tool) if callable(tool) else tool for tool in tools)
        self._sampling = model.sampling if sampling is None else sampling
        self._seed = choose_seed(seed)
        self._overflow = overflow
        self._lock = threading.Lock()
        self._current: Control | None = None  # of the reply that is being made
        self._messages: list[Message] = []
        self._n_dropped = 0  # messages after the system prompt that are shown no more
        self._yarn = False
        if system is not None:
            self._messages.append({"role": "system", "content": system})

    @property
    def messages(self) -> list[Message]:
        """A copy of the conversation, in OpenAI's form."""
        return copy.deepcopy(self._messages)

    def send(self, text: str | None = None, **options: Unpack[SendOptions]) -> Stream:
        """Stream the reply to a text; without one, to the results of the tools it called.

        Raises UsageError for options that cannot be. What else goes wrong is raised when the
        stream is read: UsageError while another reply of this session is being made, ContextError
        where the conversation is too long, EngineError where the engine's process died.
        """
        stop = options.get("stop", ())
        limits = Limits(
            max_tokens=options.get("max_tokens"),
            reasoning_tokens=options.get("reasoning_tokens"),
            reasoning_seconds=options.get("reasoning_seconds"),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            answer_format=options.get("answer_format"),
        )
        on_progress = options.get("on_progress")
        return Stream(lambda control: self._reply(text, limits, on_progress, control))

    def ask(self, text: str | None = None, **options: Unpack[SendOptions]) -> Reply:
        """Like send, with the whole reply at once."""
        return self.send(text, **options).reply()

    def asend(self, text: str | None = None, **options: Unpack[SendOptions]) -> AsyncStream:
        """Like send, for `async for`."""
        return AsyncStream(self.send(text, **options))

    async def aask(self, text: str | None = None, **options: Unpack[SendOptions]) -> Reply:
        """Like ask, for `await`."""
        return await self.asend(text, **options).reply()

    def run(self, text: str, *, max_calls: int = 16, **options: Unpack[SendOptions]) -> Reply:
        """Ask, calling the session's Python functions for the model until it answers.

        max_calls: how many calls are made at most. A call of a tool that there is not is answered
        so. Raises UsageError where a tool is described and no function, or where the model calls
        more often; what a function raises goes through.
        """
        reply = self.ask(text, **options)
        n_left = max_calls
        while reply.tool_calls:
            n_left -= len(reply.tool_calls)
            if n_left < 0:
                raise UsageError(
                    f"run: the model made more than {max_calls} calls; raise max_calls, or ask for "
                    "less"
                )
            for call in reply.tool_calls:
                self.tool_result(call.id, self._call(call))
            reply = self.ask(**options)
        return reply

    def _call(self, call: ToolCall) -> object:
        function = self._functions.get(call.name)
        if function is not None:
            return call_function(function, call.arguments)
        if any(tool.get("function", tool).get("name") == call.name for tool in self._tools):
            raise UsageError(
                f"run: {call.name!r} is described here and is no function; give it as one, or "
                "answer the call with tool_result"
            )
        return {"error": f"there is no tool {call.name!r}"}

    def tool_result(self, call_id: str, result: object) -> None:
        """Add what a tool returned; anything but a string is given as JSON.

        Raises UsageError where no call of that id waits for a result.
        """
        content = as_text(result)
        with self._lock:
            self._check_idle()
            if call_id not in self._open_calls():
                raise UsageError(
                    f"tool_result: no call {call_id!r} waits for a result; check the id"
                )
            self._messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def take_back(self) -> str | None:
        """Remove the last question and all that followed; the question, None where there is none.

        A further reply to it is another one, since the seed goes on by one. Raises UsageError
        during a reply.
        """
        with self._lock:
            self._check_idle()
            asked = [i for i, m in enumerate(self._messages) if m["role"] == "user"]
            if not asked:
                return None
            question: str = self._messages[asked[-1]]["content"]
            self._messages = self._messages[: asked[-1]]
            self._seed = (self._seed + 1) % (MAX_SEED + 1)
            return question

    def save(self, path: str | Path, *, cache: bool = False, force: bool = False) -> None:
        """Write the conversation to a file, whole or not at all.

        cache: also the kv_cache, with which the next turn needs no prefill; it takes the memory of
        the tokens so far. Raises OutputExistsError unless force, UsageError during a reply.
        """
        with self._lock:
            self._check_idle()
        cached, state = None, b""
        if cache and self._messages:
            cached, state = self._model.export_cache(self._next_turn(), self._next_role())
        fields = {
            "messages": self._messages,
            "tools": self._tools,
            "sampling": dataclasses.asdict(self._sampling),
            "seed": self._seed,
            "overflow": self._overflow,
            "n_dropped": self._n_dropped,
            "yarn": self._yarn,
            "cached": None if cached is None else dataclasses.asdict(cached),
        }
        write_saved(Path(path), Saved(fields, self._model.bound_to(), state), force=force)

    @classmethod
    def load(
        cls,
        model: LocalModel | RemoteModel,
        path: Path,
        *,
        tools: Sequence[Tool] = (),
        cache: bool = True,
    ) -> Self:
        """What QwQ.load_session does."""
        saved = read_saved(path, model.bound_to())
        fields = saved.fields
        session = cls(
            model,
            tools=tools or fields["tools"],
            sampling=Sampling(**fields["sampling"]),
            seed=fields["seed"],
            overflow=fields["overflow"],
        )
        session._messages = fields["messages"]
        session._n_dropped, session._yarn = fields["n_dropped"], fields["yarn"]
        if saved.state and cache:
            turn, role = session._next_turn(), session._next_role()
            cached = Cached.from_fields(fields["cached"])
            model.import_cache(turn, role, cached, saved.state)
        return session

    def _next_turn(self) -> Turn:
        """What the next reply begins from, as far as it is known."""
        messages = normalise(self._messages)
        n_system = int(messages[0]["role"] == "system")
        shown = [*messages[:n_system], *messages[n_system + self._n_dropped :]]
        return Turn(shown, self._sampling, self._seed, tools=self._tools, yarn=self._yarn)

    def _next_role(self) -> str:
        return "tool" if self._open_calls() else "user"

    def _reply(
        self, text: str | None, limits: Limits, on_progress: OnProgress | None, control: Control
    ) -> Generator[Event]:
        with self._lock:
            self._check_idle()
            self._current = control
        try:
            messages = [*self._messages]
            if text is not None:
                messages.append({"role": "user", "content": text})
            elif not messages or messages[-1]["role"] != "tool":
                raise UsageError(
                    "send: there is no text and no tool result to reply to; give a text"
                )
            turn = Turn(
                normalise(messages),
                sampling=self._sampling,
                seed=(self._seed + len(messages)) % (MAX_SEED + 1),  # its own, and always the same
                tools=self._tools,
                limits=limits,
                call_prefix=f"call_{len(messages)}_",
                yarn=self._yarn,
                on_progress=on_progress,
            )
            turn, n_dropped = self._fitted(turn)
            if n_dropped > self._n_dropped:
                yield Notice("dropped", f"the {n_dropped} oldest messages are left out from now on")
            yield from self._take(turn, messages, n_dropped, control)
        finally:
            with self._lock:
                if self._current is control:
                    self._current = None

    def _take(
        self, turn: Turn, messages: list[Message], n_dropped: int, control: Control
    ) -> Iterator[Event]:
        """Stream the reply, and remember it once it is whole."""
        events: list[Event] = []
        for event in self._model.reply(turn, control):
            events.append(event)
            if not isinstance(event, Done):
                yield event
        done = events[-1]
        assert isinstance(done, Done), "a stream of events ends with Done"
        if done.finish_reason != "cancelled":
            reply = _message(events)
            with self._lock:
                self._messages = [*messages, reply]
                self._n_dropped = n_dropped
                self._yarn |= any(isinstance(e, Notice) and e.kind == "rope" for e in events)
            self._model.warm(self._next_turn(), self._next_role())
        yield done

    def _fitted(self, turn: Turn) -> tuple[Turn, int]:
        """The turn without as many of the oldest as must go, and how many messages these are."""
        messages, n_dropped = turn.messages, self._n_dropped
        n_system = int(messages[0]["role"] == "system")
        while True:
            shown = [*messages[:n_system], *messages[n_system + n_dropped :]]
            turn = dataclasses.replace(turn, messages=shown)
            if self._overflow == "error" or self._model.fits(turn):
                return turn, n_dropped
            later = [i for i, m in enumerate(shown) if m["role"] == "user" and i > n_system]
            if not later:
                return turn, n_dropped
            n_dropped += later[0] - n_system

    def _check_idle(self) -> None:
        if self._current is not None and not self._current.cancelled.is_set():
            raise UsageError(
                "session: a reply is being made; read it to its end, or cancel() it first"
            )

    def _open_calls(self) -> set[str]:
        calls = {call["id"] for m in self._messages for call in m.get("tool_calls", ())}
        return calls - {m.get("tool_call_id") for m in self._messages if m["role"] == "tool"}


def _message(events: Sequence[Event]) -> Message:
    """The assistant's message that a reply's events make."""
    message: Message = {
        "role": "assistant",
        "content": "".join(event.text for event in events if isinstance(event, Answer)),
        "reasoning_content": "".join(e.text for e in events if isinstance(e, Reasoning)),
    }
    calls = [
        {
            "id": event.id,
            "type": "function",
            "function": {"name": event.name, "arguments": event.arguments},
        }
        for event in events
        if isinstance(event, ToolCall)
    ]
    return message | ({"tool_calls": calls} if calls else {})
