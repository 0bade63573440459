"""Problems of school competitions with one number as the answer, to be put in a box.

A maker draws the numbers of a question and works out the answer:

    maker(rng) -> (question, answer)   the answer a whole number or a fraction
"""

import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import count

from quant_eval.tasks.problem import BOXED_REQUEST, Problem, boxed, user_turn

Made = tuple[str, int | Fraction]
Maker = Callable[[random.Random], Made]
_WORDS = "BANANA LEVELS CANOES SETTEE OTTERS ERASER COCOON ALPACA TOMATO BAOBAB".split()
_PRIMES = (7, 11, 13, 17, 19, 23)


def problem(rng: random.Random) -> Problem:
    """A question of one of MAKERS; each is as likely as any other."""
    question, answer = rng.choice(MAKERS)(rng)
    return Problem(
        kind="mathematics/built-in",
        key=question,
        messages=user_turn(f"{question}\n{BOXED_REQUEST}"),
        reasoning="",
        answer=boxed(str(answer)),
        expected=str(answer),
    )


def power(rng: random.Random) -> Made:
    """A remainder of a high power."""
    base, exponent, modulus = rng.randint(3, 40), rng.randint(50, 999), rng.randint(60, 140)
    question = f"What is the remainder when {base}^{{{exponent}}} is divided by {modulus}?"
    return question, pow(base, exponent, modulus)


def divisors(rng: random.Random) -> Made:
    """How many divisors a number of several small prime factors has, by its exponents."""
    exponents = {p: rng.randint(0, 4 if p == 2 else 2) for p in (2, 3, 5, 7, 11)}
    number = math.prod(p**n for p, n in exponents.items())
    question = f"How many positive divisors does {number} have?"
    return question, math.prod(n + 1 for n in exponents.values())


def remainders(rng: random.Random) -> Made:
    """The smallest number with three given remainders."""
    moduli = rng.sample(_PRIMES, 3)
    wanted = [rng.randrange(1, p) for p in moduli]
    said = [f"{r} when divided by {p}" for r, p in zip(wanted, moduli, strict=True)]
    question = (
        f"What is the smallest positive integer that leaves a remainder of {said[0]}, of {said[1]} "
        f"and of {said[2]}?"
    )
    return question, next(n for n in count(1) if [n % p for p in moduli] == wanted)


def paths(rng: random.Random) -> Made:
    """Lattice paths around one closed crossing."""
    right, up = rng.randint(4, 8), rng.randint(4, 8)
    x, y = rng.randint(1, right - 1), rng.randint(1, up - 1)
    question = (
        f"A path leads from (0, 0) to ({right}, {up}) by steps of one to the right or one up. How "
        f"many such paths do not pass through ({x}, {y})?"
    )
    through = math.comb(x + y, x) * math.comb(right - x + up - y, right - x)
    return question, math.comb(right + up, up) - through


def balls(rng: random.Random) -> Made:
    """Two balls of the same colour, drawn without putting back."""
    red, green, blue = (rng.randint(3, 12) for _ in range(3))
    question = (
        f"A bag holds {red} red, {green} green and {blue} blue balls. Two are drawn at random "
        "without putting back. What is the probability that both have the same colour? Give a "
        "fraction in lowest terms."
    )
    same = sum(math.comb(n, 2) for n in (red, green, blue))
    return question, Fraction(same, math.comb(red + green + blue, 2))


def multiples(rng: random.Random) -> Made:
    """Numbers that exactly one of two divisors divides."""
    a, b = rng.sample(range(4, 16), 2)
    most = rng.randint(500, 3000)
    question = (
        f"How many integers from 1 to {most} are divisible by {a} or by {b}, but not by both?"
    )
    return question, most // a + most // b - 2 * (most // math.lcm(a, b))


def cubes(rng: random.Random) -> Made:
    """The sum of the cubes of a quadratic's roots, by Vieta."""
    p, q = rng.randint(2, 12), rng.choice([n for n in range(-15, 16) if n])
    question = (
        f"Let r and s be the roots of x^2 - {p}x {'+' if q > 0 else '-'} {abs(q)} = 0. What is "
        "r^3 + s^3?"
    )
    return question, p**3 - 3 * p * q


def arrangements(rng: random.Random) -> Made:
    """Orders of a word's letters, some of them alike, where the first one is given."""
    word = rng.choice(_WORDS)
    first = rng.choice(sorted(set(word)))
    question = (
        f"In how many different orders can the letters of {word} be written, if the first letter "
        f"is to be {first}?"
    )
    rest = Counter(word.replace(first, "", 1))
    alike = math.prod(math.factorial(n) for n in rest.values())
    return question, math.factorial(len(word) - 1) // alike


def recurrence(rng: random.Random) -> Made:
    """A long chain of small steps, of which none may go wrong."""
    start, factor, step = rng.randint(1, 20), rng.randint(2, 9), rng.randint(1, 20)
    modulus, n = rng.randint(23, 60), rng.randint(15, 40)
    question = (
        f"A sequence begins with a_1 = {start}, and a_{{n+1}} is the remainder when "
        f"{factor}a_n + {step} is divided by {modulus}. What is a_{{{n}}}?"
    )
    value = start
    for _ in range(n - 1):
        value = (factor * value + step) % modulus
    return question, value


def digit_sum(rng: random.Random) -> Made:
    """The digits of a number in another base."""
    number, base = rng.randint(1_000, 99_999), rng.randint(3, 9)
    question = f"What is the sum of the digits of {number} when it is written in base {base}?"
    total, rest = 0, number
    while rest:
        rest, digit = divmod(rest, base)
        total += digit
    return question, total


def dice(rng: random.Random) -> Made:
    """The sum of three dice, by counting the ways that two of them leave to the third."""
    total = rng.randint(5, 16)
    question = (
        f"Three fair six-sided dice are rolled. What is the probability that their sum is {total}? "
        "Give a fraction in lowest terms."
    )
    pairs = {pair: 6 - abs(pair - 7) for pair in range(2, 13)}
    ways = sum(n for pair, n in pairs.items() if 1 <= total - pair <= 6)
    return question, Fraction(ways, 216)


MAKERS: tuple[Maker, ...] = (
    power,
    divisors,
    remainders,
    paths,
    balls,
    multiples,
    cubes,
    arrangements,
    recurrence,
    digit_sum,
    dice,
)
