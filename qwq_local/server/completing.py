"""Going on from plain text: /v1/completions, for programs that make their prompts themselves."""

import codecs
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwq_local import Answer, ContextError, Done, QwQ, Stream, Timings, Usage, UsageError
from qwq_local.engine import Engine, OnProgress
from qwq_local.reply import Event, Reply, StopFilter, TokenLogprob
from qwq_local.respond import logprob_of
from qwq_local.rope import Yarn
from qwq_local.sampling import choose_seed
from qwq_local.scored import ScoredId, score
from qwq_local.server.asking import refuse, sampling_of, seed_of, stops_of
from qwq_local.server.chat_wire import Heading, done_of, finish_reason_of, usage_of
from qwq_local.server.errors import ApiError
from qwq_local.server.schema import CompletionRequest
from qwq_local.stream import Control

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class Continuation:
    """What follows a text, after the text itself if echo. sampling: changes to the model's own.

    prompt: the text, or its ids.
    """

    prompt: str | Sequence[int]
    sampling: Mapping[str, Any]
    seed: int | None
    max_tokens: int
    stop: tuple[str, ...]
    echo: bool = False

    def ask(self, qwq: QwQ, on_progress: OnProgress) -> Stream:
        return Stream(lambda control: self._events(qwq, on_progress, control))

    def _events(self, qwq: QwQ, on_progress: OnProgress, control: Control) -> Generator[Event]:
        """Raises ContextError where the prompt leaves no room, QwqError where the engine fails.

        UsageError for an id that the model does not have.
        """
        engine, plan = qwq.engine, qwq.engine.rope_plan
        ids = self._ids(engine)
        n_free = plan.context_length - len(ids)
        room = min(self.max_tokens, n_free)
        if n_free < 1 or not ids:
            raise ContextError(
                f"prompt: {len(ids):,} tokens, and there must be 1 at least and a free one in a "
                f"context of {plan.context_length:,}; change it"
            )
        rope = plan.rope_for(len(ids) + room)
        started = time.perf_counter()
        if self.echo:
            yield from self._prompt_itself(engine, ids, rope)
        n_cached = engine.n_cached(ids, rope=rope)
        stop_ids = qwq.description.stop_ids
        finish_reason = "length"
        times: list[float] = []
        for n_read in engine.prefill(ids, rope=rope):
            on_progress(n_read, len(ids))
            if control.cancelled.is_set():
                break
        generation = engine.generate(
            ids,
            sampling=dataclasses.replace(qwq.sampling, **self.sampling),
            seed=choose_seed(self.seed),
            max_tokens=room,
            stop_ids=stop_ids,
            rope=rope,
        )
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        stop = StopFilter(self.stop)
        try:
            while not control.cancelled.is_set():
                token_id = next(generation, None)
                if token_id is None:
                    break
                times.append(time.perf_counter())
                if token_id in stop_ids:
                    finish_reason = "stop"
                    break
                piece = engine.token_bytes(token_id)
                if isinstance(token_id, ScoredId):
                    yield logprob_of(engine, token_id, piece, in_thought=False)
                text = decoder.decode(piece)
                yield from stop.feed([Answer(text)] if text else [])
                if stop.stopped:
                    finish_reason = "stop"
                    break
        finally:
            generation.close()
        rest = decoder.decode(b"", final=True)
        yield from stop.feed([Answer(rest)] if rest else [])
        yield from stop.finish()
        first, last = (times[0], times[-1]) if times else (started, started)
        yield Done(
            "cancelled" if control.cancelled.is_set() else finish_reason,
            Usage(len(ids), len(times), 0),
            Timings(n_cached, len(ids) - n_cached, first - started, len(times), last - first),
        )

    def _ids(self, engine: Engine) -> list[int]:
        if isinstance(self.prompt, str):
            return engine.tokenize(self.prompt, parse_special=True)
        highest = max(self.prompt)
        if highest >= engine.vocab_size:
            raise UsageError(
                f"prompt: there is no id {highest}, for the model has {engine.vocab_size:,}; "
                "choose those below"
            )
        return list(self.prompt)

    def _prompt_itself(self, engine: Engine, ids: list[int], rope: Yarn | None) -> Iterator[Event]:
        """With how likely each id was after those before it, where logprobs are asked for."""
        n_top = self.sampling["top_logprobs"]
        if n_top is not None:
            yield TokenLogprob(engine.token_bytes(ids[0]), math.nan, (), in_thought=False)
            rows = (row for rows in engine.logits(ids, rope=rope) for row in rows)
            for token_id, row in zip(ids[1:], rows, strict=False):
                scored = score(token_id, row, n_top)
                piece = engine.token_bytes(token_id)
                yield logprob_of(engine, scored, piece, in_thought=False)
        if isinstance(self.prompt, str):
            yield Answer(self.prompt)
        else:
            yield Answer(_text(b"".join(map(engine.token_bytes, ids))))


