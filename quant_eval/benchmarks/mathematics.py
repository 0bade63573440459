"""Answers in a box, compared as mathematics by math-verify: 1/2, 0.5 and \\frac12 are equal."""

from functools import cache
from typing import Any

from quant_eval.tasks import Problem

_BOX = "\\boxed"
TIMEOUT_S = 5


def grade(problem: Problem, answer: str) -> bool:
    """What the last box holds equals what is expected; without a box nothing is found.

    Call it from the main thread: math-verify's timer is a signal.
    """
    boxed = last_boxed(answer)
    if not boxed:
        return False
    if _squeezed(boxed) == _squeezed(problem.expected):
        return True
    verify: Any = _checker()[1]
    wanted, found = (_parsed(text) for text in (problem.expected, boxed))
    return bool(wanted and found) and bool(verify(wanted, found, timeout_seconds=TIMEOUT_S))


def last_boxed(text: str) -> str:
    """What stands between the braces of the last \\boxed{...}; "" where none is whole."""
    start = text.rfind(_BOX)
    while start >= 0:
        depth = 0
        for i in range(start + len(_BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                inside = text[start + len(_BOX) + 1 : i].strip()
                if text[i] == "}" and inside:
                    return inside
                break
        start = text.rfind(_BOX, 0, start)
    return ""


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _parsed(text: str) -> Any:
    parse: Any = _checker()[0]
    return parse(f"\\boxed{{{text}}}", parsing_timeout=TIMEOUT_S)


@cache
def _checker() -> tuple[Any, Any]:
    """math-verify, which takes a second to load."""
    import math_verify

    return math_verify.parse, math_verify.verify
