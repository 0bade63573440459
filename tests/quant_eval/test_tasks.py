"""The tasks: right answers are right, wrong ones are caught, and the two sides never meet."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from fractions import Fraction

import pytest

from quant_eval import benchmarks
from quant_eval.nano.accuracy import tool_calls
from quant_eval.nano.corpus import CALIBRATION, EVALUATION, shipped_sets, training_problems
from quant_eval.tasks import TASKS, Problem, grade, held_out

KINDS = sorted(TASKS)


def problems(kind: str, n: int = 300, level: float = 1.0) -> list[Problem]:
    rng = random.Random(7)
    return [TASKS[kind].problem(rng, level) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_worked_reply_solves_its_problem(kind: str, level: float) -> None:
    """Catches a maker and a grader that disagree."""
    for problem in problems(kind, level=level):
        assert grade(problem, problem.answer, tool_calls(problem.answer)), problem


@pytest.mark.parametrize("kind", KINDS)
def test_the_reply_to_another_problem_fails(kind: str) -> None:
    """Catches a grader that passes everything; equal answers of two problems are left out."""
    made = problems(kind)
    for problem, other in zip(made, made[1:] + made[:1], strict=True):
        if problem.expected != other.expected:
            assert not grade(problem, other.answer, tool_calls(other.answer)), (problem, other)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_answer_fails(kind: str) -> None:
    """Catches a grader that takes nothing for a right answer."""
    assert not any(grade(problem, "") for problem in problems(kind, 50))


@pytest.mark.parametrize("kind", ["arithmetic", "second_turn", "tool_result"])
def test_results_are_true(kind: str) -> None:
    """Catches wrong worked results, against Python's own arithmetic."""
    for problem in problems(kind):
        assert int(problem.expected) == _evaluate(problem.key)


def test_counts_are_true() -> None:
    """Catches wrong counts, against str.count."""
    for problem in problems("letters"):
        wanted = re.search(r'Count "(\w)"', problem.reasoning)
        assert wanted is not None
        assert int(problem.expected) == problem.key.count(wanted[1])


def test_comparisons_are_true() -> None:
    """Catches the very mistake that the task is about, against exact fractions."""
    for problem in problems("compare"):
        wanted, a, b = problem.key.split()
        pick = max if wanted == "larger" else min
        is_equal = Fraction(a) == Fraction(b)
        assert problem.expected == ("equal" if is_equal else pick(a, b, key=Fraction))


def test_choices_are_true() -> None:
    """Catches a letter that names another candidate."""
    for problem in problems("choice"):
        offered = re.findall(r"^([A-D])\) (\d+)$", problem.messages[0]["content"], flags=re.M)
        assert dict(offered)[problem.expected] == str(_evaluate(problem.key))


def _evaluate(expression: str) -> int:
    """The value of numbers joined by + - *, from left to right."""
    first, *rest = re.findall(r"\d+|[-+*]", expression)
    value = int(first)
    for operator, number in zip(rest[::2], rest[1::2], strict=True):
        step = {"+": value + int(number), "-": value - int(number), "*": value * int(number)}
        value = step[operator]
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_problems_are_never_trained_on(kind: str) -> None:
    """Catches a leak between training and evaluation."""
    training = training_problems(random.Random(3), 1.0)
    seen = {problem.key for problem, _ in zip(training, range(20_000), strict=False)}
    kept = held_out(kind, 50, seed=1)
    assert len({problem.key for problem in kept}) == 50
    assert not seen & {problem.key for problem in kept}
    assert not seen & {"strawberry", "larger 9.9 9.11"}


def test_held_out_problems_repeat_by_seed() -> None:
    """Catches an evaluation that changes from run to run."""
    assert held_out("letters", 20, seed=5) == held_out("letters", 20, seed=5)
    assert held_out("letters", 20, seed=5) != held_out("letters", 20, seed=6)


def test_the_shipped_sets_are_what_the_corpus_makes() -> None:
    """Catches sets that were edited by hand, or a corpus that changed under them."""
    for path, lines in shipped_sets().items():
        assert path.read_text(encoding="utf-8").splitlines() == lines, path.name


def test_the_shipped_sets_are_disjoint() -> None:
    """Catches calibration on evaluation text."""
    calibration = set(CALIBRATION.read_text(encoding="utf-8").splitlines())
    evaluation = set(EVALUATION.read_text(encoding="utf-8").splitlines())
    assert calibration
    assert evaluation
    assert not calibration & evaluation


@pytest.mark.parametrize(
    "answer",
    ["", "<tool_call>", "<tool_call>\n{broken\n</tool_call>", "<tool_call>\n[1]\n</tool_call>"],
)
def test_what_is_no_call_is_not_counted(answer: str) -> None:
    """Catches a parser that fails on broken calls or invents some."""
    assert tool_calls(answer) == []


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ('{"answer": "C"}', True),
        ('{"answer": "c"}', True),
        ('"answer": "C) 41"', True),
        ('{"answer":"(C)"}', True),
        ('{"answer": "C."}', True),
        ('{"answer": C}', True),
        ("{'answer': 'C'}", True),
        ('{"answer": "B"}', False),
        ('{"answer": "C"} or rather {"answer": "D) 42"}', False),
        ('{"answer": "Cats"}', False),
        ('{"answer": "41"}', False),
        ("C", False),
    ],
)
def test_a_choice_is_its_leading_letter(answer: str, is_right: bool) -> None:
    """Catches a right letter that fails for its case or the text behind it, and words."""
    problem = next(one for one in problems("choice") if one.expected == "C")
    assert grade(problem, answer) is is_right
    assert benchmarks.grade(replace(problem, kind="choice/gpqa"), answer) is is_right
