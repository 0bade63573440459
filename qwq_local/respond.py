"""From a prompt's ids to the events of its reply, with budgets, hints and all else on the way."""

import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass

from qwq_local.engine import Drafts, Engine, Intervention
from qwq_local.repetition import LoopDetector
from qwq_local.reply import (
    THOUGHT_CLOSE,
    Done,
    Event,
    Notice,
    ReplySplitter,
    StopFilter,
    Timings,
    TokenLogprob,
    Usage,
)
from qwq_local.rope import RopePlan, Yarn
from qwq_local.scored import ScoredId
from qwq_local.stream import Control
from qwq_local.turn import Limits, Turn

CLOSING = (
    "\n\nThe time is limited, so I must give the solution now, from what I have thought so far."
    "\n</think>\n\n"
)
HINT = "\n\nWait, the user adds: {}\n\n"


@dataclass(frozen=True, slots=True)
class Request:
    """A turn, ready for the engine. room: tokens for the reply. grammar: the answer's."""

    ids: list[int]
    room: int
    rope: Yarn | None
    stop_ids: Collection[int]
    grammar: str | None
    turn: Turn


def respond(engine: Engine, request: Request, control: Control) -> Generator[Event]:
    """Make the reply. Closing the generator cancels it."""
    reply = _LocalReply(engine, request, control)
    return reply.events()


