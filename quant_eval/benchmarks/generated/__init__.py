"""Benchmarks that are built in: problems for models of QwQ's size, made anew from a seed.

Each kind is one function, listed in GENERATED:

    problem(rng) -> Problem   with a worked reply that its grader accepts
"""

import random
from collections.abc import Callable

from convert.errors import QwqError
from quant_eval.benchmarks.generated import code, instructions, mathematics
from quant_eval.tasks import Problem

N_PROBLEMS = 24  # of a kind, where no number is given
MOST_IN_VAIN = 200  # problems in a row that were there already
GENERATED: dict[str, Callable[[random.Random], Problem]] = {
    "mathematics": mathematics.problem,
    "code": code.problem,
    "instructions": instructions.problem,
}


def generated_problems(name: str, *, n: int | None = None, seed: int = 0) -> list[Problem]:
    """Make n different problems of one kind; fewer of them are the first of more.

    The same (name, seed) gives the same problems on every machine. Raises QwqError where there are
    not so many.
    """
    rng = random.Random(f"generated/{name}/{seed}")
    wanted = N_PROBLEMS if n is None else n
    found: dict[str, Problem] = {}
    n_in_vain = 0
    while len(found) < wanted:
        problem = GENERATED[name](rng)
        n_in_vain = n_in_vain + 1 if problem.key in found else 0
        if n_in_vain > MOST_IN_VAIN:
            raise QwqError(
                f"{name}: {wanted} problems are wanted and about {len(found)} are there; "
                "choose fewer"
            )
        found.setdefault(problem.key, problem)
    return list(found.values())
