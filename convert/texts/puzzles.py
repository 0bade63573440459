"""Puzzles solved by going through cases: orders, liars, small sudokus, jugs."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from convert.texts.thought import Thought, capital, listed
from convert.texts.worked import Worked

_PEOPLE = (
    "Ada Bela Carl Dora Emil Finn Gita Hana Ivan Jana Karl Lior Mona Nils Olga Pia Quinn Rosa "
    "Sami Tara Uma Vera Wim Yara Zeno"
).split()
_ROWS = (
    ("stand in a queue", "in the queue", "first in the queue is place 1"),
    ("finished a race, without ties", "at the finish", "place 1 is the winner"),
    ("sit in a row of seats numbered from the left", "in the row", "seat 1 is the leftmost"),
    ("live in a street, one to a house, the houses numbered in order", "in the street",
     "house 1 stands at the corner"),
    ("give talks one after the other", "in the programme", "talk 1 opens the day"),
)  # fmt: skip
Places = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Clue:
    """What is said of some people, and the test that their places pass."""

    people: tuple[str, ...]
    said: str
    test: Callable[..., bool]

    def holds(self, places: Places) -> bool:
        return self.test(*(places[name] for name in self.people))


def _clues(order: Sequence[str], rng: random.Random) -> list[Clue]:
    """True statements about an order, in random order."""
    n = len(order)
    at = {name: place for place, name in enumerate(order, start=1)}
    clues = []
    for a, b in permutations(order, 2):
        gap = at[b] - at[a]
        if gap > 0:
            clues.append(Clue((a, b), f"{a} comes somewhere before {b}", lambda x, y: x < y))
        if gap == 1:
            clues.append(Clue((a, b), f"{b} comes directly after {a}", lambda x, y: y == x + 1))
        if a < b and abs(gap) > 1:
            said = f"{a} and {b} are not neighbours"
            clues.append(Clue((a, b), said, lambda x, y: abs(x - y) > 1))
        if a < b and abs(gap) == 2:
            said = f"exactly one other is between {a} and {b}"
            clues.append(Clue((a, b), said, lambda x, y: abs(x - y) == 2))
    for a in order:
        place = rng.choice([k for k in range(1, n + 1) if k != at[a]])
        clues.append(Clue((a,), f"{a} does not have place {place}", place.__ne__))
        if at[a] not in (1, n):
            said = f"{a} is neither first nor last"
            clues.append(Clue((a,), said, range(2, n).__contains__))
    rng.shuffle(clues)
    return clues


def ordering(rng: random.Random, size: int) -> Worked:
    """Who comes where, from clues that leave one order, by trying the places from the front."""
    n = min(3 + size, 7)
    people = sorted(rng.sample(_PEOPLE, n))
    order = rng.sample(people, n)
    clues: list[Clue] = []
    left: list[Places] = [
        dict(zip(people, places, strict=True)) for places in permutations(range(1, n + 1))
    ]
    for clue in _clues(order, rng):
        if len(left) == 1:
            break
        fewer = [places for places in left if clue.holds(places)]
        if len(fewer) < len(left):
            clues.append(clue)
            left = fewer
    what, where, hint = rng.choice(_ROWS)
    asked = rng.randint(1, n)
    listing = "\n".join(f"- {capital(clue.said)}." for clue in clues)
    question = f"{listed(people)} {what} ({hint}). This is known:\n{listing}\n" + rng.choice(
        (f"Who has place {asked}?", f"Find the whole order. Who is at place {asked}?")
    )
    t = Thought(rng).turn("open")
    t.say(
        f"{n} people would allow {math.factorial(n)} orders, but the "
        "clues cut that down a lot. I'll fill the places from the front and drop what fails.",
        "No single clue fixes anybody outright, so I go through the first places systematically.",
    )
    for line in _search(t, order, clues, ()):
        t.line(line)
    t.gap().turn("check")
    places = {name: place for place, name in enumerate(order, start=1)}
    for clue in clues:
        where_now = listed(f"{name} at {places[name]}" for name in clue.people)
        t.line(f"{capital(clue.said)}: {where_now}.").turn("fine")
    t.gap().say(
        f"So the order is {', '.join(order)}, and place {asked} belongs to {order[asked - 1]}."
    )
    t.turn("close")
    explanation = (
        f"Trying the first places one after the other, only one order {where} survives all clues: "
        f"**{', '.join(order)}**."
    )
    near = tuple(name for name in order if name != order[asked - 1])
    return Worked(question, t, explanation, order[asked - 1], near)


def _search(
    t: Thought, order: Sequence[str], clues: Sequence[Clue], front: tuple[str, ...]
) -> Iterator[str]:
    """Lines of the search for all ways to go on behind the front; order: the only one there is."""
    place = len(front) + 1
    for name in sorted(order):
        if name in front:
            continue
        now = (*front, name)
        so_far = ", ".join(now)
        if not front:
            t.gap()
        if broken := _broken(order, clues, now):
            yield t.pick(
                f"{so_far}: no, {broken}.",
                f"{name} at place {place}{f' ({so_far})' if front else ''}? But {broken}.",
                f"{so_far} fails, since {broken}.",
                f"Could {name} come next after {front[-1]}? No: {broken}."
                if front
                else f"{name} first? No: {broken}.",
            )
        elif len(now) == len(order):
            yield t.pick(f"{so_far}: everything holds!", f"{so_far}. No clue objects. That's one.")
        else:
            yield t.pick(
                f"{so_far} ... possible so far.",
                f"Suppose {name} at place {place}{f': {so_far}' if front else ''}. Nothing against it yet.",
                f"{so_far}: keep that and look further.",
            )
            yield from _search(t, order, clues, now)
            if place <= len(order) - 3 and tuple(order[:place]) != now:
                yield t.pick(
                    f"So nothing that begins with {so_far} works.",
                    f"All continuations of {so_far} are gone. Back.",
                )


def _broken(order: Sequence[str], clues: Sequence[Clue], front: tuple[str, ...]) -> str:
    """Why nobody can go on from here; "" where no clue objects yet."""
    places = {name: place for place, name in enumerate(front, start=1)}
    for clue in clues:
        if all(name in places for name in clue.people):
            if not clue.holds(places):
                return clue.said
        elif len(clue.people) == 2 and any(name in places for name in clue.people):
            missing = next(name for name in clue.people if name not in places)
            later = range(len(front) + 1, len(order) + 1)
            if not any(clue.holds({**places, missing: place}) for place in later):
                return f"{clue.said}, and {missing} can no longer get there"
    return ""


def liars(rng: random.Random, size: int) -> Worked:
    """Who lies, from what each says, by going through all cases."""
    n = min(2 + size, 6)
    while True:
        people = sorted(rng.sample(_PEOPLE, n))
        said = {name: _statement(rng, name, people) for name in people}
        fitting = [
            dict(zip(people, case, strict=True))
            for case in product((True, False), repeat=n)
            if all(said[a][1](dict(zip(people, case, strict=True))) == honest
                   for a, honest in zip(people, case, strict=True))
        ]  # fmt: skip
        if len(fitting) == 1:
            break
    truth = fitting[0]
    lying = [name for name in people if not truth[name]]
    speeches = "\n".join(f'- {name}: "{said[name][0]}"' for name in people)
    question = (
        "On an island some people always tell the truth and the others always lie. "
        f"{listed(people)} live there. They say:\n{speeches}\n"
        + rng.choice(("How many of them lie?", "Find out who lies. How many liars are there?"))
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(
            f"Each of the {n} is honest or lies, {2**n} cases. A statement must be true exactly if the "
            "speaker is honest."
        )
    )
    t.say("I take the cases in turn and stop each at the first contradiction.")
    for number, case in enumerate(product((True, False), repeat=n), start=1):
        now = dict(zip(people, case, strict=True))
        honest = [name for name in people if now[name]]
        t.gap().line(
            f"Case {number}: "
            + (f"honest are {listed(honest)}, the rest lie." if honest else "all of them lie.")
        )
        for name in people:
            words, holds = said[name]
            true = holds(now)
            if true != now[name]:
                t.say(
                    f'{name} says "{words}" That would be {"true" if true else "false"}, yet {name} '
                    f"is supposed to {'lie' if true else 'be honest'}. Contradiction."
                )
                break
            t.say(
                f"{name}'s words are {'true' if true else 'false'}, as they must be.",
                f"{name}: {'true' if true else 'false'}, fits.",
                f'"{words}" is {"true" if true else "false"} here, fine for {name}.',
            )
        else:
            t.say("No contradiction at all!", "Everything fits here!")
    t.gap().turn("check").say(
        f"In the case that is left, {listed(lying) if lying else 'nobody'} "
        f"{'lies' if len(lying) < 2 else 'lie'}. Each of the others failed at a definite sentence."
    )
    t.turn("close")
    explanation = (
        f"Of the {2**n} cases all but one contradict some statement. What remains: "
        + (f"{listed(lying)} {'lies' if len(lying) == 1 else 'lie'}" if lying else "nobody lies")
        + (", the others are honest." if 0 < len(lying) < n else ".")
    )
    near = tuple(str(k) for k in range(n + 1) if k != len(lying))
    return Worked(question, t, explanation, str(len(lying)), near)


Statement = tuple[str, Callable[[Mapping[str, bool]], bool]]


def _statement(rng: random.Random, name: str, people: Sequence[str]) -> Statement:
    others = [one for one in people if one != name]
    a, b = rng.sample(others, 2)
    k = rng.randint(1, len(people) - 1)
    return rng.choice(
        (
            (f"{a} lies.", lambda p: not p[a]),
            (f"{a} is honest.", lambda p: p[a]),
            (f"{a} and {b} are of the same kind.", lambda p: p[a] == p[b]),
            (f"Of {a} and {b}, exactly one is honest.", lambda p: p[a] != p[b]),
            (f"At least one of {a} and {b} lies.", lambda p: not (p[a] and p[b])),
            (f"If {a} is honest, so is {b}.", lambda p: not p[a] or p[b]),
            (f"Exactly {k} of us {'lies' if k == 1 else 'lie'}.",
             lambda p: sum(not v for v in p.values()) == k),
            (f"{a} is as honest as I am.", lambda p: p[a] == p[name]),
        )
    )  # fmt: skip


def sudoku(rng: random.Random, size: int) -> Worked:
    """A small sudoku, by what each cell can still hold."""
    high, wide = (2, 2) if size < 3 else (2, 3)
    n = high * wide
    while True:
        digits = rng.sample(range(1, n + 1), n)
        solved = [
            [digits[(wide * (r % high) + r // high + c) % n] for c in range(n)] for r in range(n)
        ]
        bands = [rng.sample(range(high), high) for _ in range(n // high)]
        rows = [
            band * high + r for band in rng.sample(range(n // high), n // high) for r in bands[band]
        ]
        solved = [solved[r] for r in rows]
        cells = [(r, c) for r in range(n) for c in range(n)]
        blank = set(rng.sample(cells, n * n * (50 + 3 * size) // 100))
        shown = [[0 if (r, c) in blank else solved[r][c] for c in range(n)] for r in range(n)]
        steps = _fill(shown, high, wide)
        if steps and all(_fits(solved, r, c, high, wide) for r, c in cells):
            break
    drawing = "\n".join(" ".join(str(x) if x else "." for x in row) for row in shown)
    r0, c0 = rng.choice(sorted(blank))
    question = (
        f"Fill the {n} x {n} grid so that every row, every column and every {high} x {wide} box "
        f"holds each of 1 to {n} once:\n\n{drawing}\n\nWhat stands in row {r0 + 1}, column "
        f"{c0 + 1}?"
    )
    t = Thought(rng).turn("open").say("Look for cells where only one number is possible.").gap()
    grid = [list(row) for row in shown]
    for number, (r, c, value) in enumerate(steps, start=1):
        row = sorted({x for x in grid[r] if x})
        column = sorted({grid[k][c] for k in range(n) if grid[k][c]})
        box = sorted({x for x in _box(grid, r, c, high, wide) if x})
        t.line(
            f"r{r + 1}c{c + 1}: the row has {row}, the column {column}, the box {box}. Left is "
            f"{value}.",
            f"Row {r + 1}, column {c + 1}: {listed(sorted({*row, *column, *box}))} are taken, so it "
            f"must be {value}.",
            f"Cell ({r + 1}, {c + 1}) sees {listed(sorted({*row, *column, *box}))}. Only {value} "
            "remains.",
        )
        grid[r][c] = value
        if number % 6 == 0:
            t.gap().say("The grid now:").gap()
            t.lines(" ".join(str(x) if x else "." for x in row) for row in grid)
            t.gap().turn("next", "fine")
    t.gap().turn("check").gap()
    for r in range(n):
        t.line(f"Row {r + 1}: {' '.join(map(str, grid[r]))}, all different.")
    for c in range(n):
        t.line(f"Column {c + 1}: {' '.join(str(grid[r][c]) for r in range(n))}, all different.")
    t.gap().say(f"And the question was about row {r0 + 1}, column {c0 + 1}: {grid[r0][c0]}.")
    t.turn("close")
    done = "\n".join(" ".join(map(str, row)) for row in grid)
    explanation = f"The grid can be filled cell by cell, without guessing:\n\n```\n{done}\n```"
    near = tuple(str(k) for k in range(1, n + 1) if k != grid[r0][c0])
    return Worked(question, t, explanation, str(grid[r0][c0]), near)


def _box(grid: Sequence[Sequence[int]], r: int, c: int, high: int, wide: int) -> list[int]:
    top, left = r // high * high, c // wide * wide
    return [grid[y][x] for y in range(top, top + high) for x in range(left, left + wide)]


def _fits(grid: Sequence[Sequence[int]], r: int, c: int, high: int, wide: int) -> bool:
    groups = (list(grid[r]), [row[c] for row in grid], _box(grid, r, c, high, wide))
    return all(len(set(group)) == len(group) for group in groups)


def _fill(shown: Sequence[Sequence[int]], high: int, wide: int) -> list[tuple[int, int, int]]:
    """The cells in an order in which each has one number left; empty where there is none."""
    grid = [list(row) for row in shown]
    n = len(grid)
    steps: list[tuple[int, int, int]] = []
    while True:
        blank = [(r, c) for r in range(n) for c in range(n) if not grid[r][c]]
        if not blank:
            return steps
        for r, c in blank:
            column = {row[c] for row in grid}
            left = set(range(1, n + 1)) - {*grid[r]} - column - {*_box(grid, r, c, high, wide)}
            if len(left) == 1:
                grid[r][c] = left.pop()
                steps.append((r, c, grid[r][c]))
                break
        else:
            return []


def jugs(rng: random.Random, size: int) -> Worked:
    """Measuring an amount with two jugs, both ways round; the shorter one counts."""
    while True:
        small, large = sorted(rng.sample(range(3, 7 + 3 * size), 2))
        wanted = rng.randint(1, large - 1)
        a = _pour(large, small, wanted)
        b = _pour(small, large, wanted)
        if a and b and wanted != small and len(a) != len(b):
            break
    best = min(len(a), len(b))
    question = (
        f"There is a {small}-litre jug and a {large}-litre jug, without marks, and a tap. How many "
        f"steps does it take at least to have exactly {wanted} litres in one of them? A step fills "
        "a jug, empties it, or pours one into the other until that is full or the first is empty."
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(
            "With two jugs there are really just two sensible ways: keep filling the one and pouring "
            "into the other, or the reverse. Doing a step and then undoing it gains nothing."
        )
    )
    for source, target, steps in ((large, small, a), (small, large, b)):
        t.gap().say(f"Filling the {source} and pouring into the {target}:").gap()
        for number, (step, x, y) in enumerate(steps, start=1):
            t.line(f"{number}. {step}: {source}-litre jug {x}, {target}-litre jug {y}.")
        t.gap().say(f"{wanted} litres after {len(steps)} steps.").turn("fine", "doubt", chance=0.5)
    t.gap().say(f"The shorter way takes {best} steps.").turn("check")
    t.say(
        f"Every reachable amount is a sum of fillings and emptyings, {small}p + {large}q; the two "
        "directions are the two signs."
    ).turn("close")
    explanation = (
        f"Starting with the {large}-litre jug it takes {len(a)} steps, with the {small}-litre jug "
        f"{len(b)}."
    )
    return Worked(question, t, explanation, str(best), (str(max(len(a), len(b))), str(best + 2)))


def _pour(source: int, target: int, wanted: int) -> list[tuple[str, int, int]]:
    """Steps with what is in both jugs after each; none where the amount cannot be reached."""
    x = y = 0
    steps: list[tuple[str, int, int]] = []
    while wanted not in (x, y):
        if len(steps) > 40:
            return []
        if x == 0:
            x, step = source, f"fill the {source}"
        elif y == target:
            y, step = 0, f"empty the {target}"
        else:
            moved = min(x, target - y)
            x, y, step = x - moved, y + moved, f"pour from the {source} into the {target}"
        steps.append((step, x, y))
    return steps


PROBLEMS = (ordering, liars, sudoku, jugs)
