"""Drills: the small skills inside the thoughts, many to a conversation, so that they come early.

Most of a thought follows from what stands just before it; copying a number, padding it and spelling
a word are what is hard to learn from whole problems alone.
"""

import random

from quant_eval.tasks import letters
from quant_eval.tasks.problem import Problem, user_turn


def drill(rng: random.Random) -> Problem:
    """A conversation that is all copying, all padding or all spelling."""
    make = rng.choice((_copying, _padding, _spelling))
    question, done = make(rng)
    return Problem("drill", question, user_turn(question), done, "Done.", "Done.")


def _number(rng: random.Random) -> str:
    text = str(rng.randrange(10 ** rng.randint(1, 4)))
    return text if rng.random() < 0.6 else f"{text[:2]}.{rng.randrange(10 ** rng.randint(1, 3))}"


def _copying(rng: random.Random) -> tuple[str, str]:
    numbers = " ".join(_number(rng) for _ in range(rng.randint(2, 8)))
    return f"Repeat {numbers}.", f"{numbers}.\n{numbers}."


def _padding(rng: random.Random) -> tuple[str, str]:
    asked, done = [], []
    for _ in range(rng.randint(2, 5)):
        a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
        operator = rng.choice("+-")
        width = max(len(str(a)), len(str(b)))
        asked.append(f"{a} {operator} {b}")
        done.append(f"Line up {a:0{width}} {operator} {b:0{width}}.")
    return f"Line up {', '.join(asked)}.", "\n".join(done)


def _spelling(rng: random.Random) -> tuple[str, str]:
    words: list[str] = []
    while len(words) < 5:
        problem = letters.problem(rng, 1.0)
        if not problem.is_held_out:
            words.append(problem.key)
    asked = ", ".join(f'"{word}"' for word in words)
    return f"Spell {asked}.", ".\n".join(" ".join(word) for word in words) + "."
