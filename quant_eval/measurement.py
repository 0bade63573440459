"""One file measured, part by part: each passage's scores, each reply; what is known is kept."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import QwqError
from quant_eval.behaviour import summarize_behaviour
from quant_eval.divergence import (
    TokenScores,
    rows_between,
    score_passage,
    scored_rows,
    summarize,
    tail,
)
from quant_eval.kept import Kept
from quant_eval.layers import LayerErrors
from quant_eval.manifest import digest
from quant_eval.paired import MIN_CLUSTERS, Sample, paired_difference
from quant_eval.results import (
    UNQUANTIZED_BITS,
    Accuracy,
    Attempt,
    Example,
    FileResult,
    Flip,
    Speed,
    TaskLoss,
    to_json,
)
from quant_eval.sizes import model_size
from quant_eval.suite import QUESTIONS, Exam, Progress, check_model, problem_name
from quant_eval.tasks import Problem, grade
from quant_eval.tasks.problem import user_turn
from qwq_local import QwQ, Reply
from qwq_local.reply import collect

MAX_FLIPS = 3  # shown of a file


@dataclass(frozen=True, slots=True)
class Measured:
    """All that is known of one file.

    scores: by the digest of the passage. attempts: replies to problems. questions: replies that
    nobody grades. elapsed_s: of the measuring, in however many runs.
    """

    path: Path
    sha256: str
    scores: Mapping[str, TokenScores]
    attempts: tuple[Attempt, ...]
    questions: tuple[Attempt, ...]
    elapsed_s: float


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
            qwq = stack.enter_context(QwQ.open(path, context=exam.context, threads=threads))
            _check_vocabulary(qwq, exam)
            check_model(qwq)
            return qwq

        known = Known(kept, f"{exam.conditions} {sha256}")
        scores, elapsed_s = _score(path, opened, exam, known, on_progress)
        attempts = solve(path, opened, exam, known, on_progress)
        questions = _reply_to_questions(opened, exam, known)
    elapsed_s += sum(attempt.elapsed_s for attempt in (*attempts, *questions))
    return Measured(path, sha256, scores, attempts, questions, elapsed_s)


class Known:
    """The parts of one file under one set of conditions."""

    def __init__(self, kept: Kept, conditions: str) -> None:
        self._kept = kept
        self._conditions = conditions

    def part(self, *name: object, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part as JSON, made where it is not kept."""
        key = digest([self._conditions, *name])
        value = self._kept.get(key)
        if value is None:
            value = make()
            self._kept.put(key, value)
        return value

    def attempt(
        self, problem: Problem, seed: int, max_tokens: int, *, make: Callable[[], Attempt]
    ) -> Attempt:
        """One reply."""
        data = self.part(
            "reply",
            problem_name(problem),
            seed,
            max_tokens,
            make=lambda: to_json(make()),
        )
        absent = {"correct": None, "tokens_per_s": None}
        return Attempt(**{**absent, **data, "notices": tuple(data["notices"])})


def _score(
    path: Path, opened: Callable[[], QwQ], exam: Exam, known: Known, on_progress: Progress
) -> tuple[dict[str, TokenScores], float]:
    """Scores of all passages by name, and the seconds that they took."""
    scores = {}
    elapsed_s = 0.0
    names = exam.tokens.names
    for index, name in enumerate(names):

        def make(index: int = index) -> dict[str, Any]:
            part = _score_one(opened(), exam, index)
            on_progress(f"{path.name}: divergence, passages", index + 1, len(names))
            return part

        part = known.part("passage", name, make=make)
        scores[name] = _scores_from_json(part["scores"])
        elapsed_s += part["elapsed_s"]
    return scores, elapsed_s


def _score_one(qwq: QwQ, exam: Exam, index: int) -> dict[str, Any]:
    started = time.perf_counter()
    passage = exam.tokens.passages[index]
    start, stop = scored_rows(passage)
    scores = score_passage(
        passage,
        exam.reference.logits(index, start, stop),
        rows_between(qwq.engine.logits(passage.ids), start, stop),
    )
    elapsed_s = round(time.perf_counter() - started, 3)
    return {"scores": _scores_to_json(scores), "elapsed_s": elapsed_s}


def _scores_to_json(scores: TokenScores) -> dict[str, Any]:
    """Six digits of each number are kept."""
    data: dict[str, Any] = {"first_position": scores.first_position}
    for field in fields(scores):
        value = getattr(scores, field.name)
        if isinstance(value, np.ndarray):
            is_mask = value.dtype == np.bool_
            data[field.name] = [int(x) if is_mask else float(f"{x:.6g}") for x in value]
    return data


def _scores_from_json(data: Mapping[str, Any]) -> TokenScores:
    return TokenScores(
        kl_nats=np.array(data["kl_nats"], dtype=np.float64),
        nll_nats=np.array(data["nll_nats"], dtype=np.float64),
        reference_nll_nats=np.array(data["reference_nll_nats"], dtype=np.float64),
        same_top=np.array(data["same_top"], dtype=np.bool_),
        is_answer=np.array(data["is_answer"], dtype=np.bool_),
        first_position=data["first_position"],
    )


