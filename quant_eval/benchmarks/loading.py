"""Records of AIME, MATH, GSM8K, GPQA, LiveCodeBench and IFEval -> problems with their prompts.

A record is told by the fields it has; prompts are as QwQ's model card has them.
"""

import base64
import binascii
import json
import logging
import pickletools
import random
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import QwqError
from quant_eval.benchmarks.instructions import why_ungraded
from quant_eval.benchmarks.mathematics import last_boxed
from quant_eval.benchmarks.records import read_records
from quant_eval.tasks import Problem
from quant_eval.tasks.problem import BOXED_REQUEST, CHOICE_REQUEST, user_turn

LETTERS = "ABCDEFGHIJ"
PROGRAM_REQUEST = (
    "Write a Python program that solves this problem. It reads from standard input and writes to "
    "standard output, with nothing but the standard library. Give the whole program in one "
    "```python block."
)
FUNCTION_REQUEST = (
    "Write a Python solution of this problem that completes the following code, with nothing but "
    "the standard library. Give the whole code in one ```python block.\n\n```python\n{0}\n```"
)
MAX_TESTS_NBYTES = 1 << 28  # of one problem's tests, unpacked

Fields = Mapping[str, Any]
_log = logging.getLogger(__name__)


def load_problems(path: Path) -> list[Problem]:
    """All problems of a benchmark's file or folder, in its order; their kinds end in its name.

    Raises QwqError for a record that is of none of the known forms, and where there is none.
    """
    name = path.stem if path.is_file() else path.name
    problems = [_problem(fields, where, name) for fields, where in read_records(path)]
    if not problems:
        raise QwqError(f"{path}: holds no problem; give a benchmark's file")
    for reason, n in Counter(filter(None, map(_why_ungraded, problems))).items():
        _log.warning(
            "%s: %d of %d problems are not graded where their other rules hold (%s)",
            *(path, n, len(problems), reason),
        )
    return problems


def _why_ungraded(problem: Problem) -> str:
    return why_ungraded(problem) if problem.kind.startswith("instructions/") else ""


def _problem(fields: Fields, where: str, name: str) -> Problem:
    if "instruction_id_list" in fields:
        return _instructions(fields, where, name)
    if "question_content" in fields:
        return _code(fields, where, name)
    if "correct_answer" in fields:
        wrong = [fields[key] for key in sorted(fields) if re.fullmatch(r"incorrect_answer.*", key)]
        return _shuffled_choice(_text(fields, where, "question"), fields, wrong, where, name)
    if "choices" in fields or "options" in fields:
        return _choice(fields, where, name)
    return _mathematics(fields, where, name)


def _text(fields: Fields, where: str, *names: str) -> str:
    """The first of these fields that says something."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, str | int | float) and str(value).strip():
            return str(value).strip()
    raise QwqError(f"{where}: has none of {', '.join(names)}; give a benchmark that is known")


def _mathematics(fields: Fields, where: str, name: str) -> Problem:
    """AIME and MATH with an answer, or with a solution that boxes it; GSM8K's after `####`."""
    question = _text(fields, where, "problem", "question", "prompt")
    solution = _text(fields, where, "answer", "final_answer", "expected_answer", "solution")
    marked = solution.rpartition("####")[2].strip().replace(",", "") if "####" in solution else ""
    expected = marked or last_boxed(solution) or ("" if "answer" not in fields else solution)
    if not expected:
        raise QwqError(f"{where}: its solution boxes no answer; mend or remove it")
    return Problem(
        kind=f"mathematics/{name}",
        key=question,
        messages=user_turn(f"{question}\n{BOXED_REQUEST}"),
        reasoning="",
        answer="",
        expected=expected,
    )


def _shuffled_choice(
    question: str, fields: Fields, wrong: list[Any], where: str, name: str
) -> Problem:
    """GPQA: the right answer first in the file, so the order is drawn by the question."""
    right = _text(fields, where, "correct_answer")
    options = [right, *(str(one).strip() for one in wrong if one is not None)]
    random.Random(question).shuffle(options)
    return _choice_of(question, options, LETTERS[options.index(right)], where, name)


