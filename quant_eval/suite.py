"""What every file is asked: the passages with their reference, the problems, two questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from quant_eval.manifest import digest
from quant_eval.reference import Reference, final_hidden_states
from quant_eval.reference_store import EvaluationTokens
from quant_eval.results import EvaluationSettings
from quant_eval.tasks import TASKS, Problem, held_out
from qwq_local import QwQ, Sampling

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

    conditions: a digest of all that results depend on beside the file, the text and the settings.
    """

    tokens: EvaluationTokens
    reference: Reference
    problems: tuple[Problem, ...]
    settings: EvaluationSettings
    conditions: str

    @property
    def context(self) -> int:
        """Tokens that the engine must hold at a time."""
        longest = max(len(passage.ids) for passage in self.tokens.passages)
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
    passages = []
    n_left = n_tokens
    for conversation in conversations:
        if n_left <= 0:
            break
        names.append(conversation.digest)
        passages.append(tokenize_conversation(conversation, tokenizer))
        n_left -= passages[-1].stop - passages[-1].n_prompt
    if not passages:
        raise QwqError("evaluation text: no token is to be scored; choose --tokens 1 or more")
    opening = tokenizer.decode(list(passages[0].ids), skip_special_tokens=False)
    assert isinstance(opening, str)
    return EvaluationTokens(tuple(names), tuple(passages), opening)


def make_reference(
    checkpoint: Checkpoint, tokens: EvaluationTokens, *, on_progress: Progress
) -> Reference:
    """Run the unquantized model over the passages."""
    return final_hidden_states(
        checkpoint,
        [passage.ids for passage in tokens.passages],
        on_progress=lambda done, total: on_progress("reference, layers", done, total),
    )


def check_model(qwq: QwQ) -> None:
    """Let a loaded model speak: raises QwqError where its greedy reply is empty."""
    reply = qwq.ask(QUESTIONS[0], sampling=Sampling(temperature=0), max_tokens=CHECK_TOKENS)
    if not (reply.reasoning or reply.answer):
        raise QwqError(f"{qwq.path}: loads, but its reply is empty; make the file again")
