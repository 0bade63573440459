"""The problems of generated thoughts once more, by trying everything: answers from the questions.

TWINS: words of a question -> a function of the question that gives the answer as it is boxed.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def remainders(text: str) -> str:
    found = numbers(text)
    wanted, moduli = (found[0::2], found[1::2])
    if "除" in text or "组" in text:
        wanted, moduli = moduli, wanted
    return str(next(n for n in itertools.count(1) if [n % m for m in moduli] == wanted))


def change(text: str) -> str:
    *coins, amount = numbers(text)
    ways = [1] + [0] * amount
    for coin in coins:
        for n in range(coin, amount + 1):
            ways[n] += ways[n - coin]
    return str(ways[amount])


def sequence(text: str) -> str:
    match = re.search(
        r"a_1 = (\d+) and a_2 = (\d+).*of (\d*)a_n \+ (\d*)a_\{n-1\}(?: \+ (\d+))? when divided by "
        r"(\d+)\..*a_\{(\d+)\}",
        text,
    )
    assert match
    u, v = (int(one or 1) for one in match.group(3, 4))
    w, modulus, wanted = (int(one or 0) for one in match.group(5, 6, 7))
    terms = [int(match[1]), int(match[2])]
    while len(terms) < wanted:
        terms.append((u * terms[-1] + v * terms[-2] + w) % modulus)
    return str(terms[wanted - 1])


def payments(text: str) -> str:
    a, b, total = numbers(text)
    return str(sum((total - a * x) % b == 0 for x in range(total // a + 1)))


def ending(text: str) -> str:
    match = re.search(r"(\d+)\^(\d+)", text)
    assert match
    value = 1
    for _ in range(int(match[2])):
        value = value * int(match[1]) % 100
    return str(value)


def multiples(text: str) -> str:
    found = numbers(text)
    bound, divisors = found[1], found[2:]
    return str(sum(all(n % d for d in divisors) for n in range(1, bound + 1)))


def walks(text: str) -> str:
    points = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", text)]
    _, end, *closed = points

    @cache
    def ways(x: int, y: int) -> int:
        if x < 0 or y < 0 or (x, y) in closed:
            return 0
        return 1 if x == y == 0 else ways(x - 1, y) + ways(x, y - 1)

    return str(ways(*end))


def tickets(text: str) -> str:
    found = numbers(text)
    if "students" not in text:
        dear, cheap, n, money = found
        return str(next(x for x in range(n + 1) if dear * x + cheap * (n - x) == money))
    dear, third, cheap, n, money, more = found
    for adults in range(n):
        children = n - 2 * adults - more
        if dear * adults + third * (adults + more) + cheap * children == money:
            return str(children)
    raise AssertionError(text)


def polygon(text: str) -> str:
    corners = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", text)]
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))

    def inside(x: int, y: int) -> bool:
        turns = 0.0
        for (ax, ay), (bx, by) in edges:
            cross = (ax - x) * (by - y) - (ay - y) * (bx - x)
            dot = (ax - x) * (bx - x) + (ay - y) * (by - y)
            if cross == 0 and dot <= 0:
                return False
            turns += math.atan2(cross, dot)
        return abs(turns) > math.pi

    reach = range(max(max(one) for one in corners) + 1)
    return str(sum(inside(x, y) for x in reach for y in reach))


def urn(text: str) -> str:
    first, second, drawn, wanted = numbers(text)
    hands = list(itertools.combinations([1] * first + [0] * second, drawn))
    return str(Fraction(sum(sum(hand) == wanted for hand in hands), len(hands)))


def revenue(text: str) -> str:
    price, sold, step, lost = numbers(text)
    return str(max((price + step * k) * (sold - lost * k) for k in range(sold // lost + 1)))


def pipes(text: str) -> str:
    *alone, start = numbers(text)
    rates = [Fraction(1, hours) for hours in alone]
    return str(start + (1 - start * rates[0]) / sum(rates))


def project(text: str) -> str:
    days: dict[str, int] = {}
    after: dict[str, list[str]] = {}
    for task, n, needs in re.findall(r"- ([\w ]+): (\d+) days?(?:, after: ([\w, ]+))?", text):
        days[task] = int(n)
        after[task] = needs.split(", ") if needs else []

    @cache
    def end(task: str) -> int:
        return days[task] + max((end(one) for one in after[task]), default=0)

    return str(max(map(end, days)))


def packing(text: str) -> str:
    limit = numbers(text)[0]
    goods = [(int(w), int(v)) for w, v in re.findall(r": (\d+) kg, value (\d+)", text)]
    best = [0] * (limit + 1)
    for weight, value in goods:
        for room in range(limit, weight - 1, -1):
            best[room] = max(best[room], best[room - weight] + value)
    return str(best[limit])


def jugs(text: str) -> str:
    small, large, wanted = numbers(text)
    seen = {(0, 0)}
    for steps in itertools.count():
        if any(wanted in one for one in seen):
            return str(steps)
        for a, b in list(seen):
            into, back = min(a, large - b), min(b, small - a)
            seen |= {(small, b), (a, large), (0, b), (a, 0), (a - into, b + into)}
            seen.add((a + back, b - back))
    raise AssertionError(text)


def sudoku(text: str) -> str:
    rows = re.findall(r"^(?:[\d.] )+[\d.]$", text, re.MULTILINE)
    grid = [[0 if one == "." else int(one) for one in row.split()] for row in rows]
    n = len(grid)
    high, wide, row, column = numbers(text)[2], numbers(text)[3], *numbers(text)[-2:]

    def solve() -> bool:
        for r, c in itertools.product(range(n), repeat=2):
            if grid[r][c]:
                continue
            top, left = r // high * high, c // wide * wide
            taken = {*grid[r], *(line[c] for line in grid)}
            taken |= {x for line in grid[top : top + high] for x in line[left : left + wide]}
            for value in {*range(1, n + 1)} - taken:
                grid[r][c] = value
                if solve():
                    return True
            grid[r][c] = 0
            return False
        return True

    assert solve()
    return str(grid[row - 1][column - 1])


def ordering(text: str) -> str:
    clues: list[str] = re.findall(r"^- (.*)\.$", text, re.MULTILINE)
    people: list[str] = sorted(set(re.findall(r"\b[A-Z][a-z]+", text.split(" (")[0])))
    asked = int(re.findall(r"place (\d+)\?", text)[-1])
    fitting = []
    for order in itertools.permutations(people):
        at = {name.lower(): place for place, name in enumerate(order, start=1)}
        if all(_holds(clue.lower(), at, len(people)) for clue in clues):
            fitting.append(order[asked - 1])
    assert len(fitting) == 1
    return fitting[0]


def _holds(clue: str, at: dict[str, int], n: int) -> bool:
    named = [at[word] for word in re.findall(r"\w+", clue) if word in at]
    if "somewhere before" in clue:
        return named[0] < named[1]
    if "directly after" in clue:
        return named[0] == named[1] + 1
    if "not neighbours" in clue:
        return abs(named[0] - named[1]) != 1
    if "exactly one other" in clue:
        return abs(named[0] - named[1]) == 2
    if "neither first nor last" in clue:
        return 1 < named[0] < n
    return named[0] != numbers(clue)[0]


def liars(text: str) -> str:
    said = re.findall(r'^- (\w+): "(.*)"$', text, re.MULTILINE)
    people = [name for name, _ in said]
    fitting = []
    for case in itertools.product((True, False), repeat=len(people)):
        honest = dict(zip(people, case, strict=True))
        if all(_true(words, name, honest) == honest[name] for name, words in said):
            fitting.append(case.count(False))
    assert len(fitting) == 1
    return str(fitting[0])


def _true(words: str, speaker: str, honest: dict[str, bool]) -> bool:
    named = [honest[word] for word in re.findall(r"\w+", words) if word in honest]
    if words.startswith("Exactly"):
        return list(honest.values()).count(False) == numbers(words)[0]
    if "same kind" in words:
        return named[0] is named[1]
    if "exactly one is" in words:
        return named[0] is not named[1]
    if "At least one" in words:
        return not all(named)
    if words.startswith("If "):
        return named[1] or not named[0]
    if "as I am" in words:
        return named[0] is honest[speaker]
    return named[0] is ("honest" in words)


def rows_of(text: str) -> dict[str, list[int]]:
    body = text.split("---|\n")[1]
    rows = re.findall(r"^\| ([\w-]+) \| ([\d| ]+) \|$", body, re.MULTILINE)
    return {name: numbers(cells) for name, cells in rows}


def totals(text: str) -> str:
    sums: Sequence[int] = sorted(map(sum, rows_of(text).values()))
    return str(sums[-1] - (sums[0] if "合计" in text else sums[-2]))


def growth(text: str) -> str:
    match = re.search(r"from (\w+(?: \d)?) to (\w+(?: \d)?) \(", text)
    head = re.search(r"^\| \w+ \| (.*) \|$", text, re.MULTILINE)
    assert match
    assert head
    a, b = (head[1].split(" | ").index(one) for one in match.groups())
    rows = rows_of(text)
    return max(rows, key=lambda name: Fraction(rows[name][b], rows[name][a]))


def middle(text: str) -> str:
    cells = [cell for row in rows_of(text).values() for cell in row]
    return str(sum(cell * len(cells) > sum(cells) for cell in cells))


def digits(text: str) -> str:
    wanted, most = numbers(text)
    return str(sum(sum(map(int, str(n))) == wanted for n in range(100, 100 * (most + 1))))


TWINS: dict[str, Callable[[str], str]] = {
    r"are left over in rows of|个一组余": remainders,
    r"coins of|Stamps come|With weights": change,
    r"A sequence starts": sequence,
    r"possibly none of a kind|zero allowed": payments,
    r"last two digits|modulo 100": ending,
    r"divisible by none|stay closed": multiples,
    r"grid of streets": walks,
    r"charges": tickets,
    r"polygon": polygon,
    r"without putting|all at once": urn,
    r"weekly takings": revenue,
    r"To paint a hall": pipes,
    r"tasks are planned|Here is the plan": project,
    r"A cargo bike": packing,
    r"-litre jug": jugs,
    r"Fill the \d x \d grid": sudoku,
    r"This is known": ordering,
    r"On an island": liars,
    r"largest total exceed|highest total\?|合计最多": totals,
    r"largest growth": growth,
    r"above the mean": middle,
    r"三位数": digits,
}
