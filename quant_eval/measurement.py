"""One file measured, part by part: each passage's scores, each reply; what is known is kept."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from convert.errors import QwqError
from quant_eval.benchmarks import grade
from quant_eval.divergence import TokenScores, score_passage, scored_rows
from quant_eval.kept import Kept
from quant_eval.manifest import digest
from quant_eval.results import Attempt, to_json
from quant_eval.suite import Exam, Progress, check_model, problem_name
from quant_eval.tasks import Problem
from quant_eval.tasks.problem import user_turn
from qwq_local import QwQ, Reply
from qwq_local.reply import collect


@dataclass(frozen=True, slots=True)
class Measured:
    """All that is known of one file, or of a server's model: then without a path and scores.

    scores: by the digest of the passage. attempts: replies to problems. questions: replies that
    nobody grades. elapsed_s: of the measuring, in however many runs. kinds: of the passages.
    """

    name: str
    path: Path | None
    sha256: str
    scores: Mapping[str, TokenScores]
    attempts: tuple[Attempt, ...]
    questions: tuple[Attempt, ...]
    elapsed_s: float
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """What ran it: files of one engine share the noise of its path."""
        if self.path is None:
            return "server"
        return "transformers" if self.path.is_dir() else "llama.cpp"


def measure_file(
    path: Path, exam: Exam, kept: Kept, *, sha256: str, threads: int | None, on_progress: Progress
) -> Measured:
    """Measure what is not kept yet; the file is loaded only for that.

    sha256: the file's or folder's, which the caller knows.
    Raises QwqError where the file cannot be loaded or does not belong to the reference.
    """
    with ExitStack() as stack:

        @cache
        def opened() -> QwQ:
            qwq = stack.enter_context(
                QwQ.open(path, context=exam.context, threads=threads, isolated=path.is_file())
            )
            _check_vocabulary(qwq, exam)
            check_model(qwq)
            return qwq

        known = Known(kept, f"{exam.conditions} {sha256}")
        scores, elapsed_s = _score(path, opened, exam, known, threads, on_progress)
        attempts = solve(path.name, opened, exam, known, on_progress)
        questions = _reply_to_questions(opened, exam, known)
    elapsed_s += sum(attempt.elapsed_s for attempt in (*attempts, *questions))
    kinds = dict(zip(exam.tokens.names, exam.tokens.kinds, strict=True))
    return Measured(path.name, path, sha256, scores, attempts, questions, elapsed_s, kinds)


def measure_server(
    url: str, exam: Exam, kept: Kept, *, at_once: int, on_progress: Progress
) -> Measured:
    """Ask the problems of a server, several at once, each whose reply is not kept yet.

    Replies are kept under its address and its model's name, for its weights cannot be known.
    Raises UsageError for an address that is none, EngineError where the server fails.
    """
    with QwQ.open(url) as qwq:
        sha256 = digest([url, qwq.name])
        known = Known(kept, f"{exam.conditions} {sha256}")
        name = f"{qwq.name} at {urlsplit(url).netloc}"
        attempts = solve(name, lambda: qwq, exam, known, on_progress, at_once=at_once)
        questions = _reply_to_questions(lambda: qwq, exam, known)
    elapsed_s = sum(attempt.elapsed_s for attempt in (*attempts, *questions))
    return Measured(name, None, sha256, {}, attempts, questions, elapsed_s)


class Known:
    """The parts of one file under one set of conditions."""

    def __init__(self, kept: Kept, conditions: str) -> None:
        self._kept = kept
        self._conditions = conditions

    def has(self, *name: object) -> bool:
        """Whether the part is kept."""
        return self._kept.get(self._key(name)) is not None

    def part(self, *name: object, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part as JSON, made where it is not kept."""
        key = self._key(name)
        value = self._kept.get(key)
        if value is None:
            value = make()
            self._kept.put(key, value)
        return value

    def attempt(
        self, problem: Problem, seed: int, max_tokens: int, *, make: Callable[[], Attempt]
    ) -> Attempt:
        """One reply."""
        name = _reply_name(problem, seed, max_tokens)
        data = self.part(*name, make=lambda: to_json(make()))
        absent = {"correct": None, "tokens_per_s": None}
        return Attempt(**{**absent, **data, "notices": tuple(data["notices"])})

    def has_attempt(self, problem: Problem, seed: int, max_tokens: int) -> bool:
        """Whether the reply is kept."""
        return self.has(*_reply_name(problem, seed, max_tokens))

    def _key(self, name: Sequence[object]) -> str:
        return digest([self._conditions, *name])


