"""Which of two decimals is larger: the question on which models trip, since 11 is larger than 9."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quant_eval.tasks.arithmetic import compare_digits
from quant_eval.tasks.problem import BOXED_REQUEST, Problem, boxed, user_turn

DECIMAL_PLACES = ("Tenths", "Hundredths", "Thousandths")
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
        return a, f"{float(a):.{n_decimals}f}"
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
    x, y = (
        text.split(".")[0].zfill(n_whole) + text.split(".")[1].ljust(n_decimals, "0")
        for text in (a, b)
    )
    lines = compare_digits(x, y, ("Tens", "Ones")[-n_whole:] + DECIMAL_PLACES[:n_decimals])
    if x == y:
        return "\n".join([*lines, "So they are equal."]), ""
    side, winner = ("first", a) if (x > y) == (wanted == "larger") else ("second", b)
    return "\n".join([*lines, f"So the {side} is {wanted}: {winner}"]), winner


def grade(problem: Problem, answer: str, _: Sequence[Mapping[str, Any]]) -> bool:
    """The number named first counts, or the one in the box where a box was asked for."""
    if problem.expected == "equal":
        return "equal" in answer
    if BOXED_REQUEST in problem.messages[-1]["content"]:
        found = re.findall(r"\\boxed\{([\d.]+)\}", answer)[-1:]
    else:
        found = re.findall(r"\d+\.\d+", answer)
    return bool(found) and found[0] == problem.expected
