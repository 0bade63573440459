"""Benchmark files in the forms they are published in, and how their replies are graded."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from convert.errors import QwqError
from quant_eval.benchmarks import grade, mathematics
from quant_eval.benchmarks.loading import load_problems
from quant_eval.benchmarks.needles import DEPTHS, needle_problems
from quant_eval.tasks import Problem
from quant_eval.tasks.problem import BOXED_REQUEST, CHOICE_REQUEST

AIME = {"ID": "2024-I-1", "Problem": "What is $2+2$?", "Solution": "Add. $\\boxed{4}$", "Answer": 4}
MATH = {
    "problem": "Halve $\\sqrt{3}$.",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "It was $\\boxed{1}$, and so it is $\\boxed{\\frac{\\sqrt{3}}{2}}$.",
}
GSM8K = {"question": "Ann had 1,000 eggs, twice.", "answer": "1000 + 1000 = <<2000>>\n#### 2,000"}
GPQA = {
    "Question": "Which is a noble gas?",
    "Correct Answer": "Neon\n",
    "Incorrect Answer 1": "Iron",
    "Incorrect Answer 2": "Zinc",
    "Incorrect Answer 3": "Lead",
}
TESTS = [{"input": "2 3\n", "output": "5\n", "testtype": "stdin"}]
MORE_TESTS = [{"input": "-1 1\n", "output": "0", "testtype": "stdin"}]
LIVE_CODE = {
    "question_title": "Sum",
    "question_content": "Print the sum of two integers.",
    "question_id": "abc_a",
    "starter_code": "",
    "public_test_cases": json.dumps(TESTS),
    "private_test_cases": base64.b64encode(
        zlib.compress(pickle.dumps(json.dumps(MORE_TESTS)))
    ).decode(),
    "metadata": "{}",
}
FUNCTION = LIVE_CODE | {
    "question_content": "Reverse a list.",
    "starter_code": "class Solution:\n    def turn(self, values: List[int]) -> List[int]:\n",
    "public_test_cases": json.dumps(
        [{"input": "[1, 2]", "output": "[2, 1]", "testtype": "functional"}]
    ),
    "private_test_cases": "[]",
    "metadata": '{"func_name": "turn"}',
}
IFEVAL = {
    "key": 1000,
    "prompt": "Write two words without a comma.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None}, {"relation": "less than", "num_words": 3, "keyword": None}],
}


def write(path: Path, *records: dict[str, Any]) -> Path:
    """In the form that the suffix names."""
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, records)))
        case ".json":
            path.write_text(json.dumps(list(records)))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, records[0].keys())
                writer.writeheader()
                cells = (
                    {k: json.dumps(v) if isinstance(v, list) else v for k, v in one.items()}
                    for one in records
                )
                writer.writerows(cells)
        case ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


def load_one(path: Path, record: dict[str, Any]) -> Problem:
    (problem,) = load_problems(write(path, record))
    return problem


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("name", "record", "right", "wrong"),
    [
        ("aime24", AIME, "So \\boxed{4}", "So 4, not \\boxed{5}"),
        ("math", MATH, "$\\boxed{\\sqrt3/2}$", "$\\boxed{\\frac{\\sqrt{3}}{3}}$"),
        ("gsm8k", GSM8K, "\\boxed{2{,}000}", "\\boxed{200}"),
        ("gpqa", GPQA, None, '{"answer": "Z"}'),
        ("lcb", LIVE_CODE, "```python\nprint(sum(map(int, input().split())))\n```", "5"),
        ("ifeval", IFEVAL, "Two words", "Two, words"),
    ],
)
def test_every_benchmark_in_every_form(
    name: str, record: dict[str, Any], right: str | None, wrong: str, suffix: str, tmp_path: Path
) -> None:
    """Catches fields of other spelling, cells that are JSON, and a grader of another family."""
    problem = load_one(tmp_path / f"{name}{suffix}", record)
    assert problem.kind.endswith(f"/{name}")
    question = problem.messages[0]["content"]
    if right is None:
        letters = [line[0] for line in question.splitlines() if line[1:] == ") Neon"]
        right = f'My choice: {{"answer": "{letters[0]}"}}'
        assert question.endswith(CHOICE_REQUEST)
    if problem.kind.startswith("mathematics/"):
        assert question.endswith(BOXED_REQUEST)
    assert grade(problem, right) is True
    assert grade(problem, wrong) is False
    assert grade(problem, "") is False


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    """Catches MATH as it was first published, a file a problem, and an order that is the disk's."""
    folder = tmp_path / "math"
    for kind in ("algebra", "geometry"):
        (folder / kind).mkdir(parents=True)
        text = json.dumps(MATH | {"problem": f"A {kind} question."})
        (folder / kind / "1.json").write_text(text)
    problems = load_problems(folder)
    assert [one.kind for one in problems] == ["mathematics/math"] * 2
    assert [one.key for one in problems] == ["A algebra question.", "A geometry question."]


def test_choices_keep_their_letters(tmp_path: Path) -> None:
    """Catches answers as positions, letters or texts that are read as one another."""
    options = {"question": "Which?", "choices": ["a", "b", "c"]}
    for answer in (1, "B", "(b)", "b"):
        assert load_one(tmp_path / "q.jsonl", options | {"answer": answer}).expected == "B"
    drawn = {
        load_one(tmp_path / "q.jsonl", GPQA | {"Question": f"{i}?"}).expected for i in range(40)
    }
    assert drawn == set("ABCD")


