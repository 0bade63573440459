"""Where YaRN begins: native rope up to the length that QwQ was trained on, YaRN only beyond it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from convert.errors import UsageError

NATIVE_LENGTH = 32_768
"""What QwQ was trained on and what YaRN scales from, whatever a file says of its context."""
MAX_FACTOR = 4

RopeMode = Literal["auto", "native", "yarn"]


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN's two numbers. Source: Peng et al. 2023 (YaRN)."""

    factor: float
    original_length: int = NATIVE_LENGTH


@dataclass(frozen=True, slots=True)
class RopePlan:
    """Which rope serves how many tokens.

    Prompt and reply may have context_length tokens together. Up to native_length of them rope is
    native, beyond it is `yarn`; None where YaRN is never used.
    """

    context_length: int
    native_length: int
    yarn: Yarn | None

    def rope_for(self, n_tokens: int) -> Yarn | None:
        """The rope that a sequence of so many tokens needs."""
        return self.yarn if n_tokens > self.native_length else None

    def room(self, rope: Yarn | None) -> int:
        """How many tokens fit while this rope is used."""
        return self.native_length if rope is None else self.context_length


def longest_context(mode: RopeMode, file_length: int) -> int:
    """How many tokens a model can read: its file's number, or with YaRN four times the native.

    Raises UsageError for an unknown mode.
    """
    if mode not in get_args(RopeMode):
        raise UsageError(f"rope: {mode!r} is unknown; use one of {', '.join(get_args(RopeMode))}")
    if mode == "native" or file_length < NATIVE_LENGTH:
        return file_length
    return max(file_length, MAX_FACTOR * NATIVE_LENGTH)


def plan_rope(mode: RopeMode, context_length: int) -> RopePlan:
    """Native where that suffices or is asked for; else YaRN with the factor that is needed."""
    if mode == "native" or context_length <= NATIVE_LENGTH:
        return RopePlan(context_length, context_length, None)
    yarn = Yarn(min(context_length / NATIVE_LENGTH, MAX_FACTOR))
    return RopePlan(context_length, NATIVE_LENGTH if mode == "auto" else 0, yarn)
