"""A problem with its working, and the conversations that can be made of one."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from convert.calibration import Conversation
from convert.texts.thought import Thought

T = TypeVar("T")

BOXED = (
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Give the final answer in \\boxed{}.",
    "Put the final answer within \\boxed{}, please.",
    "Please think it through and box the result as \\boxed{}.",
)
CHOICE = (
    'Please show your choice in the `answer` field with only the choice letter, e.g., "answer": '
    '"C".'
)


class Dice(random.Random):
    """Seeded chance that also knows which half of what was written by hand it draws from."""

    def __init__(self, seed: str, half: int) -> None:
        super().__init__(seed)
        self._half = half

    def own(self, items: Iterable[T]) -> T:
        """One of every second item; the others are for the other half of the text."""
        return self.choice(list(items)[self._half :: 2])


Maker = Callable[[Dice, int], Conversation]
"""maker(rng, size): size from 1, a few sentences, to 4, some thousands of tokens."""


@dataclass(frozen=True, slots=True)
class Worked:
    """A question whose answer is a number or a word.

    explanation: the answer's reasons, without the result itself. near: what slips would give.
    """

    question: str
    thought: Thought
    explanation: str
    result: str
    near: tuple[str, ...] = ()


Problem = Callable[[random.Random, int], Worked]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def boxed(kind: str, problem: Problem, requests: Sequence[str] = BOXED) -> Maker:
    """Ask the problem openly; the result goes in a box."""

    def make(rng: Dice, size: int) -> Conversation:
        worked = problem(rng, size)
        between = rng.choice(("\n", "\n\n", " "))
        return Conversation(
            kind,
            (user(worked.question + between + rng.choice(requests)),),
            worked.thought.text,
            f"{worked.explanation}\n\n\\boxed{{{worked.result}}}",
        )

    return make


def choice(problem: Problem) -> Maker:
    """Ask the problem with four options; the letter goes in the JSON field `answer`."""

    def make(rng: Dice, size: int) -> Conversation:
        worked = problem(rng, size)
        options = _options(rng, worked)
        letters = dict(zip(options, "ABCD", strict=True))
        right = letters[worked.result]
        mark = rng.choice(("{}) {}", "({}) {}", "{}. {}"))
        listing = "\n".join(mark.format(letter, option) for option, letter in letters.items())
        thought = worked.thought
        thought.gap().say(
            f"Now the options: {', '.join(f'{b} is {a}' for a, b in letters.items())}.",
            f"Which letter is that? {worked.result} stands under {right}.",
            f"I look for {worked.result} among the options and find it at {right}.",
            f"Comparing with the choices, {worked.result} is option {right}.",
        )
        other = rng.choice([letter for letter in letters.values() if letter != right])
        if rng.random() < 0.5:
            thought.say(
                f"The others, such as {other}, do not come out of the numbers.",
                f"Option {other} would need a slip somewhere, and I checked.",
                f"{other} looks tempting at a glance, but it is not what I computed.",
            )
        answer = json.dumps({"answer": right})
        if rng.random() < 0.6:
            answer = f"{worked.explanation}\n\n{answer}"
        request = f"{worked.question}\n{listing}\n{CHOICE}"
        return Conversation("choice", (user(request),), thought.text, answer)

    return make


@dataclass(frozen=True, slots=True)
class Sheet:
    """What is said around the parts of a sheet; {k}: a part's letter, {n}: how many there are."""

    requests: tuple[str, ...]
    opening: tuple[str, ...]
    part: tuple[str, ...]
    between: tuple[str, ...]
    again: tuple[str, ...]
    ending: tuple[str, ...]


ENGLISH_SHEET = Sheet(
    (
        "Solve all {n} parts. Put the final answers within \\boxed{}, in order, separated by commas.",
        (
            "Here is a sheet of {n} problems. Work out each and give all results in one \\boxed{}, "
            "separated by commas."
        ),
    ),
    (
        "There are {n} parts that do not depend on each other. One after the other, then.",
        "{n} separate problems. I'll take them in order and collect the results at the end.",
    ),
    ("Part ({k}).", "Now for ({k}).", "On to part ({k}).", "({k}):"),
    (
        "So ({k}) gives {x}. I'll note that down.",
        "That settles ({k}): {x}.",
        "({k}) is {x}, then. Next.",
        "Result of ({k}): {x}. Put it aside.",
    ),
    (
        "Before I write it up, ({k}) once more, since it had the most steps. {why} Yes, {x}.",
        "Let me look back at ({k}), where a slip is likeliest. {why} It stays at {x}.",
    ),
    ("All together: {all}.", "Collected: {all}.", "So the list is {all}."),
)


def worksheet(kind: str, problems: Sequence[Problem], sheet: Sheet = ENGLISH_SHEET) -> Maker:
    """Several problems in one prompt, for thoughts that are long."""

    def make(rng: Dice, size: int) -> Conversation:
        parts = [
            problem(rng, size) for problem in rng.sample(problems, min(2 + size, len(problems)))
        ]
        n = str(len(parts))
        letters = "abcdefgh"[: len(parts)]
        request = rng.choice(sheet.requests).replace("{n}", n)
        question = "\n\n".join(
            [request, *(f"({k}) {part.question}" for k, part in zip(letters, parts, strict=True))]
        )
        lines = [rng.choice(sheet.opening).replace("{n}", n)]
        for k, part in zip(letters, parts, strict=True):
            lines.append(f"{rng.choice(sheet.part).replace('{k}', k)}\n\n{part.thought.text}")
            said = rng.choice(sheet.between).replace("{k}", k)
            lines.append(said.replace("{x}", part.result))
        for k, part in rng.sample(list(zip(letters, parts, strict=True)), (1 + size) // 2):
            said = rng.choice(sheet.again).replace("{k}", k).replace("{x}", part.result)
            lines.append(said.replace("{why}", part.explanation))
        results = ", ".join(part.result for part in parts)
        lines.append(rng.choice(sheet.ending).replace("{all}", results))
        answers = [f"({k}) {part.explanation}" for k, part in zip(letters, parts, strict=True)]
        answer = "\n\n".join([*answers, f"\\boxed{{{results}}}"])
        return Conversation(kind, (user(question),), "\n\n".join(lines), answer)

    return make


def _options(rng: random.Random, worked: Worked) -> list[str]:
    """The result and three others, in any order."""
    others = dict.fromkeys(near for near in worked.near if near != worked.result)
    wrong = list(others)[:3]
    step = 0
    while len(wrong) < 3:
        step += 1
        for moved in (_moved(worked.result, step), _moved(worked.result, -step)):
            if moved != worked.result and moved not in wrong and len(wrong) < 3:
                wrong.append(moved)
    options = [worked.result, *wrong]
    rng.shuffle(options)
    return options


def _moved(result: str, step: int) -> str:
    """A number a little off; only its numerator, where it is a fraction."""
    first, slash, rest = result.partition("/")
    return f"{int(first) + step}{slash}{rest}"