def _reply_name(problem: Problem, seed: int, max_tokens: int) -> tuple[str, str, int, int]:
    return "reply", problem_name(problem), seed, max_tokens


def _score(
    path: Path,
    opened: Callable[[], QwQ],
    exam: Exam,
    known: Known,
    threads: int | None,
    on_progress: Progress,
) -> tuple[dict[str, TokenScores], float]:
    """Scores of all passages by name, and the seconds that they took."""
    scores = {}
    elapsed_s = 0.0
    passages = exam.tokens.passages
    indices = {name: index for index, name in enumerate(exam.tokens.names)}
    reference = exam.reference.logits(
        [
            (index, *scored_rows(passages[index]))
            for name, index in indices.items()
            if not known.has("passage", name)
        ]
    )
    for name, index in indices.items():

        def make(index: int = index) -> dict[str, Any]:
            qwq, passage = opened(), passages[index]
            started = time.perf_counter()
            first, stop = scored_rows(passage)
            theirs = qwq.engine.logits(passage.ids[:stop], first=first)
            part = score_passage(passage, next(reference), theirs, threads=threads)
            elapsed_s = round(time.perf_counter() - started, 3)
            on_progress(f"{path.name}: divergence, passages", index + 1, len(passages))
            return {"scores": _scores_to_json(part), "elapsed_s": elapsed_s}

        part = known.part("passage", name, make=make)
        scores[name] = _scores_from_json(part["scores"])
        elapsed_s += part["elapsed_s"]
    return scores, elapsed_s


def _scores_to_json(scores: TokenScores) -> dict[str, Any]:
    """Six digits of each number are kept."""
    data: dict[str, Any] = {"first_position": scores.first_position}
    for each in fields(scores):
        value = getattr(scores, each.name)
        if isinstance(value, np.ndarray):
            is_mask = value.dtype == np.bool_
            data[each.name] = [int(x) if is_mask else float(f"{x:.6g}") for x in value]
    return data


def _scores_from_json(data: Mapping[str, Any]) -> TokenScores:
    return TokenScores(
        kl_nats=np.array(data["kl_nats"], dtype=np.float64),
        nll_nats=np.array(data["nll_nats"], dtype=np.float64),
        reference_nll_nats=np.array(data["reference_nll_nats"], dtype=np.float64),
        same_top=np.array(data["same_top"], dtype=np.bool_),
        is_answer=np.array(data["is_answer"], dtype=np.bool_) if "is_answer" in data else None,
        first_position=data["first_position"],
    )


def solve(
    name: str,
    opened: Callable[[], QwQ],
    exam: Exam,
    known: Known,
    on_progress: Progress,
    *,
    at_once: int = 1,
) -> tuple[Attempt, ...]:
    """Ask the problems in turn, all once before any twice, until the time is up.

    Time that kept replies took counts, so a second run asks no more than the first. at_once: how
    many replies a server makes at a time; then the time is the clock's.
    """
    settings, problems = exam.settings, exam.problems
    first_seed = settings.seed if settings.reply_seed is None else settings.reply_seed
    n_replies = settings.n_replies * len(problems)
    asked = [(problems[index % len(problems)], first_seed + index) for index in range(n_replies)]
    title = f"{name}: tasks, replies"
    if at_once > 1:
        return _solve_at_once(title, opened, asked, exam, known, on_progress, at_once)
    attempts: list[Attempt] = []
    elapsed_s = 0.0
    for index, (problem, seed) in enumerate(asked):
        if elapsed_s > settings.task_seconds:
            break

        def make(index: int = index, problem: Problem = problem, seed: int = seed) -> Attempt:
            attempt = _graded(problem, _ask(opened, problem, seed, exam))
            on_progress(title, index + 1, n_replies)
            return attempt

        attempts.append(known.attempt(problem, seed, settings.max_tokens, make=make))
        elapsed_s += attempts[-1].elapsed_s
    return tuple(attempts)


