"""Tables read and added up: totals, growth, averages, each computed twice."""

import random
from collections.abc import Sequence
from fractions import Fraction

from convert.texts.thought import Thought, listed
from convert.texts.worked import Worked

_SUBJECTS = (
    ("books lent by a library", "branch", "North South Harbour Mill Park Station".split()),
    ("bicycles repaired by workshops", "workshop", "Axle Bell Chain Dynamo Fork Gear".split()),
    ("tonnes of apples picked on farms", "farm", "Hilltop Riverside Old-Mill Seven-Oaks Meadow Stonebridge".split()),
    ("visitors of exhibitions", "gallery", "Blue Round Glass Upper Garden Night".split()),
    ("parcels carried by vans", "van", "V1 V2 V3 V4 V5 V6".split()),
    ("hours of sunshine at weather posts", "post", "Coast Ridge Valley Island Forest Airfield".split()),
)  # fmt: skip
_COLUMNS = (
    ("Q1", "Q2", "Q3", "Q4"),
    ("2019", "2020", "2021", "2022"),
    ("January", "February", "March", "April"),
    ("week 1", "week 2", "week 3", "week 4"),
)


def _table(rng: random.Random, size: int) -> tuple[str, str, list[str], list[str], list[list[int]]]:
    about, head, names = rng.choice(_SUBJECTS)
    columns = list(rng.choice(_COLUMNS))
    rows = rng.sample(names, min(2 + size, 6))
    numbers = [[rng.randint(20, 400) for _ in columns] for _ in rows]
    return about, head, columns, rows, numbers


def _drawn(head: str, columns: Sequence[str], rows: Sequence[str], numbers: Sequence[Sequence[int]]) -> str:  # fmt: skip
    lines = [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {row} | {' | '.join(map(str, values))} |"
        for row, values in zip(rows, numbers, strict=True)
    ]
    return "\n".join(lines)


def _added(t: Thought, label: str, values: Sequence[int]) -> int:
    """Add up aloud, one after the other."""
    total = values[0]
    steps = []
    for value in values[1:]:
        steps.append(f"{total} + {value} = {total + value}")
        total += value
    t.line(f"{label}: {', '.join(steps)}.", f"{label}: {'; '.join(steps)}. So {total}.")
    return total


def totals(rng: random.Random, size: int) -> Worked:
    """The row with the largest sum and its lead over the next, checked through the columns."""
    while True:
        about, head, columns, rows, numbers = _table(rng, size)
        sums = [sum(values) for values in numbers]
        ranked = sorted(sums, reverse=True)
        if ranked[0] > ranked[1]:
            break
    lead = ranked[0] - ranked[1]
    question = (
        f"The table shows {about}:\n\n{_drawn(head, columns, rows, numbers)}\n\n"
        + rng.choice(
            (
                f"By how much does the {head} with the largest total exceed the second?",
                f"How far ahead of the runner-up is the {head} with the highest total?",
            )
        )
    )
    t = Thought(rng).turn("open").say("I need the total of each row.").gap()
    for row, values in zip(rows, numbers, strict=True):
        _added(t, row, values)
    t.gap().say(f"In order of size: {', '.join(map(str, ranked))}.")
    t.say(f"The first minus the second: {ranked[0]} - {ranked[1]} = {lead}.")
    t.gap().turn("second").say("If the rows are right, the columns must have the same sum.").gap()
    down = [sum(values[k] for values in numbers) for k in range(len(columns))]
    for k, column in enumerate(columns):
        _added(t, column, [values[k] for values in numbers])
    t.gap()
    _added(t, "All rows", sums)
    _added(t, "All columns", down)
    t.gap().turn("agree").turn("close")
    first = rows[sums.index(ranked[0])]
    explanation = f"{first} leads with {ranked[0]}, the next has {ranked[1]}."
    return Worked(
        question, t, explanation, str(lead), (str(ranked[0]), str(ranked[0] - ranked[-1]))
    )


