"""One file measured: divergence from the reference, accuracy on tasks, speed, some replies."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.calibration import (
    Conversation,
    TokenizedConversation,
    load_conversations,
    load_tokenizer,
    set_digest,
    tokenize_conversation,
)
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from quant_eval.divergence import (
    TokenScores,
    rows_between,
    score_passage,
    scored_rows,
    summarize,
)
from quant_eval.manifest import digest
from quant_eval.reference import Reference, final_hidden_states
from quant_eval.results import Accuracy, EvaluationSettings, Example, FileResult, Speed
from quant_eval.sizes import model_size
from quant_eval.tasks import TASKS, Problem, grade, held_out
from qwq_local import QwQ, Reply, Sampling
from qwq_local.reply import collect

EVALUATION_TEXT = Path(__file__).parent / "data" / "evaluation.jsonl"
QUESTIONS = (
    "Which is larger, 9.9 or 9.11?",
    'How many r\'s are in the word "strawberry"?',
)
PROMPT_TOKENS = 1024  # room for the longest prompt of a task or question
CHECK_TOKENS = 16
CHECK_CONTEXT = PROMPT_TOKENS + CHECK_TOKENS
LARGE_MODEL_WEIGHTS = 1_000_000_000

Progress = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""


@dataclass(frozen=True, slots=True)
class Exam:
    """What every file of a report is given, and the reference to hold it against.

    opening: the first passage as text, by which another tokenizer is told.
    """

    passages: tuple[TokenizedConversation, ...]
    opening: str
    reference: Reference
    problems: tuple[Problem, ...]
    settings: EvaluationSettings

    @property
    def context(self) -> int:
        """Tokens that the engine must hold at a time."""
        longest = max(len(passage.ids) for passage in self.passages)
        return max(longest, PROMPT_TOKENS + self.settings.max_tokens)


def default_settings(n_weights: int) -> EvaluationSettings:
    """How much to measure: in full for a small model, for a large one what a user will wait for.

    A large model's accuracy is left out: its thoughts take minutes each.
    """
    if n_weights < LARGE_MODEL_WEIGHTS:
        return EvaluationSettings()
    return EvaluationSettings(n_tokens=2048, n_problems=0, max_tokens=256)


def read_evaluation_text(path: Path | None) -> tuple[list[Conversation], str]:
    """The conversations to score, the built-in ones where no path is given, and their digest.

    They come with the kinds taking turns, so that the first of them are of all kinds.
    """
    conversations = load_conversations(path or EVALUATION_TEXT)
    n_of_kind: dict[str, int] = {}
    turns = []
    for conversation in conversations:
        turns.append(n_of_kind.get(conversation.kind, 0))
        n_of_kind[conversation.kind] = turns[-1] + 1
    order = sorted(range(len(conversations)), key=turns.__getitem__)
    return [conversations[i] for i in order], set_digest(conversations)


def choose_problems(settings: EvaluationSettings) -> tuple[Problem, ...]:
    """The tasks' problems, the kinds taking turns, so that a slow engine meets all kinds."""
    kinds = [held_out(kind, settings.n_problems, settings.seed) for kind in TASKS]
    return tuple(problem for turn in zip(*kinds, strict=True) for problem in turn)


def problems_digest(problems: Sequence[Problem]) -> str:
    """SHA-256 of what is asked and expected."""
    asked = [[problem.messages, problem.tools, problem.expected] for problem in problems]
    return digest(asked)


def prepare(
    checkpoint: Checkpoint,
    conversations: Sequence[Conversation],
    problems: tuple[Problem, ...],
    *,
    settings: EvaluationSettings,
    on_progress: Progress,
) -> Exam:
    """Tokenize the evaluation text and run the reference over it."""
    tokenizer = load_tokenizer(checkpoint.path)
    passages = []
    n_left = settings.n_tokens
    for conversation in conversations:
        if n_left <= 0:
            break
        passages.append(tokenize_conversation(conversation, tokenizer))
        n_left -= passages[-1].stop - passages[-1].n_prompt
    if not passages:
        raise QwqError("evaluation text: no token is to be scored; choose --tokens 1 or more")
    reference = final_hidden_states(
        checkpoint,
        [passage.ids for passage in passages],
        on_progress=lambda done, total: on_progress("reference, layers", done, total),
    )
    opening = tokenizer.decode(list(passages[0].ids), skip_special_tokens=False)
    assert isinstance(opening, str)
    return Exam(tuple(passages), opening, reference, problems, settings)