def _choice(fields: Fields, where: str, name: str) -> Problem:
    """Options as a list or under letters; the answer as a letter, a position or the text itself."""
    listed = fields.get("choices", fields.get("options"))
    if isinstance(listed, Mapping):
        listed = listed.get("text", list(listed.values()))
    if not isinstance(listed, list):
        raise QwqError(f"{where}: its options are no list; mend or remove it")
    options = [str(one).strip() for one in listed]
    answer = _text(fields, where, "answer", "answerkey", "label")
    if answer in options:
        letter = LETTERS[options.index(answer)]
    elif answer.isdecimal() and int(answer) < len(options):
        letter = LETTERS[int(answer)]
    else:
        letter = answer.strip("()").upper()
    question = _text(fields, where, "question", "problem", "prompt")
    return _choice_of(question, options, letter, where, name)


def _choice_of(question: str, options: list[str], letter: str, where: str, name: str) -> Problem:
    if not 2 <= len(options) <= len(LETTERS) or letter not in LETTERS[: len(options)]:
        raise QwqError(
            f"{where}: has {len(options)} options and the answer {letter!r}; mend or remove it"
        )
    listed = "\n".join(f"{a}) {b}" for a, b in zip(LETTERS, options, strict=False))
    return Problem(
        kind=f"choice/{name}",
        key=question,
        messages=user_turn(f"{question}\n\n{listed}\n\n{CHOICE_REQUEST}"),
        reasoning="",
        answer="",
        expected=letter,
    )


def _instructions(fields: Fields, where: str, name: str) -> Problem:
    """IFEval: the prompt as it is; its rules with what they are asked to hold."""
    rules, arguments = (_decoded(fields, key, where) for key in ("instruction_id_list", "kwargs"))
    if not isinstance(rules, list) or not isinstance(arguments, list):
        raise QwqError(f"{where}: its rules or kwargs are no list; mend or remove it")
    if len(rules) != len(arguments) or not rules:
        raise QwqError(
            f"{where}: has {len(rules)} rules and kwargs for {len(arguments)}; mend or remove it"
        )
    held = [
        [rule, {key: value for key, value in (given or {}).items() if value is not None}]
        for rule, given in zip(rules, arguments, strict=True)
    ]
    prompt = _text(fields, where, "prompt")
    return Problem(
        kind=f"instructions/{name}",
        key=prompt,
        messages=user_turn(prompt),
        reasoning="",
        answer="",
        expected=json.dumps(held),
    )


def _code(fields: Fields, where: str, name: str) -> Problem:
    """LiveCodeBench: all tests, public and private; a function's where there is starter code."""
    question = _text(fields, where, "question_content")
    tests = []
    for key in ("public_test_cases", "private_test_cases"):
        if fields.get(key):
            tests += _tests(fields[key], f"{where}, {key}")
    if not tests:
        raise QwqError(f"{where}: has no tests; mend or remove it")
    starter = fields.get("starter_code") or ""
    metadata = _decoded({"metadata": fields.get("metadata") or "{}"}, "metadata", where)
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    if starter and not function:
        named = re.findall(r"def\s+(\w+)\s*\(\s*self", starter)
        function = named[-1] if named else None
    request = FUNCTION_REQUEST.format(starter) if starter else PROGRAM_REQUEST
    return Problem(
        kind=f"code/{name}",
        key=question,
        messages=user_turn(f"{question}\n\n{request}"),
        reasoning="",
        answer="",
        expected=json.dumps({"function": function, "tests": tests}),
    )


def _tests(value: Any, where: str) -> list[list[str]]:
    """Pairs of input and output."""
    listed = _unpacked(value, where) if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(
        isinstance(test, dict) and {"input", "output"} <= test.keys() for test in listed
    ):
        raise QwqError(f"{where}: is no list of inputs and outputs; fetch it again")
    return [[str(test["input"]), str(test["output"])] for test in listed]


def _unpacked(text: str, where: str) -> Any:
    """JSON as it is, or as it is published: JSON in a pickle, compressed, in base64.

    The pickle is not loaded, which could run anything: the one string in it is read.
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        packed = base64.b64decode(text, validate=True)
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(packed, MAX_TESTS_NBYTES)
        strings = [one for _, one, _ in pickletools.genops(pickled) if isinstance(one, str)]
        return json.loads(max(strings, key=len, default=""))
    except (binascii.Error, zlib.error, ValueError, RecursionError) as error:
        raise QwqError(f"{where}: cannot be unpacked ({error}); fetch it again") from error


def _decoded(fields: Fields, key: str, where: str) -> Any:
    """A field that may be JSON in a string, as CSV has it."""
    value = fields.get(key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise QwqError(f"{where}: its {key} is no JSON ({error}); fetch it again") from error
