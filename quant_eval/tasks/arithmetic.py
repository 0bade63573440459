"""Additions and subtractions up to three digits, worked from the right as on paper."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quant_eval.tasks.problem import BOXED_REQUEST, Problem, boxed, user_turn

PLACES = ("Ones", "Tens", "Hundreds")
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
    """The thought: the exercise, then one line a place from the right, each with the result so far.

    A difference first finds out, from the left, which number is larger.
    """
    lines = [f"{a} {operator} {b}"]
    if operator == "-":
        lines += compare_digits(digits(a, b), digits(b, a), PLACES[::-1])
    negative = operator == "-" and a < b
    if negative:
        a, b = b, a
        lines.append(f"Negative, so {a} - {b}")
    carry, result = 0, ""
    pairs = list(zip(digits(a, b)[::-1], digits(b, a)[::-1], strict=True))
    for place, (x, y) in zip(PLACES, pairs, strict=False):
        total = int(x) + int(y) + carry if operator == "+" else int(x) - int(y) - carry
        line = f"{place} {x}{operator}{y}{operator}{carry}={total}"
        carry = int(total > 9 or total < 0)
        is_last = len(result) == len(pairs) - 1
        result = f"{total if is_last else total % 10}{result}"
        lines.append(f"{line}, {result}")
    value = -int(result) if negative else int(result)
    lines.append(f"So it is {value}.")
    return "\n".join(lines)


def digits(number: int, other: int) -> str:
    """The digits of a number, with as many zeros before them as the other is longer."""
    return str(number).zfill(len(str(other)))


def compare_digits(x: str, y: str, places: Sequence[str]) -> list[str]:
    """One line a place, from the left, up to the first difference: "Tens 4 5 <"."""
    lines = []
    for place, digit_x, digit_y in zip(places[-len(x) :], x, y, strict=True):
        sign = "=" if digit_x == digit_y else ">" if digit_x > digit_y else "<"
        lines.append(f"{place} {digit_x} {digit_y} {sign}")
        if sign != "=":
            break
    return lines


def grade(problem: Problem, answer: str, _: Sequence[Mapping[str, Any]]) -> bool:
    """The last number of the answer counts; where a box was asked for, only what is in it."""
    if BOXED_REQUEST in problem.messages[-1]["content"]:
        found = re.findall(r"\\boxed\{(-?\d+)\}", answer)
    else:
        found = re.findall(r"(?:(?<=\s)|^)-?\d+", answer)
    return bool(found) and found[-1] == problem.expected
