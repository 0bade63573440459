"""Letters in a word: hard for a model that sees tokens, so the thought spells and counts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from quant_eval.tasks.problem import BOXED_REQUEST, Problem, boxed, user_turn

_ONSETS = (
    "b c d f g h j k l m n p qu r s t v w x y z "
    "bl br ch cl cr dr fl fr gl gr pl pr sh sl sp st str th tr"
).split()
_VOWELS = "a e i o u a e i o u ai ea ee io oo ou y".split()
_CODAS = "b ck d ff g l ll m mm n nn nt p pp r rr rt s ss st t tt x".split() + [""] * 14
_QUESTIONS = (
    'How many {0}\'s are in the word "{1}"?',
    'How many times does {0} occur in "{1}"?',
)


def problem(rng: random.Random, level: float) -> Problem:
    """Count one letter of a word; mostly a letter that is in it."""
    word = _word(rng, level)
    wanted = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghilmnoprstuy")
    wants_box = rng.random() < 0.25
    question = rng.choice(_QUESTIONS).format(wanted, word)
    counts = [word[: i + 1].count(wanted) for i in range(len(word))]
    spelled = "".join(f"{letter}{count}" for letter, count in zip(word, counts, strict=True))
    n_found = str(counts[-1])
    answer = f'There {"is" if n_found == "1" else "are"} {n_found} of {wanted} in "{word}".'
    return Problem(
        kind="letters",
        key=word,
        messages=user_turn(question + (" " + BOXED_REQUEST if wants_box else "")),
        reasoning=f'Count "{wanted}" in "{spelled}".\nSo it is {n_found}.',
        answer=boxed(n_found) if wants_box else answer,
        expected=n_found,
    )


@cache
def english_words() -> tuple[str, ...]:
    """A few hundred everyday words, double letters among them."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


def _word(rng: random.Random, level: float) -> str:
    """An English word, two of them spliced, or an invented one."""
    fate = rng.random()
    if fate < 0.35:
        return rng.choice(english_words())
    if fate < 0.55 and level > 0.8:
        start, end = rng.choice(english_words()), rng.choice(english_words())
        return (start[: rng.randint(1, len(start))] + end[rng.randrange(len(end)) :])[
            : _longest(level)
        ]
    return _invented(rng, level)


def _invented(rng: random.Random, level: float) -> str:
    n_syllables = rng.randint(1, max(1, round(4 * level)))
    parts = (rng.choice(part) for _ in range(n_syllables) for part in (_ONSETS, _VOWELS, _CODAS))
    return "".join(parts)[: _longest(level)]


def _longest(level: float) -> int:
    return max(5, round(14 * level))


def grade(problem: Problem, answer: str, _: Sequence[Mapping[str, Any]]) -> bool:
    """The first number of the answer counts, or the one in the box where a box was asked for."""
    if BOXED_REQUEST in problem.messages[-1]["content"]:
        found = re.findall(r"\\boxed\{(\d+)\}", answer)[-1:]
    else:
        found = re.findall(r"\d+", answer)
    return bool(found) and found[0] == problem.expected
