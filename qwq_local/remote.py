"""A model on an OpenAI-compatible server: the same turns in, the same events out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from convert.errors import EngineError, UsageError
from qwq_local.messages import Message, answer_start
from qwq_local.repetition import LoopDetector
from qwq_local.reply import (
    THOUGHT_CLOSE,
    THOUGHT_OPEN,
    UNFINISHED_THOUGHT,
    Answer,
    Done,
    Event,
    Notice,
    Reasoning,
    ReplySplitter,
    StopFilter,
    Timings,
    ToolCall,
    Usage,
)
from qwq_local.sampling import Sampling
from qwq_local.saved import Cached
from qwq_local.sse import Server
from qwq_local.stream import Control
from qwq_local.tools import CALL_CLOSE, CALL_OPEN, parse_call
from qwq_local.turn import Turn, sampling_notices

_REASONING_FIELDS = ("reasoning_content", "reasoning")
_FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}


class RemoteModel:
    """Replies to turns through POST /chat/completions.

    url: the server's base, as in http://localhost:8000/v1; a #NAME at its end names the model, else
    it is the first that the server lists. The key comes from the environment: QWQ_API_KEY, or
    DASHSCOPE_API_KEY for hosts of aliyuncs.com. Raises UsageError for an address that is none,
    EngineError where the server cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.path: Path | str = url
        base, name = urldefrag(url)
        host = urlsplit(base).hostname
        if not host:
            raise UsageError(f"{url}: names no server; give one as in http://localhost:8000/v1")
        key = os.environ.get("QWQ_API_KEY")
        if host.endswith(".aliyuncs.com"):
            key = os.environ.get("DASHSCOPE_API_KEY", key)
        self._server = Server(base.rstrip("/"), key)
        self.sampling = Sampling()
        self.name = name or self._first_model()

    def reply(self, turn: Turn, control: Control) -> Generator[Event]:
        """Stream the reply to a turn."""
        if turn.limits.reasoning_seconds is not None:
            yield Notice("unsupported", "the server takes no budget in seconds; it is left out")
        yield from sampling_notices(turn.sampling)
        yield from _RemoteReply(self._server, self._body(turn), turn, control).events()

    def fits(self, _turn: Turn) -> bool:
        """The server alone can tell, and does with an error."""
        return True

    def warm(self, _turn: Turn, _role: str) -> None:
        """The server's own business."""

    def bound_to(self) -> dict[str, str]:
        """By what this model is told from others, for sessions that are saved."""
        return {"model": self.name}

    def export_cache(self, _turn: Turn, _role: str) -> tuple[Cached, bytes]:
        """The kv_cache is the server's."""
        raise UsageError(f"{self._server.url}: a server keeps its kv_cache; save without it")

    def import_cache(self, _turn: Turn, _role: str, _cached: Cached, _state: bytes) -> None:
        """The kv_cache is the server's."""
        raise UsageError(f"{self._server.url}: a server keeps its kv_cache; load without it")

    def wait_until_warm(self) -> None:
        """The server's own business."""

    def close(self) -> None:
        """No connection outlives its reply."""

    def _first_model(self) -> str:
        listed = self._server.get("/models")
        models = listed.get("data") if isinstance(listed, dict) else None
        if not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise UsageError(
                f"{self._server.url}: lists no model; name one after the address, as in "
                f"{self._server.url}#qwq-32b"
            )
        return str(models[0]["id"])

    def _body(self, turn: Turn) -> dict[str, Any]:
        sampling, limits = turn.sampling, turn.limits
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [_wire_message(message) for message in turn.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": turn.seed,
        }
        if sampling.min_p != 0:
            body["min_p"] = sampling.min_p
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        if sampling.presence_penalty != 0:
            body["presence_penalty"] = sampling.presence_penalty
        if sampling.frequency_penalty != 0:
            body["frequency_penalty"] = sampling.frequency_penalty
        if sampling.logit_bias:
            body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias}
        if turn.tools:
            body["tools"] = list(turn.tools)
        if limits.max_tokens is not None:
            body["max_tokens"] = limits.max_tokens
        if limits.reasoning_tokens is not None:
            body["thinking_budget"] = limits.reasoning_tokens
        if isinstance(limits.answer_format, str):
            raise UsageError(
                "answer_format: a server takes a JSON schema and no GBNF grammar; give a schema"
            )
        if limits.answer_format is not None:
            schema = {"name": "answer", "schema": dict(limits.answer_format)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


class _RemoteReply:
    """What is known of a reply while it is received."""

    def __init__(
        self, server: Server, body: Mapping[str, Any], turn: Turn, control: Control
    ) -> None:
        self._server = server
        self._body = body
        self._turn = turn
        self._control = control
        self._splitter = _splitter(opens_thought=False)
        answers_at_once = turn.limits.reasoning_tokens == 0 or turn.limits.answer_format is not None
        self._held: str | None = None if answers_at_once else ""  # content that may be a thought
        self._n_held = 0  # pieces of it
        self._splits = False  # whether the server itself tells thoughts from answers
        self._stop = StopFilter(turn.limits.stop)
        self._detector = LoopDetector()
        self._calls: dict[int, dict[str, str]] = {}
        self._usage: Mapping[str, Any] = {}
        self._finish_reason = "length"
        self._n_pieces = self._n_reasoning = 0
        self._id = ""
        self._answers = self._hurried = False

    def events(self) -> Iterator[Event]:
        started = first = last = time.perf_counter()
        chunks = self._server.events("/chat/completions", self._body, self._control)
        try:
            for chunk in chunks:
                last = time.perf_counter()
                first = last if self._n_pieces == 0 else first
                if isinstance(chunk.get("usage"), dict):
                    self._usage = chunk["usage"]
                self._id = str(chunk.get("id") or self._id)
                for choice in chunk.get("choices") or ():
                    yield from self._take(choice)
                if not self._answers:
                    yield from self._pass_on()
                if self._stop.stopped or self._finish_reason == "repetition":
                    break
        finally:
            chunks.close()  # type: ignore[attr-defined]
        if self._control.cancelled.is_set():
            self._finish_reason = "cancelled"
        yield from self._release(in_thought=self._finish_reason not in ("stop", "tool_calls"))
        if self._finish_reason != "cancelled":
            yield from self._stop.feed(self._splitter.finish())
            yield from self._stop.finish()
            yield from self._whole_calls()
            if self._splits and not self._answers and not self._calls:
                yield UNFINISHED_THOUGHT
        timings = self._timed(started, first, last)
        yield Done(self._finish_reason, self._counted(), timings, self._stop.found)

    def _take(self, choice: Mapping[str, Any]) -> Iterator[Event]:
        delta = choice.get("delta") or {}
        thought = next((delta[name] for name in _REASONING_FIELDS if delta.get(name)), "")
        text = delta.get("content") or ""
        if thought:
            self._splits = True
            yield from self._release(in_thought=False)
            self._n_reasoning += 1
            yield Reasoning(thought)
        if text:
            yield from self._take_text(text)
        for call in delta.get("tool_calls") or ():
            self._add_to_call(call)
        if thought or text:
            self._n_pieces += 1
            yield from self._watch(thought + text)
        if (reason := choice.get("finish_reason")) is not None:
            self._finish_reason = _FINISH_REASONS.get(reason, "stop")
        if self._stop.stopped:
            self._finish_reason = "stop"

    def _take_text(self, text: str) -> Iterator[Event]:
        """Content: the answer, or with no reasoning before it a thought that the server left in.

        The prompt opened that thought, so that `</think>` alone tells, or the end of the reply.
        """
        if self._held is None:
            self._n_reasoning += self._splitter.in_thought
            yield from self._stop.feed(self._splitter.feed(text.encode()))
            self._answers = self._answers or not self._splitter.in_thought
            return
        n_known = len(self._held)
        self._held += text
        self._n_held += 1
        closes = self._held.find(THOUGHT_CLOSE, max(0, n_known - len(THOUGHT_CLOSE))) >= 0
        if closes or self._held[: 4 * len(THOUGHT_OPEN)].lstrip().startswith(THOUGHT_OPEN):
            yield from self._release(in_thought=True)

    def _release(self, *, in_thought: bool) -> Iterator[Event]:
        """What was held back, as the thought or the answer that it has turned out to be."""
        held, self._held = self._held, None
        if not held:
            return
        if in_thought:
            self._n_reasoning += self._n_held
            self._splitter = _splitter(opens_thought=True)
        yield from self._stop.feed(self._splitter.feed(held.lstrip().encode()))
        self._answers = not self._splitter.in_thought

    def _pass_on(self) -> Iterator[Event]:
        """Hand on what was asked of the thought, as our own server takes it."""
        wishes: list[tuple[str, dict[str, str]]] = []
        if self._control.answer_now.is_set() and not self._hurried:
            self._hurried = True
            wishes.append(("answer-now", {}))
        while not self._control.hints.empty():
            wishes.append(("steer", {"hint": self._control.hints.get()}))
        for what, body in wishes:
            try:
                self._server.post(f"/chat/completions/{self._id}/{what}", body)
            except (EngineError, UsageError):
                yield Notice("unsupported", f"the server takes no {what}; the thought goes on")

    def _watch(self, piece: str) -> Iterator[Event]:
        token = hash(piece) & 0x7FFF_FFFF
        if self._detector.add(token, piece.encode()) and self._turn.limits.break_loops:
            self._finish_reason = "repetition"
            yield Notice("repetition", "the reply repeated itself and was ended")

    def _add_to_call(self, delta: Mapping[str, Any]) -> None:
        call = self._calls.setdefault(
            int(delta.get("index", 0)), {"id": "", "name": "", "arguments": ""}
        )
        function = delta.get("function") or {}
        call["id"] = call["id"] or delta.get("id") or ""
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def _whole_calls(self) -> Iterator[Event]:
        for index, call in sorted(self._calls.items()):
            text = json.dumps({"name": call["name"]})[:-1]
            parsed = parse_call(f'{text}, "arguments": {call["arguments"] or "{}"}}}')
            if parsed is None:
                yield Answer(f"{CALL_OPEN}\n{call['name']} {call['arguments']}\n{CALL_CLOSE}")
                yield Notice("broken_tool_call", "a tool call is not JSON; it is given as text")
                continue
            yield ToolCall(call["id"] or f"{self._turn.call_prefix}{index}", *parsed)
            self._finish_reason = "tool_calls"

    def _counted(self) -> Usage:
        """The server's counts; where it gives none, the pieces that it sent."""
        details = self._usage.get("completion_tokens_details") or {}
        return Usage(
            self._usage.get("prompt_tokens") or 0,
            self._usage.get("completion_tokens") or self._n_pieces,
            details.get("reasoning_tokens") or self._n_reasoning,
        )

    def _timed(self, started: float, first: float, last: float) -> Timings:
        usage = self._counted()
        details = self._usage.get("prompt_tokens_details") or {}
        n_cached = details.get("cached_tokens") or 0
        return Timings(
            n_cached,
            usage.prompt_tokens - n_cached,
            first - started,
            usage.completion_tokens,
            last - first,
        )


def _splitter(*, opens_thought: bool) -> ReplySplitter:
    """Calls come apart from the text."""
    return ReplySplitter(opens_thought=opens_thought, tools=False, call_prefix="")


def _wire_message(message: Message) -> dict[str, Any]:
    """As OpenAI's format has it: no thoughts, and arguments as text."""
    wire = {key: value for key, value in message.items() if key != "reasoning_content"}
    if message["role"] == "assistant":
        wire["content"] = message["content"][answer_start(message) :].lstrip("\n")
    if calls := message.get("tool_calls"):
        wire["tool_calls"] = [
            call
            | {
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                }
            }
            for call in calls
        ]
    return wire
