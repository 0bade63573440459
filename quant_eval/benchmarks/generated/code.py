"""Functions to be written in Python; what an exercise's solution returns is what tests expect.

What a problem draws are an exercise's constants, which are said in the statement and make it
another one, and the arguments of its tests.
"""

import inspect
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quant_eval.benchmarks.generated import solutions
from quant_eval.benchmarks.loading import FUNCTION_REQUEST
from quant_eval.tasks.problem import Problem, user_turn

N_TESTS = 8
_IMPORTS = "from collections import Counter, deque\nfrom collections.abc import Sequence\n"


@dataclass(frozen=True, slots=True)
class Exercise:
    """What is asked for, and how it is done.

    statement: with the constants as {0}, {1}. signature: of the function to write. solution: takes
    the arguments, then the constants. size: 0 in the first test and N_TESTS - 1 in the last.
    """

    statement: str
    signature: str
    solution: Callable[..., Any]
    constants: Callable[[random.Random], tuple[Any, ...]]
    arguments: Callable[[random.Random, int], tuple[Any, ...]]


def problem(rng: random.Random) -> Problem:
    """One of EXERCISES; each is as likely as any other."""
    exercise = rng.choice(EXERCISES)
    constants = exercise.constants(rng)
    statement = exercise.statement.format(*constants)
    tests = []
    for size in range(N_TESTS):
        arguments = exercise.arguments(rng, size)
        expected = exercise.solution(*arguments, *constants)
        tests.append(["\n".join(map(json.dumps, arguments)), json.dumps(expected)])
    name = exercise.signature.partition("(")[0]
    starter = f"def {exercise.signature}:\n    ..."
    return Problem(
        kind="code/built-in",
        key=statement,
        messages=user_turn(f"{statement}\n\n{FUNCTION_REQUEST.format(starter)}"),
        reasoning="",
        answer=f"```python\n{_program(exercise, constants)}\n```",
        expected=json.dumps({"function": name, "tests": tests}),
    )


def _program(exercise: Exercise, constants: Sequence[Any]) -> str:
    """The solution's source, called with the constants."""
    solution = exercise.solution
    values = "".join(f", {one!r}" for one in constants)
    return (
        f"{_IMPORTS}\n\n{inspect.getsource(solution)}\n\n"
        f"def {exercise.signature}:\n"
        f"    return {solution.__name__}({', '.join(_parameters(exercise))}{values})"
    )


def _parameters(exercise: Exercise) -> list[str]:
    inside = exercise.signature.partition("(")[2].partition(")")[0]
    return [part.partition(":")[0].strip() for part in inside.split(", ")]


def _numbers(rng: random.Random, n: int, low: int, high: int) -> list[int]:
    return [rng.randint(low, high) for _ in range(n)]


def _text(rng: random.Random, n: int, characters: Sequence[str]) -> str:
    return "".join(rng.choice(characters) for _ in range(n))


def _intervals(rng: random.Random, size: int) -> tuple[list[list[int]]]:
    starts = _numbers(rng, 2 * size, -30, 30)
    return ([[start, start + rng.randint(0, 25)] for start in starts],)


def _grid(rng: random.Random, size: int) -> tuple[list[str]]:
    width = size + 1
    grid = ["".join(rng.choices(".#", (3, 1), k=width)) for _ in range(size + 1)]
    if size != 5:  # one test may have no way in or out
        grid[0] = f".{grid[0][1:]}"
        grid[-1] = f"{grid[-1][:-1]}."
    return (grid,) if grid[0][0] == "." else ([f".{grid[0][1:]}", *grid[1:]],)


def _program_lines(rng: random.Random, size: int) -> tuple[list[str]]:
    names = ("PUSH", "PUSH", "ADD", "MUL", "DUP", "SWAP")
    drawn = (rng.choice(names) for _ in range(4 * size))
    return ([f"PUSH {rng.randint(0, 99)}" if name == "PUSH" else name for name in drawn],)


def _brackets(rng: random.Random, size: int) -> tuple[str]:
    """Balanced in half of the tests."""
    pairs = ("()", "[]", "{}", "<>")
    text = ""
    for _ in range(3 * size):
        at = rng.randint(0, len(text))
        text = f"{text[:at]}{rng.choice(pairs)}{text[at:]}"
    if size % 2:
        at = rng.randrange(len(text))
        text = text[:at] + text[at + 1 :]
    return (text,)


