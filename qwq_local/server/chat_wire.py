"""From the events of replies to OpenAI's chat completions, in chunks and whole."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwq_local import Answer, Done, Notice, Reasoning, ToolCall, UsageError
from qwq_local.reply import Event, Reply, TokenLogprob
from qwq_local.server.errors import ApiError
from qwq_local.server.schema import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChoiceLogprobs,
    ChunkChoice,
    CompletionDetails,
    Delta,
    FinishReason,
    FunctionCall,
    LikelyToken,
    PromptDetails,
    TokenInfo,
    ToolCallOut,
    WireNotice,
    WireTimings,
    WireUsage,
)

ReasoningForm = Literal["separate", "both", "inline", "hidden"]
"""Where a thought goes: into `reasoning_content`, into `reasoning` too, into the content, nowhere.
"""
_FORMS: dict[tuple[str, str], ReasoningForm] = {
    ("separate", "reasoning_content"): "separate",
    ("separate", "both"): "both",
    ("inline", "reasoning_content"): "inline",
}
_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "tool_calls": "tool_calls",
    "length": "length",
    "repetition": "length",  # cut short, as far as a client can tell
    "cancelled": "stop",
}


def reasoning_form(reasoning: str, field: str) -> ReasoningForm:
    """What --reasoning and --reasoning-field mean together. Raises UsageError for all else."""
    form = _FORMS.get((reasoning, field))
    if form is None:
        choices = " or ".join(f"{r} with {f}" for r, f in _FORMS)
        raise UsageError(f"reasoning: {reasoning!r} with field {field!r} is unknown; use {choices}")
    return form


@dataclass(frozen=True, slots=True)
class Heading:
    """What all chunks of a completion have in common. created: seconds since 1970."""

    id: str
    created: int
    model: str


class ChatWriter:
    """Writes the replies to a request as chunks, a choice for each.

    with_usage: whether a last chunk without choices says what all of them took.
    """

    def __init__(self, heading: Heading, form: ReasoningForm, *, with_usage: bool) -> None:
        self._heading = heading
        self._form = form
        self._with_usage = with_usage
        self._index = -1
        self._n_calls = 0
        self._in_thought = False
        self._notices: list[WireNotice] = []
        self._dones: list[Done] = []
        self._logprobs: list[TokenLogprob] = []

    def begin(self) -> str:
        self._index += 1
        self._n_calls = 0
        self._notices = []
        self._logprobs = []
        return _sse(self._chunk(Delta(role="assistant", content="")))

    def write(self, event: Event) -> str:
        return "".join(map(_sse, self._chunks(event)))

    def end(self) -> str:
        usage = _sse(self._usage_chunk()) if self._with_usage else ""
        return usage + "data: [DONE]\n\n"

    def fail(self, error: ApiError) -> str:
        return f"data: {json.dumps(error.body)}\n\n"

    def _chunks(self, event: Event) -> Iterator[ChatChunk]:
        match event:
            case Reasoning(text):
                if self._form != "hidden":
                    yield self._chunk(self._thought(text))
                self._in_thought = True
            case Answer(text):
                yield self._chunk(Delta(content=self._leave_thought() + text))
            case ToolCall():
                calls = [self._call(event)]
                yield self._chunk(Delta(content=self._leave_thought(), tool_calls=calls))
            case TokenLogprob():
                self._logprobs.append(event)
            case Notice(kind, text):
                self._notices.append(WireNotice(kind=kind, text=text))
            case Done():
                self._dones.append(event)
                yield self._end_chunk(event)

    def _end_chunk(self, done: Done) -> ChatChunk:
        chunk = self._chunk(Delta(content=self._leave_thought()), _FINISH[done.finish_reason])
        chunk.timings = timings_of(done)
        if self._notices:
            chunk.notices = self._notices
        return chunk

    def _thought(self, text: str) -> Delta:
        if self._form == "inline":
            return Delta(content=text if self._in_thought else f"<think>\n{text}")
        if self._form == "both":
            return Delta(content=None, reasoning_content=text, reasoning=text)
        return Delta(content=None, reasoning_content=text)

    def _leave_thought(self) -> str:
        """What ends a thought within the content."""
        was_inside, self._in_thought = self._in_thought, False
        return "\n</think>\n\n" if was_inside and self._form == "inline" else ""

    def _call(self, call: ToolCall) -> ToolCallOut:
        self._n_calls += 1
        return wire_call(call, index=self._n_calls - 1)

    def _chunk(self, delta: Delta, finish_reason: FinishReason | None = None) -> ChatChunk:
        told, self._logprobs = logprobs_of(self._logprobs, self._form), []
        choice = ChunkChoice(
            index=self._index, delta=delta, logprobs=told, finish_reason=finish_reason
        )
        heading = self._heading
        return ChatChunk(
            id=heading.id, created=heading.created, model=heading.model, choices=[choice]
        )

    def _usage_chunk(self) -> ChatChunk:
        heading = self._heading
        usage = usage_of(self._dones, len(self._dones))
        return ChatChunk(
            id=heading.id, created=heading.created, model=heading.model, choices=[], usage=usage
        )


def completion(heading: Heading, replies: Sequence[Reply], form: ReasoningForm) -> ChatCompletion:
    """The whole answer to a request, a choice for each reply."""
    dones = [done_of(reply) for reply in replies]
    return ChatCompletion(
        id=heading.id,
        created=heading.created,
        model=heading.model,
        choices=[
            ChatChoice(
                index=index,
                message=_message(reply, form),
                logprobs=logprobs_of(reply.logprobs, form),
                finish_reason=_FINISH[reply.finish_reason],
            )
            for index, reply in enumerate(replies)
        ],
        usage=usage_of(dones, len(dones)),
        timings=timings_of(dones[-1]),
        notices=[WireNotice(kind=n.kind, text=n.text) for reply in replies for n in reply.notices],
    )


def logprobs_of(logprobs: Sequence[TokenLogprob], form: ReasoningForm) -> ChoiceLogprobs | None:
    """Those of the content's tokens, to which thoughts belong where they are inline."""
    content = [
        TokenInfo(
            **_likely(one.token, one.logprob).model_dump(),
            top_logprobs=[_likely(token, logprob) for token, logprob in one.top],
        )
        for one in logprobs
        if form == "inline" or not one.in_thought
    ]
    return ChoiceLogprobs(content=content) if content else None


