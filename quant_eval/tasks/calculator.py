"""A calculator tool: calling it with the right expression, and answering with what it returned."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quant_eval.tasks.problem import Problem, user_turn

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
_QUESTIONS = (
    "What is {0} {1} {2}? Use the calculator.",
    "Use the calculator: {0} {1} {2}.",
    "Please calculate {0} {1} {2} with the calculator.",
)


def call_problem(rng: random.Random, level: float) -> Problem:
    """A question that is to end in a call of the calculator."""
    question, expression, _ = _question(rng, level)
    call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return Problem(
        kind="tool_call",
        key=expression,
        messages=user_turn(question),
        tools=(CALCULATOR,),
        reasoning=f"The calculator can do this: {expression}.",
        answer=f"<tool_call>\n{call}\n</tool_call>",
        expected=expression,
    )


def result_problem(rng: random.Random, level: float) -> Problem:
    """The same conversation after the tool has run: the answer is what it returned."""
    question, expression, value = _question(rng, level)
    called = {"name": "calculator", "arguments": {"expression": expression}}
    return Problem(
        kind="tool_result",
        key=expression,
        messages=(
            *user_turn(question),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call_0", "type": "function", "function": called}],
            },
            {"role": "tool", "tool_call_id": "call_0", "content": str(value)},
        ),
        tools=(CALCULATOR,),
        reasoning=f"The calculator returned {value}.",
        answer=f"{expression} = {value}",
        expected=str(value),
    )


def _question(rng: random.Random, level: float) -> tuple[str, str, int]:
    n_digits = max(1, round(3 * level))
    a, b = (rng.randrange(1, 10 ** rng.randint(1, n_digits)) for _ in range(2))
    operator = rng.choice("+-**")
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    question = rng.choice(_QUESTIONS).format(a, operator, b)
    return question, f"{a} {operator} {b}", value


def grade_call(problem: Problem, _: str, tool_calls: Sequence[Mapping[str, Any]]) -> bool:
    """Exactly one call, of the calculator, with the expression asked for; spaces do not count."""
    if len(tool_calls) != 1 or tool_calls[0]["name"] != "calculator":
        return False
    expression = tool_calls[0]["arguments"].get("expression")
    return isinstance(expression, str) and _squeezed(expression) == _squeezed(problem.expected)


def _squeezed(expression: str) -> str:
    return re.sub(r"\s", "", expression)


def grade_result(problem: Problem, answer: str, _: Sequence[Mapping[str, Any]]) -> bool:
    """The last number of the answer is what the tool returned."""
    found = re.findall(r"(?:(?<=\s)|^)-?\d+", answer)
    return bool(found) and found[-1] == problem.expected
