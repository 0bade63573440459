"""Word problems and advice thought through in eight languages, from phrases.json."""

import json
import random
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.resources import files
from typing import Any

from convert.calibration import Conversation
from convert.texts.thought import Thought
from convert.texts.worked import Dice, Maker, user

LANGUAGES = ("french", "german", "spanish", "portuguese", "russian", "japanese", "korean", "arabic")
_WITHOUT_BLANKS = ("japanese",)

Phrases = Mapping[str, Any]
Filled = Callable[[str], str]


@cache
def _phrases() -> Mapping[str, Phrases]:
    text = files("convert").joinpath("data", "phrases.json").read_text(encoding="utf-8")
    phrases: Mapping[str, Phrases] = json.loads(text)
    return phrases


def _fill(text: str, values: Mapping[str, object]) -> str:
    """Put values in; what stands for no value, such as \\boxed{}, stays."""
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", str(value))
    return text


def _goods(rng: random.Random, t: Thought, said: Phrases, size: int) -> tuple[dict[str, Any], int]:
    while True:
        a, b, c, d = (rng.randint(2, 5 + size) for _ in range(4))
        x, y = rng.randint(2, 9 + 6 * size), rng.randint(2, 9 + 6 * size)
        k = a * d - c * b
        if k > 0:
            break
    m, n = a * x + b * y, c * x + d * y
    values: dict[str, Any] = {
        "a": a,
        "b": b,
        "c": c,
        "d": d,
        "m": m,
        "n": n,
        "x": x,
        "y": y,
        "k": k,
        "ax": a * x,
    }
    values |= {"by": b * y, "l": m * d - n * b, "ab": a + b}
    fill = partial(_fill, values=values)
    t.say(fill(said["let"]))
    if size > 1:
        t.gap().say(fill(said["guess"])).turn("doubt")
    t.gap().say(fill(said["eliminate"])).gap()
    t.line(f"{a * d}x + {b * d}y = {m * d}").line(f"{c * b}x + {b * d}y = {n * b}").gap()
    t.say(f"{m * d} - {n * b} = {m * d - n * b}, {a * d} - {c * b} = {k}.", fill(said["subtract"]))
    t.say(fill(said["subtract"])).turn("doubt", chance=0.5).say(fill(said["back"]))
    t.gap().turn("check")
    t.say(f"{a} * {x} + {b} * {y} = {m}, {c} * {x} + {d} * {y} = {n}.").turn("fine")
    if size > 1:
        t.gap().turn("second").gap()
        k_y = f"{a * d - c * b}y = {a} * {n} - {c} * {m}"
        t.line(f"{k_y} = {a * n - c * m}, y = {y}.").turn("agree")
    if size > 2:
        t.gap().turn("second").gap()
        for guess in range(max(1, x - 3 * size), x + 1):
            rest = m - a * guess
            if rest <= 0:
                continue
            t.line(
                f"x = {guess}: {m} - {a} * {guess} = {rest}, {rest} / {b} = {_quotient(rest, b)}"
            )
        t.turn("fine").gap().turn("agree")
    return values, x