EXERCISES = (
    Exercise(
        "Count the integers from `low` to `high`, both included, whose digit sum is divisible by "
        "{0} and that do not contain the digit {1}.",
        "count_wanted(low: int, high: int) -> int",
        solutions.count_numbers,
        lambda rng: (rng.randint(3, 9), rng.randint(1, 9)),
        lambda rng, size: (rng.randint(1, 50), rng.randint(50, 10 ** min(size + 1, 4) + 50)),
    ),
    Exercise(
        "Find the length of the longest stretch of neighbouring elements of `numbers` in which "
        "any two direct neighbours differ by at most {0}. It is 0 for an empty list.",
        "longest(numbers: list[int]) -> int",
        solutions.longest_stretch,
        lambda rng: (rng.randint(1, 9),),
        lambda rng, size: (_numbers(rng, 6 * size, -8, 8),),
    ),
    Exercise(
        "Each element of `intervals` is a pair [start, stop] of integers with start <= stop, and "
        "covers the numbers from start up to but not including stop. Find the length of all that "
        "at least {0} of the intervals cover.",
        "covered(intervals: list[list[int]]) -> int",
        solutions.covered_length,
        lambda rng: (rng.randint(1, 4),),
        _intervals,
    ),
    Exercise(
        "In how many ways can `total` be written as a sum of numbers out of {0}, each as often as "
        "one likes, where sums in another order count as others? Return the number of ways modulo "
        "{1}; 0 has one way, the empty sum.",
        "count_ways(total: int) -> int",
        solutions.count_sums,
        lambda rng: (sorted(rng.sample(range(1, 12), 3)), rng.choice((1009, 10007, 1000003))),
        lambda rng, size: (size * size * rng.randint(1, 30),),
    ),
    Exercise(
        "`grid` is a list of strings of the same length, in which `.` is free and `#` is a wall. "
        "One starts at the first character of the first string, which is free, and moves to a free "
        "neighbour: up, down, left or right, and in the whole way at most {0} times to one of the "
        "four diagonal neighbours. Find the fewest moves to the last character of the last string, "
        "or -1 where it cannot be reached.",
        "fewest(grid: list[str]) -> int",
        solutions.fewest_moves,
        lambda rng: (rng.randint(1, 6),),
        _grid,
    ),
    Exercise(
        "Words are what blanks divide in `text`. Return the {0} most frequent of those that have "
        "at least {1} letters, the most frequent first and words of the same frequency in "
        "alphabetical order; fewer where there are not so many.",
        "most_frequent(text: str) -> list[str]",
        solutions.frequent_words,
        lambda rng: (rng.randint(2, 7), rng.randint(1, 4)),
        lambda rng, size: (
            " ".join(_text(rng, rng.randint(1, 5), "ab") for _ in range(12 * size)),
        ),
    ),
    Exercise(
        "`cells` is a string of `0` and `1`, a ring: the last character is the left neighbour of "
        "the first. In each step all cells change at once: with left neighbour a, own value b and "
        "right neighbour c, a cell becomes bit number 4a + 2b + c of {0}, where bit 0 is the least "
        "significant. Return the cells after `n_steps` steps.",
        "evolve(cells: str, n_steps: int) -> str",
        solutions.automaton,
        lambda rng: (rng.randint(1, 254),),
        lambda rng, size: (_text(rng, 3 * size + 1, "01"), size * size),
    ),
    Exercise(
        "Run `program`, a list of instructions for a stack of integers that is empty at first: "
        "`PUSH x` puts x on the stack, `DUP` puts the top on it once more, `ADD` and `MUL` take "
        "two values off and put their sum or product on, `SWAP` exchanges the two on top. All "
        "values are kept modulo {0}. An instruction that finds too few values does nothing. Return "
        "the stack at the end, the top last.",
        "run(program: list[str]) -> list[int]",
        solutions.stack_machine,
        lambda rng: (rng.randint(11, 997),),
        _program_lines,
    ),
    Exercise(
        "The numbers from 1 to `n` stand in a circle. Counting begins at 1, and every {0}th number "
        "counted leaves the circle, at which counting goes on with the next one, until {1} are "
        "left, or all where there are not more. Return those in ascending order.",
        "remaining(n: int) -> list[int]",
        solutions.last_in_circle,
        lambda rng: (rng.randint(4, 20), rng.randint(1, 4)),
        lambda rng, size: (size * rng.randint(1, 15) + 1,),
    ),
    Exercise(
        "Turn the string `a` into `b`. Putting a character in or taking one out costs {0}, "
        "replacing one by another costs {1}. Return the lowest cost.",
        "lowest_cost(a: str, b: str) -> int",
        solutions.cost_of_change,
        lambda rng: (rng.randint(2, 9), rng.randint(3, 20)),
        lambda rng, size: (_text(rng, 2 * size, "abc"), _text(rng, 2 * size + 1, "abc")),
    ),
    Exercise(
        "Find the largest total weight, at most `most`, that can be made of `weights`, positive "
        "integers, when each element of the list may be taken up to {0} times, or not at all.",
        "heaviest(weights: list[int], most: int) -> int",
        solutions.fullest_load,
        lambda rng: (rng.randint(1, 5),),
        lambda rng, size: (_numbers(rng, size, 5, 60), rng.randint(10, 60 * size + 20)),
    ),
    Exercise(
        "The characters of `{0}` are opening brackets, and `{1}` has the closing one of each at "
        "the same position; all other characters mean nothing. Return how deep the brackets of "
        "`text` are nested, 0 where there are none, or -1 where they are not balanced.",
        "nesting(text: str) -> int",
        solutions.deepest_nesting,
        lambda rng: rng.choice((("([{<", ")]}>"), ("([{", ")]}"), ("{<", "}>"), ("<(", ">)"))),
        _brackets,
    ),
)
