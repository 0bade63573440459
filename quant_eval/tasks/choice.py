"""Multiple choice, answered as JSON with one letter."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quant_eval.tasks.arithmetic import operand, work_out
from quant_eval.tasks.problem import CHOICE_REQUEST, Problem, user_turn

LETTERS = "ABCD"


def problem(rng: random.Random, level: float) -> Problem:
    """A sum or a difference of up to two digits with four candidates, near misses all."""
    a, b = operand(rng, level, n_digits=2), operand(rng, level, n_digits=2)
    operator = rng.choice("+-")
    if operator == "-" and a < b:
        a, b = b, a
    value = a + b if operator == "+" else a - b
    wrong = [value + step for step in (-20, -10, -2, -1, 1, 2, 10, 20) if value + step >= 0]
    candidates = [value, *rng.sample(wrong, 3)]
    rng.shuffle(candidates)
    letter = LETTERS[candidates.index(value)]
    listed = "\n".join(
        f"{name}) {number}" for name, number in zip(LETTERS, candidates, strict=True)
    )
    tried = zip(LETTERS, candidates[: candidates.index(value) + 1], strict=False)
    lines = (f"{name}) {number} {'yes' if number == value else 'no'}" for name, number in tried)
    walk = "\n".join(lines)
    return Problem(
        kind="choice",
        key=f"{a}{operator}{b}",
        messages=user_turn(f"What is {a} {operator} {b}?\n{listed}\n{CHOICE_REQUEST}"),
        reasoning=f"{work_out(a, operator, b)}\n{walk}",
        answer=json.dumps({"answer": letter}),
        expected=letter,
    )


def grade(problem: Problem, answer: str, _: Sequence[Mapping[str, Any]]) -> bool:
    """The last `"answer": "X"` of the reply counts, as well with "x", "(X)" or "X) its text"."""
    found = re.findall(r"""["']answer["']\s*:\s*["']?\s*\(?([A-Za-z])\s*["').:,}]""", answer)
    return bool(found) and found[-1].upper() == problem.expected
