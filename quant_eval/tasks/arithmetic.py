"""Additions and subtractions up to three digits, worked from the right as on paper."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quant_eval.tasks.problem import BOXED_REQUEST, Problem, boxed, user_turn

PLACES = ("ones", "tens", "hundreds", "thousands")
_QUESTIONS = ("What is {0} {1} {2}?", "Compute {0} {1} {2}.", "Calculate {0} {1} {2}.")


def problem(rng: random.Random, level: float) -> Problem:
    """Ask for a sum or a difference; a third of the prompts want the answer in a box."""
    a, b = operand(rng, level), operand(rng, level)
    operator = rng.choice("+-")
    if operator == "-" and a < b and rng.random() < 0.7:
        a, b = b, a
    question = rng.choice(_QUESTIONS).format(a, operator, b)
    expected = str(a + b if operator == "+" else a - b)
    wants_box = rng.random() < 0.35
    return Problem(
        kind="arithmetic",
        key=f"{a}{operator}{b}",
        messages=user_turn(question + (" " + BOXED_REQUEST if wants_box else "")),
        reasoning=work_out(a, operator, b),
        answer=boxed(expected) if wants_box else f"{a} {operator} {b} = {expected}",
        expected=expected,
    )


def operand(rng: random.Random, level: float, n_digits: int = 3) -> int:
    """A number of up to n_digits digits, each length equally likely; low levels have fewer."""
    n_digits = rng.randint(1, max(1, round(level * n_digits)))
    return rng.randrange(10 ** (n_digits - 1) if n_digits > 1 else 0, 10**n_digits)


def work_out(a: int, operator: str, b: int) -> str:
    """The thought: both numbers lined up, then one line a place, each with the result so far."""
    width = max(len(str(a)), len(str(b)))
    lines = [f"Line up {a:0{width}} {operator} {b:0{width}}."]
    negative = operator == "-" and a < b
    if negative:
        a, b = b, a
        lines.append(f"The first is smaller, so turn it around: {a:0{width}} - {b:0{width}}.")
    carry, result = 0, ""
    pairs = zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1], strict=True)
    for place, (x, y) in enumerate(pairs):
        step = f"{x}{operator}{y}{operator}{carry}"
        total = int(x) + int(y) + carry if operator == "+" else int(x) - int(y) - carry
        carry = int(total > 9 or total < 0)
        digit = total if place == width - 1 else total % 10
        result = f"{digit}{result}"
        lines.append(f"{PLACES[place]} {step}={total}, {result}")
    value = -int(result) if negative else int(result)
    lines.append(f"So it is {value}.")
    return "\n".join(lines)


def grade(problem: Problem, answer: str, _: Sequence[Mapping[str, Any]]) -> bool:
    """The last number of the answer counts; where a box was asked for, only what is in it."""
    if BOXED_REQUEST in problem.messages[-1]["content"]:
        found = re.findall(r"\\boxed\{(-?\d+)\}", answer)
    else:
        found = re.findall(r"(?:(?<=\s)|^)-?\d+", answer)
    return bool(found) and found[-1] == problem.expected