def growth(rng: random.Random, size: int) -> Worked:
    """Which row grew most in percent between two columns; absolute growth misleads."""
    while True:
        about, head, columns, rows, numbers = _table(rng, size)
        a, b = sorted(rng.sample(range(len(columns)), 2))
        ratios = [Fraction(values[b], values[a]) for values in numbers]
        if len(set(ratios)) == len(ratios):
            break
    best = ratios.index(max(ratios))
    gains = [values[b] - values[a] for values in numbers]
    question = (
        f"Given are {about}:\n\n{_drawn(head, columns, rows, numbers)}\n\nWhich {head} had the "
        f"largest growth in percent from {columns[a]} to {columns[b]} (or the smallest decline, if "
        "none grew)?"
    )
    t = (
        Thought(rng)
        .turn("open")
        .say("Percent, not absolute numbers, so what counts is the quotient of the two columns.")
    )
    t.say(f"Only {columns[a]} and {columns[b]} matter, the rest is distraction.").gap()
    for row, values, ratio, gain in zip(rows, numbers, ratios, gains, strict=True):
        second = f"{values[b]} - {values[a]} = {gain}"
        percent = float(100 * (ratio - 1))
        t.line(
            f"{row}: {values[a]} to {values[b]}; {second}; relative to {values[a]} that is about "
            f"{percent:.1f} %."
        )
        t.turn("doubt", chance=0.15)
    most = gains.index(max(gains))
    if most != best:
        t.gap().say(
            f"In absolute terms {rows[most]} is ahead with {gains[most]}, but in percent "
            f"{rows[best]} is."
        )
    t.gap().turn("check").say("Compare the best with the others without rounding, crosswise:").gap()
    for k, row in enumerate(rows):
        if k != best:
            left = numbers[best][b] * numbers[k][a]
            right = numbers[k][b] * numbers[best][a]
            t.line(
                f"{rows[best]} against {row}: {numbers[best][b]} * {numbers[k][a]} = {left}, "
                f"{numbers[k][b]} * {numbers[best][a]} = {right}; the first is larger."
            )
    t.gap().turn("close")
    explanation = (
        f"{rows[best]} went from {numbers[best][a]} to {numbers[best][b]}, "
        f"{float(100 * (ratios[best] - 1)):+.1f} %, which none of the others reaches."
    )
    near = tuple(row for row in rows if row != rows[best])
    return Worked(question, t, explanation, rows[best], (*near, "none of them"))


def middle(rng: random.Random, size: int) -> Worked:
    """The median of all cells above a mean: sorting and counting by hand."""
    about, head, columns, rows, numbers = _table(rng, size)
    cells = [value for values in numbers for value in values]
    mean = Fraction(sum(cells), len(cells))
    above = sorted(value for value in cells if value > mean)
    question = (
        f"Consider this table of {about}:\n\n{_drawn(head, columns, rows, numbers)}\n\nHow many of "
        f"the {len(cells)} entries lie above the mean of all entries?"
    )
    t = Thought(rng).turn("open").say("First the mean, so all entries must be added up.").gap()
    for row, values in zip(rows, numbers, strict=True):
        _added(t, row, values)
    t.gap()
    _added(t, "Together", [sum(values) for values in numbers])
    t.gap().say(
        f"There are {len(rows)} * {len(columns)} = {len(cells)} entries, so the mean is "
        f"{sum(cells)} / {len(cells)}, about {float(mean):.2f}."
    )
    t.gap().say("Now go through the rows and compare.").gap()
    count = 0
    for row, values in zip(rows, numbers, strict=True):
        high = [value for value in values if value > mean]
        t.line(
            f"{row}: {listed(high) + ' lie' if len(high) > 1 else str(high[0]) + ' lies'} above. "
            f"{count} + {len(high)} = {count + len(high)}."
            if high
            else f"{row}: none of {listed(values)} is above. Still {count}."
        )
        count += len(high)
    t.gap().turn("check").say(
        f"In order, those above are {', '.join(map(str, above))}; the smallest, {above[0]}, is "
        f"indeed more than {float(mean):.2f}, and I count {len(above)}."
    ).turn("close")
    explanation = (
        f"The mean is ${sum(cells)}/{len(cells)} \\approx {float(mean):.2f}$; above it lie "
        f"{listed(above)}."
    )
    return Worked(question, t, explanation, str(len(above)), (str(len(cells) - len(above)),))


PROBLEMS = (totals, growth, middle)
