"""From the bytes of tokens to the events of a reply: reasoning, answer, tool calls, the end."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwq_local.tools import CALL_CLOSE, CALL_OPEN, parse_call

THOUGHT_OPEN = "<think>"
THOUGHT_CLOSE = "</think>"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thought."""

    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call; its result goes back under the same id."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token of the reply was, in nats, and which ones were likeliest; where
    Sampling.top_logprobs asks for it. in_thought: whether it is part of the thought.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    in_thought: bool


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the reader of a reply should know; kind is for programs, text for people."""

    kind: str
    text: str


UNFINISHED_THOUGHT = Notice("unfinished_thought", "the reply ended inside its thought")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. A reply counts its stop token, and its thought the tag that ends it."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went: prompt ids found in the kv_cache and read anew, then tokens made.

    n_drafted ids were proposed and read in batches while they were made, n_accepted of them came.
    """

    n_cached: int
    n_prefilled: int
    prefill_s: float  # until the first token is there
    n_decoded: int
    decode_s: float  # from the first token to the last
    n_drafted: int = 0
    n_accepted: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of decoding, None where there is nothing to measure it by."""
        if self.n_decoded < 2 or self.decode_s <= 0:
            return None
        return (self.n_decoded - 1) / self.decode_s


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a reply.

    finish_reason: "stop", "length" (of the context or of max_tokens), "tool_calls", "repetition"
    (the answer went round in circles) or "cancelled". stop_text: of those that were asked for, the
    one that ended the reply; "" where none did.
    """

    finish_reason: str
    usage: Usage
    timings: Timings
    stop_text: str = ""