def _likely(token: bytes, logprob: float) -> LikelyToken:
    text = token.decode(errors="replace")
    return LikelyToken(token=text, logprob=logprob, bytes=list(token))


def finish_reason_of(reason: str) -> FinishReason:
    """The runtime's reason in OpenAI's words."""
    return _FINISH[reason]


def done_of(reply: Reply) -> Done:
    """The event that a whole reply ended with."""
    return Done(reply.finish_reason, reply.usage, reply.timings, reply.stop_text)


def usage_of(dones: Sequence[Done], n_choices: int) -> WireUsage:
    """A prompt counts once, however many choices it got, which follow each other."""
    n_prompt = sum(done.usage.prompt_tokens for done in dones[::n_choices])
    n_cached = sum(done.timings.n_cached for done in dones[::n_choices])
    n_reply = sum(done.usage.completion_tokens for done in dones)
    n_reasoning = sum(done.usage.reasoning_tokens for done in dones)
    return WireUsage(
        prompt_tokens=n_prompt,
        completion_tokens=n_reply,
        total_tokens=n_prompt + n_reply,
        prompt_tokens_details=PromptDetails(cached_tokens=n_cached),
        completion_tokens_details=CompletionDetails(reasoning_tokens=n_reasoning),
    )


def timings_of(done: Done) -> WireTimings:
    timings = done.timings
    return WireTimings(
        n_cached=timings.n_cached,
        n_prefilled=timings.n_prefilled,
        prefill_s=timings.prefill_s,
        n_decoded=timings.n_decoded,
        decode_s=timings.decode_s,
        tokens_per_s=timings.tokens_per_s,
    )


def wire_call(call: ToolCall, *, index: int | None = None) -> ToolCallOut:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = FunctionCall(name=call.name, arguments=arguments)
    if index is None:
        return ToolCallOut(id=call.id, type="function", function=function)
    return ToolCallOut(index=index, id=call.id, type="function", function=function)


def _message(reply: Reply, form: ReasoningForm) -> Delta:
    content, fields = reply.answer, dict[str, Any]()
    if form == "inline" and reply.reasoning:
        content = f"<think>\n{reply.reasoning}\n</think>\n\n{content}"
    elif form in ("separate", "both"):
        fields["reasoning_content"] = reply.reasoning
    if form == "both":
        fields["reasoning"] = reply.reasoning
    if reply.tool_calls:
        fields["tool_calls"] = [wire_call(call) for call in reply.tool_calls]
    return Delta(role="assistant", content=content, **fields)


def _sse(chunk: ChatChunk) -> str:
    data = chunk.model_dump(exclude_none=True)
    for choice in data["choices"]:
        choice.setdefault("finish_reason", None)
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
