"""Published benchmarks from files on the disk, and needles: problems that are graded by rules.

A problem's kind is FAMILY/SET, as in mathematics/aime24; the family names the grader:

    grade(problem, answer) -> bool | None   None: this reply cannot be graded, which is no pass
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quant_eval import tasks
from quant_eval.benchmarks import code, instructions, mathematics, needles
from quant_eval.tasks import Problem, choice

GRADERS: dict[str, Callable[[Problem, str], bool | None]] = {
    "mathematics": mathematics.grade,
    "choice": lambda problem, answer: choice.grade(problem, answer, ()),
    "code": code.grade,
    "instructions": instructions.grade,
    "needle": needles.grade,
}


def grade(
    problem: Problem, answer: str, tool_calls: Sequence[Mapping[str, Any]] = ()
) -> bool | None:
    """Whether a reply solves a problem, built in or from a file; None where that cannot be said.

    answer: the text after the thought. Code is run; mathematics is compared in the main thread
    alone, whose timer ends what would compute forever.
    """
    family, is_loaded, _ = problem.kind.partition("/")
    if is_loaded:
        return GRADERS[family](problem, answer)
    return tasks.grade(problem, answer, tool_calls)