def check_model(qwq: QwQ) -> None:
    """Let a loaded model speak: raises QwqError where its greedy reply is empty."""
    reply = qwq.ask(QUESTIONS[0], sampling=Sampling(temperature=0), max_tokens=CHECK_TOKENS)
    if not (reply.reasoning or reply.answer):
        raise QwqError(f"{qwq.path}: loads, but its reply is empty; make the file again")


def evaluate(
    path: Path, exam: Exam, *, sha256: str, threads: int | None, on_progress: Progress
) -> FileResult:
    """Measure one file. sha256: the file's or folder's, which the caller knows.

    Raises QwqError where the file cannot be loaded or does not belong to the reference.
    """
    started = time.perf_counter()
    size = model_size(path)
    with QwQ.open(path, context=exam.context, threads=threads) as qwq:
        _check_vocabulary(qwq, exam)
        check_model(qwq)
        scores = list(_score(qwq, exam, on_progress))
        accuracy, replies = solve(qwq, exam.problems, exam.settings, on_progress=on_progress)
        examples = list(_examples(qwq, exam.settings))
    replies += [reply for _, reply in examples]
    speeds = [speed for reply in replies if (speed := reply.timings.tokens_per_s) is not None]
    return FileResult(
        name=path.name,
        sha256=sha256,
        nbytes=size.nbytes,
        bits_per_weight=size.bits_per_weight,
        engine="transformers" if path.is_dir() else "llama.cpp",
        divergence=summarize(scores),
        accuracy=accuracy,
        speed=Speed(statistics.median(speeds), len(speeds)) if speeds else None,
        examples=tuple(
            Example(question, reply.reasoning, reply.answer, reply.finish_reason)
            for question, reply in examples
        ),
        elapsed_s=round(time.perf_counter() - started, 1),
    )


def _check_vocabulary(qwq: QwQ, exam: Exam) -> None:
    engine, vocab_size = qwq.engine, exam.reference.checkpoint.model.vocab_size
    if engine.vocab_size != vocab_size:
        raise QwqError(
            f"{qwq.path}: has a vocabulary of {engine.vocab_size:,} tokens, the reference one of "
            f"{vocab_size:,}; give the checkpoint it was made from as --reference"
        )
    ids = list(exam.passages[0].ids)
    if engine.tokenize(exam.opening, parse_special=True) != ids:
        raise QwqError(
            f"{qwq.path}: its tokenizer gives other ids than the reference's; "
            "give the checkpoint it was made from as --reference"
        )


def _score(qwq: QwQ, exam: Exam, on_progress: Progress) -> Iterator[TokenScores]:
    for index, passage in enumerate(exam.passages):
        start, stop = scored_rows(passage)
        yield score_passage(
            passage,
            exam.reference.logits(index, start, stop),
            rows_between(qwq.engine.logits(passage.ids), start, stop),
        )
        on_progress(f"{qwq.path.name}: divergence, passages", index + 1, len(exam.passages))


def solve(
    qwq: QwQ, problems: Sequence[Problem], settings: EvaluationSettings, *, on_progress: Progress
) -> tuple[dict[str, Accuracy], list[Reply]]:
    """Ask the problems in turn until the time is up: accuracy by kind, and the replies."""
    n: Counter[str] = Counter()
    n_correct: Counter[str] = Counter()
    n_cut: Counter[str] = Counter()
    replies: list[Reply] = []
    deadline = time.perf_counter() + settings.task_seconds
    for index, problem in enumerate(problems):
        if time.perf_counter() > deadline:
            break
        events = qwq.reply(
            problem.messages,
            tools=problem.tools,
            seed=settings.seed + index,
            max_tokens=settings.max_tokens,
        )
        reply = collect(events)
        replies.append(reply)
        calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
        n[problem.kind] += 1
        n_correct[problem.kind] += grade(problem, reply.answer, calls)
        n_cut[problem.kind] += reply.finish_reason == "length"
        on_progress(f"{qwq.path.name}: tasks, problems", index + 1, len(problems))
    return {kind: Accuracy(n[kind], n_correct[kind], n_cut[kind]) for kind in n}, replies


def _examples(qwq: QwQ, settings: EvaluationSettings) -> Iterator[tuple[str, Reply]]:
    for question in QUESTIONS:
        yield question, qwq.ask(question, seed=settings.seed, max_tokens=settings.max_tokens)
