"""The benchmarks that are built in: right answers, by other ways of finding them."""

import itertools
import json
import random
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from quant_eval import pipeline, suite
from quant_eval.benchmarks import code, generated, grade
from quant_eval.benchmarks.generated import (
    GENERATED,
    N_PROBLEMS,
    generated_problems,
    instructions,
    mathematics,
)
from quant_eval.benchmarks.generated.code import EXERCISES
from quant_eval.manifest import Manifest
from quant_eval.results import EvaluationSettings
from quant_eval.tasks import Problem
from tests.oracles.generated_twins import CODE, MATHEMATICS
from tests.synthetic import write_checkpoint


@pytest.mark.parametrize("maker", mathematics.MAKERS, ids=lambda maker: maker.__name__)
def test_answers_are_what_trying_everything_finds(maker: mathematics.Maker) -> None:
    """Catches a formula that is wrong for some numbers, and a question that says other numbers."""
    rng = random.Random(5)
    for _ in range(40):
        question, answer = maker(rng)
        assert answer == MATHEMATICS[maker.__name__](question), question


@pytest.mark.parametrize("name", CODE)
def test_tests_expect_what_another_solution_returns(name: str) -> None:
    """Catches a solution that does something else than its statement says."""
    problems = generated_problems("code", n=150)
    asked = [one for one in problems if json.loads(one.expected)["function"] == name]
    assert len(asked) > 2
    for problem in asked:
        for given, expected in json.loads(problem.expected)["tests"]:
            arguments = map(json.loads, given.splitlines())
            assert CODE[name](problem.key, *arguments) == json.loads(expected), (problem, given)


def test_a_tests_answers_are_not_all_alike() -> None:
    """Catches tests that a program which always returns the same thing passes."""
    for problem in generated_problems("code", n=60):
        tests = json.loads(problem.expected)["tests"]
        assert len({expected for _, expected in tests}) > 2, problem.key


def test_worked_replies_are_right_and_an_odd_one_is_not() -> None:
    """Catches a program that cannot be run, and a grader that takes anything."""
    by_exercise = {
        json.loads(problem.expected)["function"]: problem
        for problem in generated_problems("code", n=60)
    }
    assert len(by_exercise) == len(EXERCISES)
    for problem in by_exercise.values():
        assert grade(problem, f"Here it is.\n\n{problem.answer}"), problem.key
    name = "longest"
    wrong = by_exercise[name].answer.replace("<= most", "< most")
    assert wrong != by_exercise[name].answer
    assert grade(by_exercise[name], wrong) is False
    assert grade(by_exercise[name], "It cannot be done.") is False
    assert code.last_block(by_exercise[name].answer)


def test_answers_in_a_box_are_right() -> None:
    """Catches fractions that the grader does not read."""
    for problem in generated_problems("mathematics", n=40):
        assert grade(problem, f"So it is {problem.answer}.")
        assert grade(problem, r"So it is \boxed{-1}.") is False
    (chance,) = [p for p in generated_problems("mathematics", n=40) if "/" in p.expected][:1]
    numerator, denominator = chance.expected.split("/")
    assert grade(chance, rf"\boxed{{\frac{{{numerator}}}{{{denominator}}}}}")


def test_any_three_rules_go_together() -> None:
    """Catches rules of which one forbids what another asks for."""
    for seed in range(3):
        rng = random.Random(seed)
        for makers in itertools.product(
            instructions.CONTENT, instructions.SHAPES, instructions.STYLES
        ):
            content, shape, style = (maker(rng) for maker in makers)
            reply = style.apply(shape.apply(content.apply("we walk")))
            for wish in (content, shape, style):
                assert holds(wish, reply), (wish.rule, wish.given, reply)


BREAKING = {
    "keywords:forbidden_words": "a very really always never people because important great nice",
    "length_constraints:number_words": "word " * 20,
    "punctuation:no_comma": "here, there",
    "change_case:english_lowercase": "Here",
    "change_case:english_capital": "Here",
}


@pytest.mark.parametrize(
    "maker",
    [*instructions.CONTENT, *instructions.SHAPES, *instructions.STYLES],
    ids=lambda maker: maker.__name__,
)
def test_a_rule_that_is_not_kept_is_noticed(maker: instructions.Maker) -> None:
    """Catches a wish whose rule is given in names that its checker does not know."""
    wish = maker(random.Random(1))
    reply = BREAKING.get(wish.rule, "here and there")
    if wish.given.get("relation") == "less than":
        reply *= 10
    assert holds(wish, reply) is False


def holds(wish: instructions.Wish, reply: str) -> bool | None:
    expected = json.dumps([[wish.rule, wish.given]])
    return grade(Problem("instructions/x", "", (), "", "", expected), reply)


@pytest.mark.parametrize("name", GENERATED)
def test_a_seed_makes_the_same_problems(name: str) -> None:
    """Catches a benchmark that is another one at each call, or shorter than it says."""
    problems = generated_problems(name)
    assert len({problem.key for problem in problems}) == N_PROBLEMS
    assert generated_problems(name, n=40)[:N_PROBLEMS] == problems
    assert generated_problems(name, seed=1) != problems
    assert {problem.kind for problem in problems} == {f"{name}/built-in"}
    assert all(problem.answer for problem in problems)


def test_more_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search for one more exercise that never ends."""
    monkeypatch.setattr(generated, "MOST_IN_VAIN", 0)
    with pytest.raises(QwqError, match=r"code: 100000 problems are wanted and about \d+ are there"):
        generated_problems("code", n=100_000)


def test_they_are_asked_by_name() -> None:
    """Catches a name that is looked for on the disk, and a wrong one that is not explained."""
    settings = EvaluationSettings(n_problems=0, n_task_problems=2)
    problems = suite.choose_problems(settings, [Path(name) for name in GENERATED])
    assert [problem.kind.partition("/")[0] for problem in problems] == [*GENERATED] * 2
    with pytest.raises(QwqError, match=r"physics: no such file or folder; .* mathematics, code"):
        suite.choose_problems(settings, [Path("physics")])


def test_a_wrong_name_is_told_before_work(tmp_path: Path) -> None:
    """Catches a slip of the keyboard that shows when a large model's reference is made."""
    folder = write_checkpoint(tmp_path / "tiny", config={"num_hidden_layers": 1})
    ask = pipeline.Ask(EvaluationSettings(n_tokens=20), tasks=(Path("maths"),))
    seen: list[str] = []
    with Checkpoint.open(folder) as checkpoint, pytest.raises(QwqError, match="maths: no such"):
        pipeline.prepare(
            checkpoint,
            Manifest(tmp_path / "out"),
            ask,
            threads=1,
            on_progress=lambda what, *_: seen.append(what),
        )
    assert not seen
