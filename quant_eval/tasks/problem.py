"""What a problem is, and the phrases that several kinds share, as QwQ's model card has them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

HELD_OUT_SHARE = 8  # one key in eight is held out
# The two questions that everybody asks a reasoning model.
ALWAYS_HELD_OUT = frozenset({"strawberry", "larger 9.9 9.11"})
BOXED_REQUEST = r"Please reason step by step, and put your final answer within \boxed{}."
CHOICE_REQUEST = 'Show your choice in the `answer` field with only the letter, e.g., "answer": "C".'


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with its worked reply.

    key: what makes it this problem and no other (the numbers, the word), hashed to choose its side.
    messages, tools: the prompt, in OpenAI's form. expected: what `grade` looks for.
    """

    kind: str
    key: str
    messages: tuple[dict[str, Any], ...]
    reasoning: str
    answer: str
    expected: str
    tools: tuple[dict[str, Any], ...] | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether the problem is kept from training and calibration."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return self.key in ALWAYS_HELD_OUT or digest[0] % HELD_OUT_SHARE == 0


def user_turn(text: str) -> tuple[dict[str, Any], ...]:
    """A prompt of one user message."""
    return ({"role": "user", "content": text},)


def boxed(value: str) -> str:
    """The final answer as mathematics benchmarks ask for it."""
    return rf"\boxed{{{value}}}"
