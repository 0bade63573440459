"""A number hidden in a long text: what a model still finds below and above the YaRN switch."""

import random
import re
from collections.abc import Callable, Sequence

from quant_eval.tasks import Problem
from quant_eval.tasks.problem import user_turn

DEPTHS = (0.02, 0.2, 0.4, 0.6, 0.8, 0.98)
"""Where the number stands, as shares of the text: a problem each."""
_PLACES = "harbour mill orchard library station bakery school museum bridge garden".split()
_TIMES = "In the morning|At noon|After the rain|Late in the evening|On market day|In winter".split(
    "|"
)
_DEEDS = (
    "the keeper of the {0} swept the steps and counted the crates",
    "two clerks near the {0} compared their lists and found them equal",
    "nobody at the {0} could say who had left the lantern burning",
    "a visitor asked the way to the {0} and was sent along the river",
    "the painter drew the {0} once more, from the other side of the square",
    "they carried chairs from the {0} into the yard and talked about the harvest",
)
_NEEDLE = "The number on the door of the {0} vault is {1}."
_QUESTION = (
    "What is the number on the door of the {0} vault? It is said once in the text above. Answer "
    "with the number alone."
)
_COLOURS = "amber crimson indigo jade ochre violet".split()


def needle_problems(
    n_tokens: int, *, count: Callable[[str], int], seed: int = 0
) -> Sequence[Problem]:
    """Problems whose texts have about n_tokens tokens, one for each of DEPTHS.

    count: tokens of a text, by the model's own tokenizer.
    """
    rng = random.Random(f"needle/{n_tokens}/{seed}")
    return [_problem(n_tokens, depth, count, rng) for depth in DEPTHS]


def _problem(
    n_tokens: int, depth: float, count: Callable[[str], int], rng: random.Random
) -> Problem:
    colour, number = rng.choice(_COLOURS), rng.randrange(10_000, 100_000)
    needle, question = _NEEDLE.format(colour, number), _QUESTION.format(colour)
    sentences = []
    n_left = n_tokens - count(f"{needle}\n\n{question}")
    lengths: dict[str, int] = {}
    while n_left > 0:
        deed = rng.choice(_DEEDS).format(rng.choice(_PLACES))
        sentence = f"{rng.choice(_TIMES)} {deed}."
        n_left -= lengths.setdefault(sentence, count(f" {sentence}"))
        sentences.append(sentence)
    sentences.insert(round(depth * len(sentences)), needle)
    return Problem(
        kind=f"needle/{n_tokens}",
        key=f"{number} at {depth}",
        messages=user_turn(f"{' '.join(sentences)}\n\n{question}"),
        reasoning="",
        answer=str(number),
        expected=str(number),
    )


def grade(problem: Problem, answer: str) -> bool:
    """The last number of five digits is the one that was hidden."""
    found = re.findall(r"(?<!\d)\d{5}(?!\d)", answer.replace(",", ""))
    return bool(found) and found[-1] == problem.expected
