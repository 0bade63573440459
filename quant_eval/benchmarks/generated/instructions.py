"""Requests of several rules at once, of IFEval's kinds, each with a reply that keeps them all.

A request has one rule on the shape of the reply, one on its content and one on its style, drawn
each by itself, so that any three go together. The reply is built in the same three steps.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from quant_eval.tasks.problem import Problem, user_turn

_TOPICS = (
    "a letter to a neighbour about a shared garden|advice for a first day in a new school|"
    "a short report on a walk by the sea|an invitation to a chess evening|a note on how to keep "
    "bread fresh|a story of a lost umbrella|a description of a small railway station|a speech at "
    "the opening of a library|a plan for a week without a car|a review of an imaginary museum"
).split("|")
_WORDS = "lantern harbour copper meadow violin compass orchard granite ribbon thunder".split()
_BANNED = "very really always never people because important great nice thing".split()
_ENDINGS = ("That is all for now.", "Please pass it on.", "The rest will follow.")
_FILLER = "we walk on by day and stop at dusk"  # keeps every rule that forbids something


@dataclass(frozen=True, slots=True)
class Wish:
    """A rule of benchmarks/instructions.py, how it is asked for, and how a reply keeps it.

    apply: what the reply is before -> what it is with this rule kept.
    """

    rule: str
    words: str
    apply: Callable[[str], str]
    given: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[random.Random], Wish]


def problem(rng: random.Random) -> Problem:
    """A request with three rules."""
    topic = rng.choice(_TOPICS)
    content, shape, style = (rng.choice(makers)(rng) for makers in (CONTENT, SHAPES, STYLES))
    wishes = (shape, content, style)
    request = f"Write {topic}. {' '.join(wish.words for wish in wishes)}"
    return Problem(
        kind="instructions/built-in",
        key=request,
        messages=user_turn(request),
        reasoning="",
        answer=style.apply(shape.apply(content.apply(_FILLER))),
        expected=json.dumps([[wish.rule, wish.given] for wish in wishes]),
    )


def _keywords(rng: random.Random) -> Wish:
    words = rng.sample(_WORDS, 3)
    return Wish(
        "keywords:existence",
        f"Use the words {words[0]}, {words[1]} and {words[2]}.",
        lambda text: f"{text} with {' and '.join(words)}",
        {"keywords": words},
    )


def _frequency(rng: random.Random) -> Wish:
    word, n = rng.choice(_WORDS), rng.randint(3, 6)
    return Wish(
        "keywords:frequency",
        f"Use the word {word} at least {n} times.",
        lambda text: f"{text} with {' and '.join([word] * n)}",
        {"keyword": word, "relation": "at least", "frequency": n},
    )


def _forbidden(rng: random.Random) -> Wish:
    words = rng.sample(_BANNED, 3)
    return Wish(
        "keywords:forbidden_words",
        f"Do not use any of the words {words[0]}, {words[1]} and {words[2]}.",
        lambda text: text,
        {"forbidden_words": words},
    )


def _letter(rng: random.Random) -> Wish:
    letter, n = rng.choice("kvwxyz"), rng.randint(5, 12)
    return Wish(
        "keywords:letter_frequency",
        f"The letter {letter} is to appear at least {n} times.",
        lambda text: f"{text} with {letter * n}",
        {"letter": letter, "let_relation": "at least", "let_frequency": n},
    )


def _placeholders(rng: random.Random) -> Wish:
    n = rng.randint(2, 5)
    return Wish(
        "detectable_content:number_placeholders",
        f"Put in at least {n} placeholders in square brackets, such as [name].",
        lambda text: f"{text} with {' and '.join(['[name]'] * n)}",
        {"num_placeholders": n},
    )


def _highlights(rng: random.Random) -> Wish:
    n = rng.randint(2, 4)
    return Wish(
        "detectable_format:number_highlighted_sections",
        f"Highlight at least {n} passages with asterisks, *like this*.",
        lambda text: f"{text} with {' and '.join(['*care*'] * n)}",
        {"num_highlights": n},
    )


def _bullets(rng: random.Random) -> Wish:
    n = rng.randint(3, 7)
    return Wish(
        "detectable_format:number_bullet_lists",
        f"Have exactly {n} bullet points, each on a line that begins with a hyphen.",
        lambda text: "\n".join([f"- {text}", *[f"- {_FILLER}"] * (n - 1)]),
        {"num_bullets": n},
    )


def _paragraphs(rng: random.Random) -> Wish:
    n = rng.randint(2, 5)
    return Wish(
        "length_constraints:number_paragraphs",
        f"Write exactly {n} paragraphs, divided by *** alone on a line.",
        lambda text: "\n***\n".join([text, *[_FILLER] * (n - 1)]),
        {"num_paragraphs": n},
    )


def _sections(rng: random.Random) -> Wish:
    n = rng.randint(2, 5)
    return Wish(
        "detectable_format:multiple_sections",
        f"Have {n} sections, and begin each with a line of the sign § and its number, as in § 1.",
        lambda text: "\n".join(f"§ {i + 1}\n{_FILLER if i else text}" for i in range(n)),
        {"section_spliter": "§", "num_sections": n},
    )


def _longest(rng: random.Random) -> Wish:
    n = 10 * rng.randint(5, 12)
    return Wish(
        "length_constraints:number_words",
        f"Use fewer than {n} words.",
        lambda text: text,
        {"relation": "less than", "num_words": n},
    )


def _shortest(rng: random.Random) -> Wish:
    n = 50 * rng.randint(3, 8)
    return Wish(
        "length_constraints:number_words",
        f"Use at least {n} words.",
        lambda text: " ".join([text, *[_FILLER] * (n // len(_FILLER.split()) + 1)]),
        {"relation": "at least", "num_words": n},
    )


def _no_comma(_: random.Random) -> Wish:
    return Wish("punctuation:no_comma", "Use no comma.", lambda text: text)


def _lower_case(_: random.Random) -> Wish:
    words = "Write in small letters only, without one capital letter."
    return Wish("change_case:english_lowercase", words, str.lower)


def _upper_case(_: random.Random) -> Wish:
    words = "Write in capital letters only."
    return Wish("change_case:english_capital", words, str.upper)


def _ending(rng: random.Random) -> Wish:
    phrase = rng.choice(_ENDINGS)
    return Wish(
        "startend:end_checker",
        f'Let the reply end with exactly these words and nothing after them: "{phrase}"',
        lambda text: f"{text} {phrase}",
        {"end_phrase": phrase},
    )


def _postscript(_: random.Random) -> Wish:
    return Wish(
        "detectable_content:postscript",
        "Add a postscript at the end that begins with P.S.",
        lambda text: f"{text}\nP.S. until then",
        {"postscript_marker": "P.S."},
    )


def _title(_: random.Random) -> Wish:
    words = "Give it a title in double angle brackets, as in <<title>>."
    return Wish("detectable_format:title", words, lambda text: f"<<On the way>>\n{text}")


def _quotation(_: random.Random) -> Wish:
    words = "Put the whole reply in double quotation marks, each of them alone on a line."
    return Wish("startend:quotation", words, lambda text: f'"\n{text}\n"')


CONTENT: tuple[Maker, ...] = (
    _keywords,
    _frequency,
    _forbidden,
    _letter,
    _placeholders,
    _highlights,
)
SHAPES: tuple[Maker, ...] = (_bullets, _paragraphs, _sections, _longest, _shortest)
STYLES: tuple[Maker, ...] = (
    _no_comma,
    _lower_case,
    _upper_case,
    _ending,
    _postscript,
    _title,
    _quotation,
)