Event = Reasoning | Answer | ToolCall | TokenLogprob | Notice | Done


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    reasoning: str
    answer: str
    tool_calls: tuple[ToolCall, ...]
    notices: tuple[Notice, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_text: str = ""


def collect(events: Iterable[Event]) -> Reply:
    """Read a stream of events to its end."""
    reasoning: list[str] = []
    answer: list[str] = []
    calls: list[ToolCall] = []
    notices: list[Notice] = []
    logprobs: list[TokenLogprob] = []
    done = None
    for event in events:
        match event:
            case Reasoning(text):
                reasoning.append(text)
            case Answer(text):
                answer.append(text)
            case ToolCall():
                calls.append(event)
            case Notice():
                notices.append(event)
            case TokenLogprob():
                logprobs.append(event)
            case Done():
                done = event
    assert done is not None, "a stream of events ends with Done"
    return Reply(
        "".join(reasoning),
        "".join(answer),
        tuple(calls),
        tuple(notices),
        done.finish_reason,
        done.usage,
        done.timings,
        tuple(logprobs),
        done.stop_text,
    )


class ReplySplitter:
    """Turns the bytes of a reply, cut anywhere, into events as early as they are certain.

    The inverse of how a reply is rendered: reasoning, "\\n</think>\\n\\n", answer, each call as
    "\\n<tool_call>\\n{...}\\n</tool_call>". Held back is only what may yet be a tag, and a call.

    opens_thought: the prompt ends in "<think>\\n". Where it does not, a reply that starts with the
        tag has a thought all the same.
    tools: whether calls are looked for; without tools on offer their tags are text.
    call_prefix: call ids are this and a number.
    """

    def __init__(self, *, opens_thought: bool, tools: bool, call_prefix: str) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._state: Callable[..., Iterator[Event]] = self._at_start
        self._opens_thought = opens_thought
        self._tools = tools
        self._call_prefix = call_prefix
        self._held = ""
        self._newlines_to_drop: float = 0
        self._before_call = ""
        self.n_calls = 0
        self.in_thought = opens_thought

    @property
    def in_character(self) -> bool:
        """Whether the last piece ended in the middle of a character."""
        return bool(self._decoder.getstate()[0])

    def feed(self, piece: bytes) -> Iterator[Event]:
        """Events that this piece makes certain."""
        return self._advance(self._decoder.decode(piece), final=False)

    def finish(self) -> Iterator[Event]:
        """What was held back, and what is to be said of a reply that ends here."""
        yield from self._advance(self._decoder.decode(b"", final=True), final=True)
        if self.in_thought:
            yield UNFINISHED_THOUGHT

    def _advance(self, text: str, *, final: bool) -> Iterator[Event]:
        self._held += text
        state = None
        while state != self._state:
            state = self._state
            if self._newlines_to_drop and not self._drop_newlines():
                return
            yield from state(final=final)

    def _drop_newlines(self) -> bool:
        """Drop newlines that belong to a tag; False while more may come."""
        rest = self._held.lstrip("\n")
        n_dropped = min(len(self._held) - len(rest), self._newlines_to_drop)
        self._held = self._held[int(n_dropped) :]
        self._newlines_to_drop -= n_dropped
        if self._held:
            self._newlines_to_drop = 0
        return bool(self._held)

    def _enter(self, state: Callable[..., Iterator[Event]], *, drop_newlines: float = 0) -> None:
        self._state = state
        self.in_thought = state == self._in_reasoning
        self._newlines_to_drop = drop_newlines

    def _at_start(self, *, final: bool) -> Iterator[Event]:
        """Find out whether the reply opens its thought itself."""
        if not self._opens_thought:
            self._held = self._held.lstrip("\n")
        if self._held.startswith(THOUGHT_OPEN):
            self._held = self._held.removeprefix(THOUGHT_OPEN)
            self._enter(self._in_reasoning, drop_newlines=1)
        elif final or not THOUGHT_OPEN.startswith(self._held):
            self._enter(self._in_reasoning if self._opens_thought else self._in_answer)
        yield from ()

    def _in_reasoning(self, *, final: bool) -> Iterator[Event]:
        text, tag, rest = self._held.partition(THOUGHT_CLOSE)
        if tag:
            self._held = rest
            self._enter(self._in_answer, drop_newlines=float("inf"))
            text = text.removesuffix("\n")
        elif not final:
            text = self._release(THOUGHT_CLOSE)
        else:
            self._held = ""
        if text:
            yield Reasoning(text)

    def _in_answer(self, *, final: bool) -> Iterator[Event]:
        text, tag, rest = self._held.partition(CALL_OPEN) if self._tools else (self._held, "", "")
        if tag:
            self._held = rest
            self._before_call = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
            self._enter(self._in_call)
        elif not final and self._tools:
            text = self._release(CALL_OPEN)
        else:
            self._held = ""
        if text:
            yield Answer(text)

    def _in_call(self, *, final: bool) -> Iterator[Event]:
        body, tag, rest = self._held.partition(CALL_CLOSE)
        if not tag and not final:
            return
        self._held = rest
        call = parse_call(body)
        if call is not None:
            name, arguments = call
            yield ToolCall(f"{self._call_prefix}{self.n_calls}", name, arguments)
            self.n_calls += 1
            self._enter(self._in_answer, drop_newlines=1)
            return
        self._enter(self._in_answer)
        yield Answer(f"{self._before_call}{CALL_OPEN}{body}{tag}")
        yield Notice("broken_tool_call", "a tool call is not valid JSON; it is given as text")

    def _release(self, tag: str) -> str:
        """Take what cannot belong to the tag, nor be the one newline before it, out of the hold."""
        if tag[0] not in self._held and self._held[-1:] != "\n":
            cut = len(self._held)
        else:
            n_held = max(_overlap(self._held, tag), _overlap(self._held, "\n" + tag))
            cut = len(self._held) - n_held
        text, self._held = self._held[:cut], self._held[cut:]
        return text


class StopFilter:
    """Ends the answer where one of the stop texts begins; holds back what may yet be one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop text, which is `found`, has ended the answer."""
        return bool(self.found)

    def feed(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events before a stop text, as early as they are certain."""
        return self._filter(events) if self._stops else iter(events)

    def _filter(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            if self.stopped:
                return
            if isinstance(event, Answer):
                yield from self._feed_text(event.text)
            else:
                yield from self.finish()
                yield event

    def finish(self) -> Iterator[Event]:
        """What was held back."""
        if self._held:
            yield Answer(self._held)
        self._held = ""

    def _feed_text(self, text: str) -> Iterator[Event]:
        text = self._held + text
        starts = {stop: start for stop in self._stops if (start := text.find(stop)) >= 0}
        if starts:
            self.found = min(starts, key=starts.__getitem__)
            cut, self._held = starts[self.found], ""
        else:
            cut = len(text) - max(_overlap(text, stop) for stop in self._stops)
            self._held = text[cut:]
        if text[:cut]:
            yield Answer(text[:cut])


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that is a beginning of the tag."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
