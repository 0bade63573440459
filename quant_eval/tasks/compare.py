"""Which of two decimals is larger: the question on which models trip, since 11 is larger than 9."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quant_eval.tasks.problem import BOXED_REQUEST, Problem, boxed, user_turn

_QUESTIONS = ("Which is {2}, {0} or {1}?", "Which number is {2}, {0} or {1}?")


def problem(rng: random.Random, level: float) -> Problem:
    """Two decimals, often with the same whole part, now and then equal in value."""
    a, b = _pair(rng, level)
    wanted = rng.choice(("larger", "larger", "smaller"))
    wants_box = rng.random() < 0.3 and float(a) != float(b)
    question = rng.choice(_QUESTIONS).format(a, b, wanted)
    reasoning, winner = _work_out(a, b, wanted)
    loser = b if winner == a else a
    answer = f"{winner} is {wanted} than {loser}." if winner else "They are equal."
    return Problem(
        kind="compare",
        key=f"{wanted} {a} {b}",
        messages=user_turn(question + (" " + BOXED_REQUEST if wants_box else "")),
        reasoning=reasoning,
        answer=boxed(winner) if wants_box else answer,
        expected=winner or "equal",
    )


def _pair(rng: random.Random, level: float) -> tuple[str, str]:
    n_decimals = max(1, round(3 * level))
    whole = rng.randrange(10 if level < 0.5 or rng.random() < 0.7 else 100)
    a = f"{whole}.{_decimals(rng, n_decimals)}"
    fate = rng.random()
    if fate < 0.04:
        return a, a + "0" * rng.randint(0, 1)
    if fate < 0.7:
        return a, f"{whole}.{_decimals(rng, n_decimals)}"
    other = rng.randrange(10 if level < 0.5 or rng.random() < 0.7 else 100)
    return a, f"{other}.{_decimals(rng, n_decimals)}"


def _decimals(rng: random.Random, most: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, most)))


def _work_out(a: str, b: str, wanted: str) -> tuple[str, str]:
    """The thought, and the number asked for ("" where both are equal)."""
    n_whole = max(len(text.split(".")[0]) for text in (a, b))
    n_decimals = max(len(text.split(".")[1]) for text in (a, b))
    x, y = (f"{float(text):0{n_whole + 1 + n_decimals}.{n_decimals}f}" for text in (a, b))
    lines = [f"Line up {x} and {y}."]
    for digit_x, digit_y in zip(x, y, strict=True):
        if digit_x == ".":
            continue
        sign = "=" if digit_x == digit_y else ">" if digit_x > digit_y else "<"
        lines.append(f"{digit_x}{sign}{digit_y}")
        if sign != "=":
            winner = a if (sign == ">") == (wanted == "larger") else b
            lines.append(f"So {winner} is {wanted}.")
            return "\n".join(lines), winner
    lines.append("So they are equal.")
    return "\n".join(lines), ""


def grade(problem: Problem, answer: str, _: Sequence[Mapping[str, Any]]) -> bool:
    """The number named first counts, or the one in the box where a box was asked for."""
    if problem.expected == "equal":
        return "equal" in answer
    if BOXED_REQUEST in problem.messages[-1]["content"]:
        found = re.findall(r"\\boxed\{([\d.]+)\}", answer)[-1:]
    else:
        found = re.findall(r"\d+\.\d+", answer)
    return bool(found) and found[0] == problem.expected
