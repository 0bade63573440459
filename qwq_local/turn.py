"""What one reply is made from, whichever engine makes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.errors import UsageError
from qwq_local.engine import OnProgress
from qwq_local.messages import Message
from qwq_local.reply import Notice
from qwq_local.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a reply ends, and where its thought is closed for it.

    max_tokens: longest reply, thought included; None ends at the context.
    reasoning_tokens, reasoning_seconds: what a thought may take before it is closed and the answer
    follows, in seconds from its first token.
    stop: texts that end the answer where they begin; they are no part of it.
    answer_format: what the answer must be, a JSON schema or a GBNF grammar with a rule `root`.
    break_loops: whether a thought that repeats itself is closed, and an answer ended.
    Raises UsageError for a number out of range.
    """

    max_tokens: int | None = None
    reasoning_tokens: int | None = None
    reasoning_seconds: float | None = None
    stop: tuple[str, ...] = ()
    answer_format: Mapping[str, Any] | str | None = None
    break_loops: bool = True

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 1), ("reasoning_tokens", 0), ("reasoning_seconds", 0)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise UsageError(f"{name}: {value} leaves no reply; choose {low} or more")
        if not all(self.stop):
            raise UsageError(f"stop: {list(self.stop)} has an empty text; leave it out")


@dataclass(frozen=True, slots=True)
class Turn:
    """Normalised messages to reply to, and how.

    tools: function descriptions in OpenAI's form. call_prefix: ids of tool calls are this and a
    number. yarn: whether YaRN stays on, since this
    conversation needed it before. on_progress: told how much of a long prompt is read, in tokens.
    """

    messages: Sequence[Message]
    sampling: Sampling
    seed: int
    tools: Sequence[Mapping[str, Any]] = ()
    limits: Limits = Limits()
    call_prefix: str = "call_"
    yarn: bool = False
    on_progress: OnProgress | None = None


def sampling_notices(sampling: Sampling) -> list[Notice]:
    """What to say of sampling that hurts a thought."""
    notices = []
    if sampling.greedy:
        notices.append("greedy decoding: QwQ tends to repeat itself without end")
    if sampling.repetition_penalty != 1:
        notices.append("a repetition penalty: QwQ's thoughts need to repeat words")
    return [Notice("sampling", text) for text in notices]
