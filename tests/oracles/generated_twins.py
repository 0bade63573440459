"""The built-in benchmarks once more, by trying everything: answers from the questions' own words.

MATHEMATICS: maker's name -> (question) -> answer. CODE: function's name -> (statement's numbers or
words, arguments of a test) -> what the function returns.
"""

import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def power(question: str) -> int:
    base, exponent, modulus = numbers(question)
    value = 1
    for _ in range(exponent):
        value = value * base % modulus
    return value


def divisors(question: str) -> int:
    (number,) = numbers(question)
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return len({*low, *(number // d for d in low)})


def remainders(question: str) -> int:
    found = numbers(question)
    wanted, moduli = found[::2], found[1::2]
    whole = moduli[0] * moduli[1] * moduli[2]
    parts = zip(wanted, moduli, strict=True)
    return sum(r * (whole // p) * pow(whole // p, -1, p) for r, p in parts) % whole


def paths(question: str) -> int:
    _, _, right, up, x, y = numbers(question)

    @cache
    def ways(a: int, b: int) -> int:
        if a < 0 or b < 0 or (a, b) == (x, y):
            return 0
        return 1 if a == b == 0 else ways(a - 1, b) + ways(a, b - 1)

    return ways(right, up)


def balls(question: str) -> Fraction:
    red, green, blue = numbers(question)
    pairs = list(itertools.permutations("r" * red + "g" * green + "b" * blue, 2))
    return Fraction(sum(a == b for a, b in pairs), len(pairs))


def multiples(question: str) -> int:
    low, most, a, b = numbers(question)
    return sum((n % a == 0) != (n % b == 0) for n in range(low, most + 1))


def cubes(question: str) -> int:
    match = re.search(r"- (\d+)x ([+-]) (\d+) =", question)
    assert match
    roots = np.roots([1, -int(match[1]), int(f"{match[2]}{match[3]}")])
    total = complex(np.sum(roots**3))
    return round(total.real)


def arrangements(question: str) -> int:
    word, first = re.findall(r"\b[A-Z]+\b", question)
    return sum(order[0] == first for order in set(itertools.permutations(word)))


def recurrence(question: str) -> int:
    match = re.search(r"a_1 = (\d+),.* when (\d+)a_n \+ (\d+) is .* (\d+)\..*_\{(\d+)\}", question)
    assert match
    start, factor, step, modulus, n = map(int, match.groups())
    powers = [pow(factor, k, modulus) for k in range(n)]
    return (powers[-1] * start + step * sum(powers[:-1])) % modulus


def digit_sum(question: str) -> int:
    number, base = numbers(question)
    return sum(map(int, np.base_repr(number, base)))


def dice(question: str) -> Fraction:
    (total,) = numbers(question)
    rolls = list(itertools.product(range(1, 7), repeat=3))
    return Fraction(sum(sum(roll) == total for roll in rolls), len(rolls))


MATHEMATICS: dict[str, Callable[[str], int | Fraction]] = {
    "power": power,
    "divisors": divisors,
    "remainders": remainders,
    "paths": paths,
    "balls": balls,
    "multiples": multiples,
    "cubes": cubes,
    "arrangements": arrangements,
    "recurrence": recurrence,
    "digit_sum": digit_sum,
    "dice": dice,
}


def count_wanted(statement: str, low: int, high: int) -> int:
    divisor, digit = numbers(statement)

    def digits(n: int) -> list[int]:
        return [n % 10, *digits(n // 10)] if n else []

    return len(
        [
            n
            for n in range(low, high + 1)
            if sum(digits(n)) % divisor == 0 and digit not in digits(n)
        ]
    )


def longest(statement: str, values: list[int]) -> int:
    most = numbers(statement)[0]
    parts = (values[i:j] for i in range(len(values)) for j in range(i + 1, len(values) + 1))
    return max(
        (len(p) for p in parts if all(abs(a - b) <= most for a, b in itertools.pairwise(p))),
        default=0,
    )


def covered(statement: str, intervals: list[list[int]]) -> int:
    (at_least,) = numbers(statement)
    return sum(
        sum(start <= place < stop for start, stop in intervals) >= at_least
        for place in range(-40, 80)
    )


def count_ways(statement: str, total: int) -> int:
    match = re.search(r"\[(.*?)\].*modulo (\d+)", statement)
    assert match
    parts, modulus = numbers(match[1]), int(match[2])
    sums = np.zeros(total + 1, np.int64)  # ways with so many parts, by their sum
    sums[0] = 1
    ways = int(sums[total])
    for _ in range(total):
        longer = np.zeros_like(sums)
        for part in parts:
            longer[part:] += sums[: max(0, total + 1 - part)]
        sums = longer % modulus
        ways += int(sums[total])
    return ways % modulus


def fewest(statement: str, grid: list[str]) -> int:
    most = numbers(statement)[0]
    free = [(r, c) for r, row in enumerate(grid) for c, cell in enumerate(row) if cell == "."]
    reached = {((0, 0), 0)}
    for n_moves in range(len(free) * (most + 1)):
        if any(place == (len(grid) - 1, len(grid[0]) - 1) for place, _ in reached):
            return n_moves
        reached |= {
            (to, n + (abs(to[0] - at[0]) + abs(to[1] - at[1]) == 2))
            for at, n in reached
            for to in free
            if max(abs(to[0] - at[0]), abs(to[1] - at[1])) == 1
        }
        reached = {(place, n) for place, n in reached if n <= most}
    return -1


def most_frequent(statement: str, text: str) -> list[str]:
    n, shortest = numbers(statement)
    words = [word for word in text.split() if len(word) >= shortest]
    found: list[str] = []
    while words and len(found) < n:
        found.append(min(words, key=lambda word: (-words.count(word), word)))
        words = [word for word in words if word != found[-1]]
    return found


def evolve(statement: str, cells: str, n_steps: int) -> str:
    rule = int(re.findall(r"of (\d+), where", statement)[0])
    values = np.array([int(cell) for cell in cells])
    table = np.array([rule // 2**bit % 2 for bit in range(8)])
    for _ in range(n_steps):
        values = table[4 * np.roll(values, 1) + 2 * values + np.roll(values, -1)]
    return "".join(map(str, values))


def run(statement: str, program: list[str]) -> list[int]:
    (modulus,) = numbers(statement)
    stack: list[int] = []
    for line in program:
        match line.split(), stack[-2:]:
            case ["PUSH", x], _:
                stack = [*stack, int(x)]
            case ["DUP"], [*_, top]:
                stack = [*stack, top]
            case ["ADD"], [a, b]:
                stack[-2:] = [a + b]
            case ["MUL"], [a, b]:
                stack[-2:] = [a * b]
            case ["SWAP"], [a, b]:
                stack[-2:] = [b, a]
    return [value % modulus for value in stack]


def remaining(statement: str, n: int) -> list[int]:
    every, n_left = numbers(statement)[2:]
    circle, at = list(range(1, n + 1)), 0
    while len(circle) > n_left:
        at = (at + every - 1) % len(circle)
        circle.pop(at)
    return circle


def lowest_cost(statement: str, a: str, b: str) -> int:
    insertion, replacement = numbers(statement)

    @cache
    def cost(i: int, j: int) -> int:
        if not i or not j:
            return insertion * (i + j)
        change = cost(i - 1, j - 1) + (a[i - 1] != b[j - 1]) * replacement
        return min(change, cost(i - 1, j) + insertion, cost(i, j - 1) + insertion)

    return cost(len(a), len(b))


def heaviest(statement: str, weights: list[int], most: int) -> int:
    (times,) = numbers(statement)
    loads = np.zeros(1, np.int64)
    for weight in weights:
        loads = np.add.outer(loads, weight * np.arange(times + 1)).ravel()
    return int(loads[loads <= most].max())


def nesting(statement: str, text: str) -> int:
    opening, closing = re.findall(r"`([^`a-z]+)`", statement)
    pairs = [re.escape(a + b) for a, b in zip(opening, closing, strict=True)]
    rest = "".join(character for character in text if character in opening + closing)
    for depth in itertools.count():
        if not rest:
            return depth
        rest, before = re.sub("|".join(pairs), "", rest), rest
        if rest == before:
            return -1
    raise AssertionError


CODE: dict[str, Callable[..., Any]] = {
    "count_wanted": count_wanted,
    "longest": longest,
    "covered": covered,
    "count_ways": count_ways,
    "fewest": fewest,
    "most_frequent": most_frequent,
    "evolve": evolve,
    "run": run,
    "remaining": remaining,
    "lowest_cost": lowest_cost,
    "heaviest": heaviest,
    "nesting": nesting,
}