class _LocalReply:
    """What is known of a reply while it is made."""

    def __init__(self, engine: Engine, request: Request, control: Control) -> None:
        turn = request.turn
        self._engine = engine
        self._request = request
        self._limits: Limits = turn.limits
        self._control = control
        self._splitter = ReplySplitter(
            opens_thought=True,
            tools=bool(turn.tools),
            call_prefix=turn.call_prefix,
        )
        self._stop = StopFilter(turn.limits.stop)
        self._detector = LoopDetector()
        self._loops = False
        self._grammar = request.grammar
        bounds = request.grammar, turn.limits.reasoning_tokens, turn.limits.reasoning_seconds
        self._is_bounded = any(bound is not None for bound in bounds)
        self._n_native = engine.rope_plan.native_length
        self._sequence = list(request.ids)
        self._drafts = Drafts()
        self._rope = request.rope
        self._n_sampled = 0
        self._n_reasoning = 0
        self._answers = False
        self._finish_reason = "length"
        self._started = self._first = self._last = 0.0

    def events(self) -> Generator[Event]:
        request = self._request
        self._started = self._first = self._last = time.perf_counter()
        n_cached = self._engine.n_cached(request.ids, rope=self._rope)
        if self._prefill():
            yield from self._generate()
        if self._finish_reason != "cancelled":
            yield from self._stop.feed(self._splitter.finish())
            yield from self._stop.finish()
            if self._finish_reason == "stop" and self._splitter.n_calls:
                self._finish_reason = "tool_calls"
        n_prompt = len(request.ids)
        yield Done(
            self._finish_reason,
            Usage(n_prompt, len(self._sequence) - n_prompt, self._n_reasoning),
            Timings(
                n_cached,
                n_prompt - n_cached,
                self._first - self._started,
                self._n_sampled,
                self._last - self._first,
                self._drafts.n_drafted,
                self._drafts.n_accepted,
            ),
            self._stop.found,
        )

    def _prefill(self) -> bool:
        """Read the sequence so far; False where it was cancelled."""
        on_progress = self._request.turn.on_progress
        for n_read in self._engine.prefill(self._sequence, rope=self._rope):
            if on_progress is not None:
                on_progress(n_read, len(self._sequence))
            if self._cancelled():
                return False
        return not self._cancelled()

    def _cancelled(self) -> bool:
        if self._control.cancelled.is_set():
            self._finish_reason = "cancelled"
            return True
        return False

    def _generate(self) -> Iterator[Event]:
        """Decode to the end, and leave the reason for it in _finish_reason."""
        request, turn = self._request, self._request.turn
        generation = self._engine.generate(
            request.ids,
            sampling=turn.sampling,
            seed=turn.seed,
            max_tokens=request.room,
            stop_ids=request.stop_ids,
            rope=self._rope,
            drafts=self._drafts,
        )
        change: Intervention | None = None
        try:
            while not self._cancelled():
                try:
                    token_id = generation.send(change)
                except StopIteration:
                    return
                self._note(token_id)
                if token_id in request.stop_ids:
                    change = yield from self._answer_anyway()
                    if change is None:
                        self._finish_reason = "stop"
                        return
                    continue
                piece = self._engine.token_bytes(token_id)
                if isinstance(token_id, ScoredId):
                    yield from self._tell(token_id, piece)
                self._loops = self._limits.break_loops and self._detector.add(token_id, piece)
                yield from self._feed(piece)
                if self._stop.stopped:
                    self._finish_reason = "stop"
                    return
                if self._loops and not self._splitter.in_thought:
                    self._finish_reason = "repetition"
                    yield Notice("repetition", "the answer repeated itself and was ended")
                    return
                change = (yield from self._intervene()) if self._may_intervene() else None
        finally:
            generation.close()

    def _tell(self, token_id: ScoredId, piece: bytes) -> Iterator[Event]:
        """How likely a token was, but for the newlines between thought and answer."""
        in_thought = self._splitter.in_thought
        self._answers = not in_thought and (self._answers or bool(piece.strip(b"\n")))
        if in_thought or self._answers:
            yield logprob_of(self._engine, token_id, piece, in_thought=in_thought)

    def _note(self, token_id: int) -> None:
        self._last = time.perf_counter()
        if self._n_sampled == 0:
            self._first = self._last
        self._n_sampled += 1
        self._sequence.append(token_id)
        self._n_reasoning += self._splitter.in_thought

    def _feed(self, piece: bytes) -> Iterator[Event]:
        """The events of a piece; whatever it ends, loops are looked for anew in what follows."""
        was_in_thought = self._splitter.in_thought
        yield from self._stop.feed(self._splitter.feed(piece))
        if was_in_thought and not self._splitter.in_thought:
            self._detector = LoopDetector()

    def _may_intervene(self) -> bool:
        """Whether there may be anything to change: the quick answer, at nearly every token no."""
        control = self._control
        is_asked = control.answer_now.is_set() or not control.hints.empty()
        is_long = len(self._sequence) >= self._n_native
        return self._loops or self._is_bounded or is_asked or is_long

    def _intervene(self) -> Generator[Event, None, Intervention | None]:
        """What is to change before the next token, if anything."""
        ids: list[int] = []
        rope = grammar = None
        if self._splitter.in_thought and not self._splitter.in_character:
            ids = yield from self._turn_thought()
        if self._grammar is not None and not self._splitter.in_thought:
            if not ids:  # the thought ended of itself
                ids = yield from self._force("\n\n")
            grammar, self._grammar = self._grammar, None
        plan = self._engine.rope_plan
        if self._rope is None and plan.rope_for(len(self._sequence) + 1) is not None:
            rope = self._rope = plan.yarn
            yield rope_notice(plan)
            self._prefill()
        return Intervention(tuple(ids), grammar, rope) if ids or grammar or rope else None

    def _answer_anyway(self) -> Generator[Event, None, Intervention | None]:
        """What follows a thought that ended the reply, where an answer of some form is due."""
        if self._grammar is None or not self._splitter.in_thought:
            return None
        ids = yield from self._force(f"\n{THOUGHT_CLOSE}\n\n")
        grammar, self._grammar = self._grammar, None
        return Intervention(tuple(ids), grammar) if ids else None

    def _turn_thought(self) -> Generator[Event, None, list[int]]:
        """Close the thought where that is due, or put a hint into it."""
        limits = self._limits
        elapsed_s = self._last - self._first
        if self._loops:
            yield Notice("repetition", "the thought repeated itself and was closed")
        elif limits.reasoning_tokens is not None and self._n_reasoning >= limits.reasoning_tokens:
            yield Notice("budget", f"the thought was closed after {self._n_reasoning:,} tokens")
        elif limits.reasoning_seconds is not None and elapsed_s >= limits.reasoning_seconds:
            yield Notice("budget", f"the thought was closed after {elapsed_s:.1f} s")
        elif not self._control.answer_now.is_set():
            if self._control.hints.empty():
                return []
            return (yield from self._force(HINT.format(self._control.hints.get())))
        return (yield from self._force(CLOSING))

    def _force(self, text: str) -> Generator[Event, None, list[int]]:
        """Go on as if the model had written a text; nothing where there is no room for it."""
        ids = self._engine.tokenize(text, parse_special=False)
        if len(self._sequence) + len(ids) >= len(self._request.ids) + self._request.room:
            return []
        self._sequence += ids
        self._n_reasoning += len(ids) if self._splitter.in_thought else 0
        yield from self._feed(text.encode())
        return ids


def logprob_of(
    engine: Engine, token_id: ScoredId, piece: bytes, *, in_thought: bool
) -> TokenLogprob:
    """What is told of an id, its bytes being `piece`."""
    top = tuple((engine.token_bytes(i), logprob) for i, logprob in token_id.top)
    return TokenLogprob(piece, token_id.logprob, top, in_thought)


def rope_notice(plan: RopePlan) -> Notice:
    """What to say when a conversation outgrows the native length."""
    assert plan.yarn is not None
    return Notice(
        "rope",
        f"more than {plan.native_length:,} tokens: YaRN with factor {plan.yarn.factor:g} from here "
        "on, and all is read once more",
    )
