"""Tasks with answers that a program can check: each makes problems, works them out, grades replies.

A kind is two functions, listed in TASKS:

    problem(rng, level) -> Problem   level 0.0 gives the easiest problems, 1.0 the full range
    grade(problem, answer, tool_calls) -> bool

Every problem carries a worked reply (reasoning and answer). The reference model is trained on
these, calibration uses them, and the evaluation asks the same kinds of problem with other contents:
a problem is on the training or on the held-out side by the hash of its key; the two never meet.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant_eval.tasks import arithmetic, calculator, choice, compare, letters, second_turn
from quant_eval.tasks.problem import Problem

ProblemMaker = Callable[[random.Random, float], Problem]
Grader = Callable[[Problem, str, Sequence[Mapping[str, Any]]], bool]


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of problem: how to make one and how to grade a reply to it."""

    problem: ProblemMaker
    grade: Grader


__all__ = ["TASKS", "Problem", "Task", "grade", "held_out"]

TASKS: dict[str, Task] = {
    "arithmetic": Task(arithmetic.problem, arithmetic.grade),
    "compare": Task(compare.problem, compare.grade),
    "letters": Task(letters.problem, letters.grade),
    "choice": Task(choice.problem, choice.grade),
    "tool_call": Task(calculator.call_problem, calculator.grade_call),
    "tool_result": Task(calculator.result_problem, calculator.grade_result),
    "second_turn": Task(second_turn.problem, arithmetic.grade),
}


def held_out(kind: str, n: int, seed: int) -> list[Problem]:
    """Make n different problems of one kind, all from the held-out side.

    The same (kind, n, seed) gives the same problems on every machine.
    """
    rng = random.Random(f"{kind}/{seed}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = TASKS[kind].problem(rng, 1.0)
        if problem.is_held_out:
            found.setdefault(problem.key, problem)
    return list(found.values())


def grade(problem: Problem, answer: str, tool_calls: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Whether a reply solves the problem.

    answer: the text after the thought. tool_calls: mappings of `name` and `arguments`.
    """
    return TASKS[problem.kind].grade(problem, answer, tool_calls)