def _quotient(top: int, bottom: int) -> str:
    return str(top // bottom) if top % bottom == 0 else f"{top // bottom} + {top % bottom}/{bottom}"


def _trains(rng: random.Random, t: Thought, said: Phrases, size: int) -> tuple[dict[str, Any], int]:
    v, w = rng.sample(range(40, 145, 5), 2)
    hours = rng.randint(2, 5)
    values: dict[str, Any] = {"v": v, "w": w, "s": v + w, "t": hours, "d": (v + w) * hours}
    values |= {"x": v * hours, "y": w * hours}
    fill = partial(_fill, values=values)
    t.say(fill(said["trap"])).turn("doubt")
    t.gap().say(fill(said["idea"])).say(fill(said["time"]))
    t.gap().say(fill(said["way"])).turn("check")
    t.say(f"{v * hours} + {w * hours} = {(v + w) * hours}.").turn("fine")
    if size > 1:
        t.gap().turn("second").gap()
        for hour in range(1, hours + 1):
            far, near = v * hour, values["d"] - w * hour
            t.line(f"{hour} h: {v} * {hour} = {far}, {values['d']} - {w} * {hour} = {near}")
        t.gap().turn("agree")
    return values, v * hours


def _ages(rng: random.Random, t: Thought, said: Phrases, size: int) -> tuple[dict[str, Any], int]:
    while True:
        k, m, years = rng.randint(5, 9), rng.choice((3, 4)), rng.randint(5, 20)
        if years * (m - 1) % (k - m) == 0 and k * (years * (m - 1) // (k - m)) < 75:
            break
    x = years * (m - 1) // (k - m)
    values: dict[str, Any] = {"k": k, "m": m, "t": years, "x": x, "mt": m * years, "km": k - m}
    values |= {"r": m * years - years, "kx": k * x, "xt": x + years, "kxt": k * x + years}
    fill = partial(_fill, values=values)
    t.say(fill(said["let"]))
    t.gap().say(fill(said["solve"])).turn("doubt")
    t.gap().turn("check").say(fill(said["test"])).turn("fine")
    if size > 1:
        t.gap().turn("second").gap()
        for age in range(max(1, x - 2 * size), x + 1):
            t.line(f"x = {age}: {k} * {age} + {years} = {k * age + years}, {m} * {age + years} = "
                   f"{m * (age + years)}")  # fmt: skip
        t.gap().turn("agree")
    return values, x


def _rest(rng: random.Random, t: Thought, said: Phrases, size: int) -> tuple[dict[str, Any], int]:
    p, q = rng.choice(((4, 9), (5, 7), (5, 8), (7, 9), (7, 11), (8, 13), (9, 14), (11, 16)))
    r, s = rng.randint(1, p - 1), rng.randint(1, q - 1)
    n = next(n for n in range(1, p * q) if n % p == r and n % q == s)
    values: dict[str, Any] = {"p": p, "q": q, "r": r, "s": s, "n": n}
    t.say(_fill(said["list"], values)).gap()
    options = said["no"]
    for tried in range(s, n, q):
        one = {"n": tried, "p": p, "e": tried % p}
        t.line(*(_fill(option, one) for option in options))
        t.turn("doubt", chance=0.12)
    t.line(_fill(said["yes"], values | {"f": n // p}))
    t.gap().turn("check").say(f"{n} = {p} * {n // p} + {r}, {n} = {q} * {n // q} + {s}.").turn(
        "fine"
    )
    if size > 1:
        t.gap().turn("second").gap()
        for tried in range(r, n + 1, p):
            t.line(f"{tried} = {q} * {tried // q} + {tried % q}")
        t.gap().turn("agree")
    return values, n


def _sale(rng: random.Random, t: Thought, said: Phrases, size: int) -> tuple[dict[str, Any], int]:
    while True:
        p = rng.randint(2, 30 * size) * 100
        a, b = rng.sample((5, 10, 15, 20, 25, 30, 40), 2)
        u = p * a // 100
        if (p - u) * b % 100 == 0:
            break
    v = (p - u) * b // 100
    x = p - u - v
    values: dict[str, Any] = {
        "p": p,
        "a": a,
        "b": b,
        "u": u,
        "v": v,
        "q": p - u,
        "x": x,
        "ab": a + b,
    }
    values["wrong"] = p - p * (a + b) // 100
    fill = partial(_fill, values=values)
    t.say(fill(said["first"]))
    t.gap().say(fill(said["second"])).turn("doubt").say(fill(said["trap"]))
    t.gap().turn("second").say(
        f"{p} * {100 - a} / 100 = {p - u}, {p - u} * {100 - b} / 100 = {x}."
    ).turn("agree")
    return values, x


_FAMILIES = {"goods": _goods, "trains": _trains, "ages": _ages, "rest": _rest, "sale": _sale}


def problem(language: str, rng: Dice, size: int) -> Conversation:
    """A word problem in the language; its answer in a box."""
    phrases = _phrases()[language]
    family = rng.choice(sorted(_FAMILIES))
    said = phrases[family]
    banks = {name: tuple(phrases[name]) for name in phrases if isinstance(phrases[name], list)}
    t = Thought(rng, banks, join="" if language in _WITHOUT_BLANKS else " ").turn("open")
    values, result = _FAMILIES[family](rng, t, said, size)
    t.gap().turn("close")
    question = _fill(rng.choice(said["question"]), values)
    explanation = _fill(said["explain"], values)
    request = f"{question}\n{rng.choice(phrases['ask'])}"
    answer = f"{explanation}\n\n\\boxed{{{result}}}"
    return Conversation(language, (user(request),), t.text, answer)


def advice(language: str, rng: Dice, size: int) -> Conversation:
    """A question of daily life: ideas weighed, some of them given. size does not matter."""
    phrases = _phrases()[language]
    question = rng.own(sorted(phrases["advice"]))
    ideas = phrases["advice"][question]
    n = rng.randint(2, 5)
    chosen = [ideas[k] for k in sorted(rng.sample(range(len(ideas)), n))]
    banks = {name: tuple(phrases[name]) for name in phrases if isinstance(phrases[name], list)}
    t = Thought(rng, banks, join="" if language in _WITHOUT_BLANKS else " ").turn("open").gap()
    for idea in rng.sample(ideas, len(ideas)):
        t.line(f"- {idea}").turn("fine" if idea in chosen else "doubt", chance=0.7)
    t.gap().turn("check")
    for number, idea in enumerate(chosen, start=1):
        t.line(f"{number}. {idea}")
    t.gap().turn("close")
    answer = "\n".join(f"{number}. {idea}" for number, idea in enumerate(chosen, start=1))
    return Conversation(language, (user(f"{question} (1-{n})"),), t.text, answer)


MAKERS: Mapping[str, tuple[Maker, ...]] = {
    language: (partial(problem, language), partial(advice, language)) for language in LANGUAGES
}