def _solve_at_once(
    title: str,
    opened: Callable[[], QwQ],
    asked: Sequence[tuple[Problem, int]],
    exam: Exam,
    known: Known,
    on_progress: Progress,
    at_once: int,
) -> tuple[Attempt, ...]:
    """Replies are made in threads; graded and kept here, each as soon as it is whole."""
    max_tokens = exam.settings.max_tokens
    end_s = time.perf_counter() + exam.settings.task_seconds

    def ask(problem: Problem, seed: int) -> _Asked | None:
        if time.perf_counter() > end_s:
            return None
        return _ask(opened, problem, seed, exam, at_once=at_once)

    late: set[int] = set()
    with ThreadPoolExecutor(at_once) as pool:
        running = {
            pool.submit(ask, problem, seed): index
            for index, (problem, seed) in enumerate(asked)
            if not known.has_attempt(problem, seed, max_tokens)
        }
        n_kept = len(asked) - len(running)
        try:
            for n_done, future in enumerate(as_completed(running), start=1):
                problem, seed = asked[running[future]]
                reply = future.result()
                if reply is None:
                    late.add(running[future])
                    continue
                known.attempt(problem, seed, max_tokens, make=partial(_graded, problem, reply))
                on_progress(title, n_kept + n_done, len(asked))
        finally:
            pool.shutdown(cancel_futures=True)
    return tuple(
        known.attempt(problem, seed, max_tokens, make=_never)
        for index, (problem, seed) in enumerate(asked)
        if index not in late
    )


def _never() -> Attempt:
    raise AssertionError("it was kept")


def _reply_to_questions(opened: Callable[[], QwQ], exam: Exam, known: Known) -> tuple[Attempt, ...]:
    seed, max_tokens = exam.settings.seed, exam.settings.max_tokens

    def make(question: Problem) -> Attempt:
        return _ask(opened, question, seed, exam).attempt

    return tuple(
        known.attempt(question, seed, max_tokens, make=partial(make, question))
        for question in map(_question, exam.questions)
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """A reply that is not graded yet, as text and as it came."""

    attempt: Attempt
    answer: str
    calls: tuple[Mapping[str, Any], ...]


def _graded(problem: Problem, asked: _Asked) -> Attempt:
    """In the main thread, where mathematics can be compared."""
    return replace(asked.attempt, correct=grade(problem, asked.answer, asked.calls))


def _ask(
    opened: Callable[[], QwQ], problem: Problem, seed: int, exam: Exam, *, at_once: int = 1
) -> _Asked:
    """One reply, sampled with the model's own defaults or, of a server, the checkpoint's."""
    qwq = opened()
    started = time.perf_counter()
    reply = collect(
        qwq.reply(
            problem.messages,
            tools=problem.tools,
            sampling=exam.sampling,
            seed=seed,
            max_tokens=exam.settings.max_tokens,
        )
    )
    attempt = Attempt(
        problem=problem_name(problem),
        kind=problem.kind,
        question=problem.messages[-1]["content"],
        correct=None,
        reasoning=reply.reasoning,
        answer=_whole_answer(reply),
        finish_reason=reply.finish_reason,
        notices=tuple(notice.kind for notice in reply.notices),
        thought_tokens=reply.usage.reasoning_tokens,
        elapsed_s=round(time.perf_counter() - started, 3),
        first_token_s=round(reply.timings.prefill_s, 4),
        tokens_per_s=reply.timings.tokens_per_s,
        seed=seed,
        at_once=at_once,
    )
    calls = ({"name": call.name, "arguments": call.arguments} for call in reply.tool_calls)
    return _Asked(attempt, reply.answer, tuple(calls))


def _whole_answer(reply: Reply) -> str:
    """The answer as text, calls included."""
    calls = (f"{call.name}({call.arguments})" for call in reply.tool_calls)
    return "\n".join(part for part in (reply.answer, *calls) if part)


def _question(text: str) -> Problem:
    return Problem("question", text, user_turn(text), reasoning="", answer="", expected="")


def _check_vocabulary(qwq: QwQ, exam: Exam) -> None:
    engine, vocab_size = qwq.engine, exam.reference.checkpoint.model.vocab_size
    if engine.vocab_size != vocab_size:
        raise QwqError(
            f"{qwq.path}: has a vocabulary of {engine.vocab_size:,} tokens, the reference one of "
            f"{vocab_size:,}; give the checkpoint it was made from as --reference"
        )
    ids = list(exam.tokens.passages[0].ids)
    if engine.tokenize(exam.tokens.opening, parse_special=True) != ids:
        raise QwqError(
            f"{qwq.path}: its tokenizer gives other ids than the reference's; "
            "give the checkpoint it was made from as --reference"
        )
