"""Generated conversations: is everything in them true, are they varied, and always the same?"""

import json
import random
import re
from collections import Counter
from fractions import Fraction
from itertools import islice
from typing import Any, get_args

import pytest

from convert.calibration import Conversation, set_digest
from convert.texts import (
    MAKERS,
    Half,
    chinese,
    conversations,
    half_of,
    numbers,
    planning,
    puzzles,
    quantities,
    tables,
)
from convert.texts.coding import BUGS
from convert.texts.worked import Worked
from tests.oracles.thought_twins import TWINS

N = r"-?\d+(?:\.\d+)?"
SIDE = rf"{N}(?: [-+*/] \(?{N}\)?)*"
EQUATION = re.compile(rf"(?<![-+*/^] )(?<![\w.^/(-])({SIDE}(?: = {SIDE})+)(?![\w(/]|\.\d| [-+*/] )")
PROBLEMS = (*numbers.PROBLEMS, *quantities.PROBLEMS, *puzzles.PROBLEMS, *planning.PROBLEMS[:2])


def made(half: Half, seed: int, n: int) -> list[Conversation]:
    return list(islice(conversations(half, seed=seed, sizes=(1, 2, 3, 1, 4)), n))


@pytest.fixture(scope="module")
def everything() -> list[Conversation]:
    return [one for half in get_args(Half) for one in made(half, 3, 8 * len(MAKERS))]


def value(expression: str) -> Fraction:
    """Of numbers with + - * / between them; negative ones may stand in brackets."""
    tokens = re.sub(r"\((-?[\d.]+)\)", r"\1", expression).split(" ")
    terms = [Fraction(tokens[0])]
    for sign, text in zip(tokens[1::2], tokens[2::2], strict=True):
        number = Fraction(text)
        if sign in "+-":
            terms.append(number if sign == "+" else -number)
        else:
            terms[-1] = terms[-1] * number if sign == "*" else terms[-1] / number
    return sum(terms, Fraction(0))


def test_every_equation_holds(everything: list[Conversation]) -> None:
    """Catches arithmetic that is written down wrong, in any language."""
    n = 0
    for one in everything:
        for equation in EQUATION.findall(one.reasoning + "\n" + one.answer):
            if not re.search(" [-+*/] ", equation):
                continue
            n += 1
            first, *others = map(value, equation.split(" = "))
            off = max(abs(other - first) for other in others)
            assert off <= Fraction(1, 100), (one.kind, equation, one.reasoning)
    assert n > 3000


@pytest.mark.parametrize("problem", [*PROBLEMS, *tables.PROBLEMS], ids=lambda one: one.__name__)
def test_answers_are_right(problem: Any) -> None:
    """Catches a wrong answer, a question that does not say enough, and a slip at some size."""
    rng = random.Random(5)
    for n in range(12):
        check(problem(rng, 1 + n % 4))


@pytest.mark.parametrize("problem", [chinese.remainders, chinese.sums, chinese.table])
def test_chinese_answers_are_right(problem: Any) -> None:
    rng = random.Random(5)
    for n in range(8):
        check(problem(rng, 1 + n % 4))


def check(worked: Worked) -> None:
    twins = [twin for words, twin in TWINS.items() if re.search(words, worked.question)]
    assert len(twins) == 1, worked.question
    assert worked.result == twins[0](worked.question), worked.question
    assert worked.result in worked.thought.text


def run(code: str) -> tuple[list[str], dict[str, Any]]:
    """What a program prints, and the names that it leaves."""
    printed: list[str] = []
    names: dict[str, Any] = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    exec(code, names)
    return printed, names


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def test_programs_do_what_is_said(everything: list[Conversation]) -> None:
    """Catches a trace that ends elsewhere than the program, and tests that fail."""
    n_traced = n_written = 0
    for one in everything:
        prompt = str(one.messages[-1]["content"])
        if "print(" in prompt and one.answer.endswith("```"):
            n_traced += 1
            printed, _ = run(blocks(prompt)[0])
            assert one.answer.endswith(f"```\n{chr(10).join(printed)}\n```"), prompt
        for code in blocks(one.answer) if one.kind == "code" else ():
            n_written += "assert " in code
            run(code)
    assert n_traced >= 3
    assert n_written >= 2


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.code.split("(")[0].split()[-1])
def test_bugs_are_what_is_said(bug: Any) -> None:
    """Catches a broken function that works, and a mended one that does not."""
    for code, result in ((bug.code, bug.found), (bug.mended, bug.expected)):
        _, names = run(code)
        assert str(eval(bug.call, names)) == result


def test_choices_name_the_right_letter(everything: list[Conversation]) -> None:
    """Catches a letter of another option, and options that are equal."""
    choices = [one for one in everything if one.kind == "choice"]
    for one in choices:
        letter = json.loads(one.answer.splitlines()[-1])["answer"]
        prompt = str(one.messages[0]["content"])
        options = dict(re.findall(r"^\(?([A-D])[).] (.+)$", prompt, re.MULTILINE))
        assert len(set(options.values())) == 4
        assert options[letter] in one.reasoning
    assert len(choices) >= 12


def test_tool_calls_fit_their_tools(everything: list[Conversation]) -> None:
    """Catches a call of a tool that is not offered, and arguments that are not described."""
    n = 0
    for one in everything:
        calls = [json.loads(c) for c in re.findall(r"<tool_call>\n(.*)\n</tool_call>", one.answer)]
        calls += [c["function"] for m in one.messages for c in m.get("tool_calls", ())]
        offered = {tool["function"]["name"]: tool["function"] for tool in one.tools or ()}
        for call in calls:
            n += 1
            described = offered[call["name"]]["parameters"]
            assert set(described["required"]) == set(call["arguments"])
    assert n > 10


def test_the_same_seed_gives_the_same_text() -> None:
    """Catches text that depends on the process, on time, or on what was made before."""
    first, again, other = (set_digest(made("calibration", seed, 40)) for seed in (0, 0, 1))
    assert first == again != other


def test_text_is_varied(everything: list[Conversation]) -> None:
    """Catches text that is stamped out: the same long lines over and over."""
    lines = Counter(
        line for one in everything for line in one.reasoning.splitlines() if len(line) > 60
    )
    assert sum(n for n in lines.values() if n > 1) < 0.2 * sum(lines.values())
    openings = Counter(one.reasoning[:60] for one in everything)
    assert openings.most_common(1)[0][1] < 0.05 * len(everything)


@pytest.mark.parametrize("half", get_args(Half))
def test_prompts_keep_to_their_half(half: Half) -> None:
    """Catches a prompt that both halves may have."""
    assert all(half_of(one.messages) == half for one in made(half, 8, 40))


def test_no_placeholder_is_left(everything: list[Conversation]) -> None:
    """Catches a phrase whose value was forgotten."""
    for one in everything:
        text = one.reasoning + one.answer + str(one.messages[-1]["content"])
        if one.kind in MAKERS and one.kind not in ("code", "chinese"):
            assert not re.search(r"(?<![\\a-z_^}$])\{[a-z]{1,5}\}", text), text