def solve(
    path: Path, opened: Callable[[], QwQ], exam: Exam, known: Known, on_progress: Progress
) -> tuple[Attempt, ...]:
    """Ask the problems in turn, all once before any twice, until the time is up.

    Time that kept replies took counts, so a second run asks no more than the first.
    """
    settings, problems = exam.settings, exam.problems
    first_seed = settings.seed if settings.reply_seed is None else settings.reply_seed
    n_replies = settings.n_replies * len(problems)
    attempts: list[Attempt] = []
    elapsed_s = 0.0
    for index in range(n_replies):
        if elapsed_s > settings.task_seconds:
            break
        problem, seed = problems[index % len(problems)], first_seed + index

        def make(index: int = index, problem: Problem = problem, seed: int = seed) -> Attempt:
            attempt = _ask(opened, problem, seed, settings.max_tokens, graded=True)
            on_progress(f"{path.name}: tasks, replies", index + 1, n_replies)
            return attempt

        attempts.append(known.attempt(problem, seed, settings.max_tokens, make=make))
        elapsed_s += attempts[-1].elapsed_s
    return tuple(attempts)


def _reply_to_questions(opened: Callable[[], QwQ], exam: Exam, known: Known) -> tuple[Attempt, ...]:
    seed, max_tokens = exam.settings.seed, exam.settings.max_tokens
    return tuple(
        known.attempt(
            question,
            seed,
            max_tokens,
            make=partial(_ask, opened, question, seed, max_tokens, graded=False),
        )
        for question in map(_question, QUESTIONS)
    )


def _ask(
    opened: Callable[[], QwQ], problem: Problem, seed: int, max_tokens: int, *, graded: bool
) -> Attempt:
    """One reply, sampled with the model's own defaults."""
    qwq = opened()
    started = time.perf_counter()
    reply = collect(
        qwq.reply(problem.messages, tools=problem.tools, seed=seed, max_tokens=max_tokens)
    )
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    return Attempt(
        problem=problem_name(problem),
        kind=problem.kind,
        question=problem.messages[-1]["content"],
        correct=grade(problem, reply.answer, calls) if graded else None,
        reasoning=reply.reasoning,
        answer=_whole_answer(reply),
        finish_reason=reply.finish_reason,
        notices=tuple(notice.kind for notice in reply.notices),
        thought_tokens=reply.usage.reasoning_tokens,
        elapsed_s=round(time.perf_counter() - started, 3),
        first_token_s=round(reply.timings.prefill_s, 4),
        tokens_per_s=reply.timings.tokens_per_s,
    )


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


def file_result(
    measured: Measured, floor: Measured | None = None, layers: LayerErrors | None = None
) -> FileResult:
    """The report's row of a file. floor: the 16-bit file that its replies are held against."""
    size = model_size(measured.path)
    return FileResult(
        name=measured.path.name,
        sha256=measured.sha256,
        nbytes=size.nbytes,
        bits_per_weight=size.bits_per_weight,
        engine="transformers" if measured.path.is_dir() else "llama.cpp",
        divergence=summarize(list(measured.scores.values())),
        accuracy=_accuracy(measured.attempts),
        behaviour=summarize_behaviour(measured.attempts),
        speed=_speed((*measured.attempts, *measured.questions)),
        examples=tuple(
            Example(one.question, one.reasoning, one.answer, one.finish_reason)
            for one in measured.questions
        ),
        elapsed_s=round(measured.elapsed_s, 1),
        task_loss=None if floor is None else _task_loss(floor, measured),
        flips=() if floor is None else tuple(_flips(floor, measured))[:MAX_FLIPS],
        kl_tail=tail(list(measured.scores.values())),
        layers=layers,
    )


def find_floor(measured: Sequence[Measured]) -> Measured | None:
    """The first file whose weights are not quantized: it differs by the path's own noise."""
    whole = (one for one in measured if model_size(one.path).bits_per_weight >= UNQUANTIZED_BITS)
    return next(whole, None)


def _task_loss(floor: Measured, measured: Measured) -> TaskLoss | None:
    before, after = (
        Sample.of((attempt.problem, bool(attempt.correct)) for attempt in one.attempts)
        for one in (floor, measured)
    )
    difference = paired_difference(before, after, of_shares=True)
    if difference is None or difference.n < MIN_CLUSTERS or floor is measured:
        return None
    low, high = difference.interval(0.95)
    return TaskLoss(difference.value, low, high, difference.n)


def _flips(floor: Measured, measured: Measured) -> Iterator[Flip]:
    solved = {one.problem: one for one in floor.attempts if one.correct}
    for attempt in measured.attempts:
        reference = solved.get(attempt.problem)
        if reference is not None and not attempt.correct and floor is not measured:
            yield Flip(
                attempt.question,
                reference.reasoning,
                reference.answer,
                attempt.reasoning,
                attempt.answer,
            )


def _accuracy(attempts: Sequence[Attempt]) -> dict[str, Accuracy]:
    n = Counter(one.kind for one in attempts)
    n_correct = Counter(one.kind for one in attempts if one.correct)
    n_cut = Counter(one.kind for one in attempts if one.finish_reason == "length")
    return {kind: Accuracy(n[kind], n_correct[kind], n_cut[kind]) for kind in n}


def _speed(attempts: Sequence[Attempt]) -> Speed | None:
    speeds = [one.tokens_per_s for one in attempts if one.tokens_per_s is not None]
    return Speed(statistics.median(speeds), len(speeds)) if speeds else None