def continuations_of(body: CompletionRequest) -> list[Continuation]:
    """One for each choice of each prompt. Raises ApiError, UsageError."""
    refuse({"suffix": body.suffix})
    return [
        Continuation(
            prompt,
            sampling_of(body, body.logprobs),
            seed_of(body, choice),
            DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            stops_of(body),
            bool(body.echo),
        )
        for prompt in _prompts(body.prompt)
        for choice in range(body.n or 1)
    ]


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Iterator[str | list[int]]:
    """One or several, each a text or its ids."""
    if isinstance(prompt, str):
        yield prompt
        return
    ids = [part for part in prompt if isinstance(part, int)]
    if ids:
        yield ids
    else:
        yield from (part for part in prompt if not isinstance(part, int))


def text_completion(heading: Heading, replies: Sequence[Reply], n_choices: int) -> dict[str, Any]:
    """The whole answer to a request, n_choices for each of its prompts."""
    choices = [
        _choice(index, reply.answer, finish_reason_of(reply.finish_reason), reply.logprobs)
        for index, reply in enumerate(replies)
    ]
    usage = usage_of([done_of(reply) for reply in replies], n_choices)
    return _document(heading, choices) | {"usage": usage.model_dump()}


class CompletionWriter:
    """Writes replies as the chunks of plain completions."""

    def __init__(self, heading: Heading, *, n_choices: int, with_usage: bool) -> None:
        self._heading = heading
        self._n_choices = n_choices
        self._with_usage = with_usage
        self._index = -1
        self._dones: list[Done] = []
        self._logprobs: list[TokenLogprob] = []
        self._n_chars = 0

    def begin(self) -> str:
        self._index += 1
        self._n_chars = 0
        return ""

    def write(self, event: Event) -> str:
        return "".join(_sse(_document(self._heading, [choice])) for choice in self._choices(event))

    def end(self) -> str:
        usage = ""
        if self._with_usage:
            counts = usage_of(self._dones, self._n_choices).model_dump()
            usage = _sse(_document(self._heading, []) | {"usage": counts})
        return usage + "data: [DONE]\n\n"

    def fail(self, error: ApiError) -> str:
        return _sse(error.body)

    def _choices(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case TokenLogprob():
                self._logprobs.append(event)
            case Answer(text):
                yield self._choice(text, None)
            case Done():
                self._dones.append(event)
                yield self._choice("", finish_reason_of(event.finish_reason))

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        logprobs, self._logprobs = self._logprobs, []
        choice = _choice(self._index, text, finish_reason, logprobs, self._n_chars)
        self._n_chars += sum(len(_text(one.token)) for one in logprobs)
        return choice


def _choice(
    index: int,
    text: str,
    finish_reason: str | None,
    logprobs: Sequence[TokenLogprob],
    offset: int = 0,
) -> dict[str, Any]:
    """offset: characters of the tokens before these."""
    tokens = [_text(one.token) for one in logprobs]
    lengths = itertools.accumulate(map(len, tokens[:-1]), initial=offset)
    told = {
        "tokens": tokens,
        "token_logprobs": [None if math.isnan(one.logprob) else one.logprob for one in logprobs],
        "top_logprobs": [{_text(token): value for token, value in one.top} for one in logprobs],
        "text_offset": list(lengths),
    }
    logprob_fields = told if logprobs else None
    return {
        "index": index,
        "text": text,
        "logprobs": logprob_fields,
        "finish_reason": finish_reason,
    }


def _text(token: bytes) -> str:
    return token.decode(errors="replace")


def _document(heading: Heading, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": heading.id,
        "object": "text_completion",
        "created": heading.created,
        "model": heading.model,
        "choices": choices,
    }


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
