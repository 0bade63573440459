"""What every file is asked: the passages with their reference, the problems, two questions."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from convert.calibration import (
    Conversation,
    load_conversations,
    load_tokenizer,
    set_digest,
    tokenize_conversation,
)
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.layer_work import LayerWork
from quant_eval.benchmarks.generated import GENERATED, generated_problems
from quant_eval.benchmarks.loading import load_problems
from quant_eval.benchmarks.needles import needle_problems
from quant_eval.manifest import digest
from quant_eval.reference import Reference, final_hidden_states
from quant_eval.reference_store import EvaluationTokens
from quant_eval.results import EvaluationSettings
from quant_eval.tasks import TASKS, Problem, held_out
from qwq_local import QwQ, Sampling

EVALUATION_TEXT = Path(__file__).parent / "data" / "evaluation.jsonl"
GENERAL_TEXT = EVALUATION_TEXT.with_name("general.jsonl")
QUESTIONS = (
    "Which is larger, 9.9 or 9.11?",
    'How many r\'s are in the word "strawberry"?',
)
PROMPT_TOKENS = 1024  # the built-in tasks' and questions' are shorter
TEMPLATE_TOKENS = 64  # what a template puts around a message
CHECK_TOKENS = 16
CHECK_CONTEXT = PROMPT_TOKENS + CHECK_TOKENS
LARGE_MODEL_WEIGHTS = 1_000_000_000

Progress = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""


@dataclass(frozen=True, slots=True)
class Exam:
    """What every file of a report is given, and the reference to hold it against.

    states: None where servers alone are asked, of which no logits are known. conditions: a
    digest of all that results depend on beside the file, the text and the settings. prompt_tokens:
    room for the longest prompt of a task or question.
    """

    tokens: EvaluationTokens
    states: Reference | None
    problems: tuple[Problem, ...]
    settings: EvaluationSettings
    conditions: str
    prompt_tokens: int = PROMPT_TOKENS

    @property
    def reference(self) -> Reference:
        """What files are held against."""
        assert self.states is not None
        return self.states

    @property
    def context(self) -> int:
        """Tokens that the engine must hold at a time."""
        longest = max(len(passage.ids) for passage in self.tokens.passages)
        return max(longest, self.prompt_tokens + self.settings.max_tokens)


def rough_count(text: str) -> int:
    """Tokens of a text where there is no tokenizer to ask."""
    return max(1, len(text) // 4)


SMOKE = EvaluationSettings(n_tokens=512, n_problems=1, task_seconds=5.0, max_tokens=256)
"""A little of everything."""


def default_settings(*, is_small: bool) -> EvaluationSettings:
    """How much to measure: in full for a small model, for a large one what a user will wait for.

    A large model's accuracy is left out: its thoughts take minutes each.
    """
    if is_small:
        return EvaluationSettings()
    return EvaluationSettings(n_tokens=2048, n_problems=0, max_tokens=256)


def read_evaluation_text(
    path: Path | None, *, general: bool = False
) -> tuple[list[Conversation], str]:
    """The conversations to score, the built-in ones where no path is given, and their digest.

    They come with the kinds taking turns, so that the first of them are of all kinds. general:
    whether reasoning, mathematics, code, tools, prose and other languages are among the built-in
    ones, or nano-qwq's kinds of problem alone.
    """
    conversations = load_conversations(path or EVALUATION_TEXT)
    if general and path is None:
        conversations = [*load_conversations(GENERAL_TEXT), *conversations]
    n_of_kind: dict[str, int] = {}
    turns = []
    for conversation in conversations:
        turns.append(n_of_kind.get(conversation.kind, 0))
        n_of_kind[conversation.kind] = turns[-1] + 1
    order = sorted(range(len(conversations)), key=turns.__getitem__)
    return [conversations[i] for i in order], set_digest(conversations)


def choose_problems(
    settings: EvaluationSettings,
    benchmarks: Sequence[Path] = (),
    count: Callable[[str], int] = rough_count,
) -> tuple[Problem, ...]:
    """The tasks' problems, the kinds taking turns, so that a slow engine meets all kinds.

    benchmarks: files, folders, or names in GENERATED. count: tokens of a text, for needles. Raises
    QwqError for what is no benchmark.
    """
    sets: list[Sequence[Problem]] = [
        held_out(kind, settings.n_problems, settings.seed) for kind in TASKS
    ]
    sets += [_benchmark(name, settings) for name in benchmarks]
    sets += [needle_problems(n, count=count, seed=settings.seed) for n in settings.needles]
    turns = zip_longest(*sets)
    return tuple(problem for turn in turns for problem in turn if problem is not None)


def _benchmark(name: Path, settings: EvaluationSettings) -> list[Problem]:
    """As many problems as are wanted: made, or drawn by the seed in the file's order."""
    n = settings.n_task_problems
    if str(name) in GENERATED:
        return generated_problems(str(name), n=n, seed=settings.seed)
    if not name.exists():
        raise QwqError(
            f"{name}: no such file or folder; check the path, or choose one that is built in: "
            f"{', '.join(GENERATED)}"
        )
    problems = load_problems(name)
    if n is None or n >= len(problems):
        return problems
    chosen = random.Random(settings.seed).sample(range(len(problems)), n)
    return [problems[index] for index in sorted(chosen)]


def longest_prompt(problems: Sequence[Problem], count: Callable[[str], int]) -> int:
    """Tokens that the longest prompt of these may have, at least the built-in ones'."""
    lengths = (
        sum(count(str(message["content"])) + TEMPLATE_TOKENS for message in problem.messages)
        for problem in problems
        if "/" in problem.kind
    )
    return max(PROMPT_TOKENS, max(lengths, default=0))


def problem_name(problem: Problem) -> str:
    """SHA-256 of what is asked and expected."""
    return digest([problem.messages, problem.tools, problem.expected])


def tokenize_text(
    checkpoint: Checkpoint, conversations: Sequence[Conversation], n_tokens: int
) -> EvaluationTokens:
    """The first conversations that together have n_tokens reply tokens, whole ones.

    Raises QwqError where no token is to be scored.
    """
    tokenizer = load_tokenizer(checkpoint.path)
    names = []
    kinds = []
    passages = []
    n_left = n_tokens
    for conversation in conversations:
        if n_left <= 0:
            break
        names.append(conversation.digest)
        kinds.append(conversation.kind)
        passages.append(tokenize_conversation(conversation, tokenizer))
        n_left -= passages[-1].stop - passages[-1].n_prompt
    if not passages:
        raise QwqError("evaluation text: no token is to be scored; choose --tokens 1 or more")
    opening = tokenizer.decode(list(passages[0].ids), skip_special_tokens=False)
    assert isinstance(opening, str)
    return EvaluationTokens(tuple(names), tuple(passages), opening, tuple(kinds))


def make_reference(
    checkpoint: Checkpoint, tokens: EvaluationTokens, work: LayerWork, *, on_progress: Progress
) -> Reference:
    """Run the unquantized model over the passages; work: keeps the layers that are finished."""
    return final_hidden_states(
        checkpoint,
        [passage.ids for passage in tokens.passages],
        work,
        on_progress=lambda done, total: on_progress("reference, layers", done, total),
    )


def check_model(qwq: QwQ) -> None:
    """Let a loaded model speak: raises QwqError where its greedy reply is empty."""
    reply = qwq.ask(QUESTIONS[0], sampling=Sampling(temperature=0), max_tokens=CHECK_TOKENS)
    if not (reply.reasoning or reply.answer):
        raise QwqError(f"{qwq.path}: loads, but its reply is empty; make the file again")
