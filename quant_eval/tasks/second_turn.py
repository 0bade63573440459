"""A second turn that refers to the answer of the first."""

from __future__ import annotations

import random

from quant_eval.tasks.arithmetic import operand, work_out
from quant_eval.tasks.problem import BOXED_REQUEST, Problem, boxed, user_turn

_FOLLOW_UPS = {
    "+": ("Now add {0}.", "Add {0} to that.", "And plus {0}?"),
    "-": ("Now subtract {0}.", "Subtract {0} from that.", "And minus {0}?"),
}


def problem(rng: random.Random, level: float) -> Problem:
    """A sum is settled in the first turn; the second adds to it or takes from it."""
    first = operand(rng, level)
    second = min(operand(rng, level), 999 - first)
    value = first + second
    operator = rng.choice("+-")
    change = operand(rng, level)
    if operator == "-" and change > value:
        change = rng.randint(0, value)
    expected = str(value + change if operator == "+" else value - change)
    wants_box = rng.random() < 0.3
    follow_up = rng.choice(_FOLLOW_UPS[operator]).format(change)
    return Problem(
        kind="second_turn",
        key=f"{first}+{second}{operator}{change}",
        messages=(
            *user_turn(f"What is {first} + {second}?"),
            {"role": "assistant", "content": f"{first} + {second} = {value}"},
            *user_turn(follow_up + (" " + BOXED_REQUEST if wants_box else "")),
        ),
        reasoning=f"It was {value}.\n{work_out(value, operator, change)}",
        answer=boxed(expected) if wants_box else f"{value} {operator} {change} = {expected}",
        expected=expected,
    )