def test_functions_are_called_with_their_arguments(tmp_path: Path) -> None:
    """Catches a solution that is run as a program, and tests that only the public ones are."""
    problem = load_one(tmp_path / "lcb.jsonl", FUNCTION)
    assert "def turn" in problem.messages[0]["content"]
    start = "```python\nclass Solution:\n    def turn(self, values: List[int]):\n"
    solution = start + "        return {0}\n```"
    assert grade(problem, solution.format("values[::-1]"))
    assert not grade(problem, solution.format("values"))
    both = load_one(tmp_path / "lcb.jsonl", LIVE_CODE)
    assert len(json.loads(both.expected)["tests"]) == 2
    assert not grade(both, "```python\nprint(5)\n```")


class _Burglar:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("burgled").touch, ())


def test_a_pickle_is_read_and_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark's file that runs what it likes."""
    monkeypatch.chdir(tmp_path)
    packed = base64.b64encode(zlib.compress(pickle.dumps(_Burglar()))).decode()
    path = write(tmp_path / "lcb.jsonl", LIVE_CODE | {"private_test_cases": packed})
    with pytest.raises(QwqError, match="private_test_cases"):
        load_problems(path)
    assert not Path("burgled").exists()


def test_rules_that_are_unknown_grade_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a pass by rules that nobody checked; one that is broken fails all the same.

    And rules that are left out without a word.
    """
    rules = ["punctuation:no_comma", "language:response_language"]
    record = IFEVAL | {"instruction_id_list": rules, "kwargs": [{}, {"language": "hi"}]}
    problem = load_one(tmp_path / "ifeval.jsonl", record)
    assert "1 of 1 problems" in caplog.text
    assert "language:response_language: a trained detector" in caplog.text
    assert grade(problem, "fine") is None
    assert grade(problem, "not, fine") is False
    bare = IFEVAL | {"kwargs": [{}, {}]}
    assert grade(load_one(tmp_path / "bare.jsonl", bare), "fine") is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "no such file"),
        ("notes.txt", "", "is none of .jsonl"),
        ("empty.jsonl", "\n", "holds no problem"),
        ("bad.json", "{", "no valid JSON"),
        ("list.jsonl", "[1]", "no record"),
        ("odd.jsonl", '{"text": "x"}', "has none of problem, question, prompt"),
        ("unboxed.jsonl", '{"problem": "x", "solution": "y"}', "boxes no answer"),
        ("bad.parquet", "PAR1", "cannot be read as Parquet"),
        ("bad.csv", "question,answer\n\x00\ufffd", "."),
        ("q.jsonl", '{"question": "x", "choices": ["a"], "answer": "A"}', "1 options"),
        ("q.jsonl", '{"question": "x", "choices": ["a", "b"], "answer": "C"}', "the answer 'C'"),
        ("i.jsonl", '{"prompt": "x", "instruction_id_list": ["a"], "kwargs": []}', "1 rules"),
        ("c.jsonl", '{"question_content": "x"}', "has no tests"),
        ("c.jsonl", '{"question_content": "x", "public_test_cases": "!"}', "cannot be unpacked"),
    ],
)
def test_bad_files_are_named(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    """Catches a stack trace, and a record that is left out in silence."""
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(QwqError, match=words):
        load_problems(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(QwqError, match="holds none of"):
        load_problems(tmp_path / "empty")


@pytest.mark.parametrize(
    ("expected", "answer", "same"),
    [
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("033", "\\boxed{33}", True),
        ("(1, 2)", "first \\boxed{3}, then \\boxed{(1,2)}", True),
        ("x^2+1", "\\boxed{1+x^2}", True),
        ("10", "10", False),
        ("10", "\\boxed{", False),
        ("3", "\\boxed{9^{9^{9^{9}}}}", False),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", True),
    ],
)
def test_answers_are_compared_as_mathematics(
    expected: str, answer: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches equal numbers of other spelling, answers outside a box, and towers of powers."""
    monkeypatch.setattr(mathematics, "TIMEOUT_S", 1)
    problem = Problem("mathematics/m", "", (), reasoning="", answer="", expected=expected)
    assert grade(problem, answer) is same


def test_needles_lie_where_they_should() -> None:
    """Catches texts of another length, and a number that stands twice or nowhere."""

    def count(text: str) -> int:
        return len(text.split())

    for n_tokens in (300, 2000):
        problems = needle_problems(n_tokens, count=count)
        assert len(problems) == len(DEPTHS)
        for problem, depth in zip(problems, DEPTHS, strict=True):
            text = problem.messages[0]["content"]
            assert n_tokens <= count(text) <= n_tokens + 20
            assert text.count(problem.expected) == 1
            assert text.index(problem.expected) / len(text) == pytest.approx(depth, abs=0.1)
            assert grade(problem, f"It is {problem.expected}.")
            assert not grade(problem, "It is 12345.")
            assert not grade(problem, "It is not there.")
    again = needle_problems(300, count=count)
    assert [one.key for one in again] == [one.key for one in needle_problems(300, count=count)]
