"""Equations, geometry, chance and mixtures, worked out at length."""

import math
import random
from fractions import Fraction
from itertools import combinations, pairwise

from convert.texts.thought import Thought, listed
from convert.texts.worked import Worked

_NAMES = "Amina Boris Chloe Diego Elif Farid Greta Hugo Ines Jonas Kenji Lena Mateo Nadia".split()


def tickets(rng: random.Random, size: int) -> Worked:
    """Two or three unknown counts from totals, by elimination, then by a supposition."""
    dear, cheap, third = rng.sample(range(3, 25), 3)
    dear, third, cheap = sorted((dear, cheap, third), reverse=True)
    x, y = rng.randint(8, 30 * size), rng.randint(8, 30 * size)
    place = rng.choice(("museum", "swimming pool", "funfair", "planetarium", "botanical garden"))
    t = Thought(rng).turn("open")
    if size < 3:
        n, money = x + y, dear * x + cheap * y
        question = (
            f"A {place} charges {dear} for adults and {cheap} for children. On one day {n} people "
            f"paid {money} altogether. How many adults were there?"
        )
        t.say(f"Let x be adults and y children: x + y = {n}, {dear}x + {cheap}y = {money}.")
        t.gap().say(
            f"Multiply the first by {cheap}: {cheap}x + {cheap}y = {cheap * n}.",
            f"{cheap} times the first equation is {cheap}x + {cheap}y = {cheap * n}.",
        )
        t.say(
            f"Subtract: {dear - cheap}x = {money} - {cheap * n} = {money - cheap * n}, so x = "
            f"{money - cheap * n} / {dear - cheap} = {x}."
        ).say(f"Then y = {n} - {x} = {y}.")
        t.gap().turn("check").say(
            f"{dear} * {x} = {dear * x} and {cheap} * {y} = {cheap * y}; together {dear * x} + "
            f"{cheap * y} = {money}."
        ).turn("fine")
        t.gap().turn("second").say(
            f"Suppose all {n} had been children: {cheap} * {n} = {cheap * n}. Missing are {money} - "
            f"{cheap * n} = {money - cheap * n}. Each adult in place of a child adds {dear} - "
            f"{cheap} = {dear - cheap}. And {dear - cheap} * {x} = {money - cheap * n}."
        ).turn("agree")
        explanation = (
            f"From $x + y = {n}$ and ${dear}x + {cheap}y = {money}$ it follows that "
            f"${dear - cheap}x = {money - cheap * n}$, so $x = {x}$ (and $y = {y}$)."
        )
        t.gap().turn("close")
        return Worked(question, t, explanation, str(x), (str(y), str(n - y + 1)))
    more = rng.randint(2, 12)
    z = x + more
    n, money = x + y + z, dear * x + third * z + cheap * y
    question = (
        f"A {place} charges {dear} for adults, {third} for students and {cheap} for children. On "
        f"one day {n} people paid {money} altogether, and there were {more} more students than "
        f"adults. How many children came?"
    )
    t.say(
        f"Unknowns: a adults, s students, c children. Equations: a + s + c = {n}; {dear}a + "
        f"{third}s + {cheap}c = {money}; s = a + {more}."
    )
    t.gap().say("Could I guess? Say a third of the people are adults.").turn("stuck")
    t.say("Substitution is cleaner: s goes first.")
    t.gap().line(f"From the count: a + (a + {more}) + c = {n}, so c = {n} - {more} - 2a.")
    t.say(f"{n} - {more} = {n - more}, hence c = {n - more} - 2a.")
    t.line(f"Into the money: {dear}a + {third}(a + {more}) + {cheap}({n - more} - 2a) = {money}.")
    t.line(
        f"Constants: {third} * {more} = {third * more} and {cheap} * {n - more} = "
        f"{cheap * (n - more)}, together {third * more} + {cheap * (n - more)} = "
        f"{third * more + cheap * (n - more)}."
    )
    slope = dear + third - 2 * cheap
    left = money - third * more - cheap * (n - more)
    t.line(f"Coefficient of a: {dear} + {third} - 2 * {cheap} = {slope}.")
    t.line(f"So {slope}a = {money} - {third * more + cheap * (n - more)} = {left}, and {left} / "
           f"{slope} = {x}.")  # fmt: skip
    t.line(f"a = {x}, s = {x} + {more} = {z}, c = {n - more} - 2 * {x} = {y}.")
    t.gap().turn("check")
    t.say(
        f"People: {x} + {z} + {y} = {n}. Money: {dear} * {x} = {dear * x}, {third} * {z} = "
        f"{third * z}, {cheap} * {y} = {cheap * y}; {dear * x} + {third * z} + {cheap * y} = "
        f"{money}."
    ).turn("fine")
    t.gap().turn("doubt").say(
        "The question asks for the children, not for the adults; so c it is.",
        "Which of the three was asked for? The children. I must not box the adults.",
    )
    t.gap().turn("close")
    explanation = (
        f"With $s = a + {more}$ and $c = {n - more} - 2a$ the takings give ${slope}a = {left}$, so "
        f"$a = {x}$, $s = {z}$ and $c = {y}$."
    )
    return Worked(question, t, explanation, str(y), (str(x), str(z)))


def polygon(rng: random.Random, size: int) -> Worked:
    """Lattice points inside a polygon: its area by the shoelace, its edges by gcd, then Pick."""
    while True:
        reach = 4 + 2 * size
        points = {(rng.randint(0, reach), rng.randint(0, reach)) for _ in range(3 + size)}
        middle = (sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points))
        angles = {p: math.atan2(p[1] - middle[1], p[0] - middle[0]) for p in points if p != middle}
        corners = sorted(angles, key=angles.__getitem__)
        turns = [angles[q] - angles[p] for p, q in pairwise(corners)]
        turns.append(2 * math.pi - sum(turns))
        if len(corners) >= 3 and all(0.05 < turn < math.pi - 0.05 for turn in turns):
            break
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))
    doubled = sum(p[0] * q[1] - q[0] * p[1] for p, q in edges)
    on_edge = sum(math.gcd(q[0] - p[0], q[1] - p[1]) for p, q in edges)
    inside = (doubled - on_edge + 2) // 2
    shown = ", ".join(f"({x}, {y})" for x, y in corners)
    question = rng.choice(
        (
            (
                f"A polygon has the corners {shown}, in this order. How many points with integer "
                "coordinates lie strictly inside it?"
            ),
            (
                f"Take the polygon through {shown} and back to the start. Count the lattice points in "
                "its interior, those on the border left out."
            ),
        )
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(
            "Counting points on a drawing would invite mistakes. Pick's theorem connects area, border "
            "and interior: A = I + B / 2 - 1.",
            "Pick's theorem fits: the area equals I + B/2 - 1, so I = A - B/2 + 1.",
        )
    )
    t.gap().say("Area first, with the shoelace formula: each edge adds x1 * y2 - x2 * y1.")
    total = 0
    for p, q in edges:
        term = p[0] * q[1] - q[0] * p[1]
        t.line(f"{p} to {q}: {p[0]} * {q[1]} - {q[0]} * {p[1]} = {term}.")
        total += term
        t.say(f"Sum so far {total}.")
    t.gap().say(
        f"So twice the area is {doubled}, positive, as the corners go around counterclockwise. "
        f"The area is {Fraction(doubled, 2)}."
    )
    t.gap().say("Border points: an edge with steps dx and dy carries gcd(|dx|, |dy|) of them.")
    for p, q in edges:
        dx, dy = abs(q[0] - p[0]), abs(q[1] - p[1])
        t.line(f"{p} to {q}: dx = {dx}, dy = {dy}, gcd = {math.gcd(dx, dy)}.")
        if 0 in (dx, dy):
            t.say("(With a zero the gcd is the other number.)")
    t.gap().say(f"Together B = {on_edge}.")
    t.say(f"2I = {doubled} - {on_edge} + 2 = {2 * inside}, so I = {inside}.")
    if size > 1:
        t.gap().turn("check").say(
            "Row by row, then: for each height y, which x lie strictly between the edges?"
        )
        counted = 0
        for y in range(min(y for _, y in corners) + 1, max(y for _, y in corners)):
            xs = [x for x in range(reach + 1) if _is_inside((x, y), edges)]
            counted += len(xs)
            t.line(
                f"y = {y}: "
                + (f"x = {', '.join(map(str, xs))}, {len(xs)} points" if xs else "none")
                + f", {counted} so far."
            )
        t.gap().turn("agree")
    t.gap().turn("close")
    explanation = (
        f"The shoelace formula gives $2A = {doubled}$, and the edges carry $B = {on_edge}$ lattice "
        f"points. By Pick's theorem $I = A - B/2 + 1 = {inside}$."
    )
    return Worked(question, t, explanation, str(inside), (str(inside + on_edge), str(on_edge)))


def _is_inside(
    point: tuple[int, int], edges: list[tuple[tuple[int, int], tuple[int, int]]]
) -> bool:
    """Strictly inside, by crossings of a ray to the right in whole numbers."""
    x, y = point
    crossed = False
    for (ax, ay), (bx, by) in edges:
        side = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        if side == 0 and min(ax, bx) <= x <= max(ax, bx) and min(ay, by) <= y <= max(ay, by):
            return False
        if (ay > y) != (by > y) and (side > 0) == (by > ay):
            crossed = not crossed
    return crossed


def urn(rng: random.Random, size: int) -> Worked:
    """The chance of a number of one colour among balls drawn, by order, then by combinations."""
    red, blue = rng.randint(3, 6 + size), rng.randint(3, 6 + size)
    drawn = min(2 + size, red, blue)
    wanted = rng.randint(1, drawn - 1)
    n = red + blue
    chance = Fraction(math.comb(red, wanted) * math.comb(blue, drawn - wanted), math.comb(n, drawn))
    one, other = rng.sample(("red", "blue", "green", "white", "black", "yellow"), 2)
    question = rng.choice(
        (
            (
                f"A bag holds {red} {one} and {blue} {other} balls. {drawn} are drawn without putting "
                f"any back. What is the probability that exactly {wanted} of them "
                f"{'is' if wanted == 1 else 'are'} {one}?"
            ),
            (
                f"Among counters, {red} are {one} and {blue} are {other}. Somebody takes {drawn} of "
                f"them blindly, all at once. How likely is it to get exactly {wanted} {one}?"
            ),
        )
    )
    t = Thought(rng).turn("open").say(f"There are {red} + {blue} = {n} in all.")
    t.gap().say("One way: go through the orders in which they may come.").gap()
    orders = list(combinations(range(drawn), wanted))
    top = bottom = 1
    for places in orders:
        left = {one: red, other: blue}
        factors = []
        for k in range(drawn):
            colour = one if k in places else other
            factors.append(f"{left[colour]}/{n - k}")
            left[colour] -= 1
        word = ", ".join(one if k in places else other for k in range(drawn))
        t.line(f"{word}: {' * '.join(factors)}")
        if places == orders[0]:
            t.say(
                "The denominators do not depend on the order, and the numerators are the same "
                "numbers, only shuffled. So all orders are equally likely."
            )
    first = [red - i for i in range(wanted)] + [blue - i for i in range(drawn - wanted)]
    top, bottom = math.prod(first), math.prod(n - k for k in range(drawn))
    t.gap().say(
        f"There are {len(orders)} orders, each with the numerator "
        f"{' * '.join(map(str, first))} = {top} and the denominator "
        f"{' * '.join(str(n - k) for k in range(drawn))} = {bottom}."
    )
    t.say(
        f"Together {len(orders)} * {top} = {len(orders) * top}, over {bottom}; reduced, {chance}."
    )
    t.gap().turn("second").say(
        f"Choose without order: C({n}, {drawn}) = {math.comb(n, drawn)} hands. Favourable: "
        f"C({red}, {wanted}) * C({blue}, {drawn - wanted}) = {math.comb(red, wanted)} * "
        f"{math.comb(blue, drawn - wanted)} = "
        f"{math.comb(red, wanted) * math.comb(blue, drawn - wanted)}."
    )
    t.say(f"The quotient is {chance}, about {float(chance):.4f}.").turn("agree")
    if size > 2:
        t.gap().turn("check").say("All cases together must give 1.").gap()
        total = 0
        for k in range(drawn + 1):
            ways = math.comb(red, k) * math.comb(blue, drawn - k)
            total += ways
            t.line(f"{k} {one}: {math.comb(red, k)} * {math.comb(blue, drawn - k)} = {ways}; sum "
                   f"{total}.")  # fmt: skip
        t.gap().say(f"That is C({n}, {drawn}) = {math.comb(n, drawn)}, as it has to be.")
        t.turn("fine")
    t.gap().turn("close")
    explanation = (
        f"Of the $\\binom{{{n}}}{{{drawn}}} = {math.comb(n, drawn)}$ equally likely hands, "
        f"$\\binom{{{red}}}{{{wanted}}}\\binom{{{blue}}}{{{drawn - wanted}}} = "
        f"{math.comb(red, wanted) * math.comb(blue, drawn - wanted)}$ are favourable."
    )
    near = tuple(
        str(one)
        for one in (Fraction(wanted, drawn), 1 - chance, Fraction(red, n) ** wanted)
        if one not in (0, 1)
    )
    return Worked(question, t, explanation, str(chance), near)


def revenue(rng: random.Random, size: int) -> Worked:
    """The price with the largest takings: a table, then the vertex, then the neighbours."""
    step, lost = rng.choice((1, 2, 5)), rng.randint(2, 9)
    price, sold = rng.randint(6, 14) * step, lost * rng.randint(16, 26 + 6 * size)
    takings = {k: (price + step * k) * (sold - lost * k) for k in range(sold // lost + 1)}
    best = max(takings.values())
    thing = rng.choice(("boat tours", "notebooks", "concert tickets", "loaves", "bicycle rentals"))
    question = (
        f"At a price of {price} a shop sells {sold} {thing} a week. Each rise of the price by "
        f"{step} costs it {lost} sales. Only whole rises are possible, and the price is not "
        f"lowered. What are the largest weekly takings?"
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(
            f"After k rises the price is {price} + {step}k and {sold} - {lost}k are sold, so the "
            f"takings are R(k) = ({price} + {step}k)({sold} - {lost}k)."
        )
    )
    t.gap().say("A few values, to get a feeling:").gap()
    shown = sorted({0, 1, 2, *range(0, sold // lost + 1, max(1, sold // lost // (3 * size)))})
    for k in shown:
        t.line(
            f"k = {k}: ({price} + {step} * {k}) = {price + step * k}, sold {sold - lost * k}; "
            f"{price + step * k} * {sold - lost * k} = {takings[k]}."
        )
    vertex = Fraction(sold * step - price * lost, 2 * lost * step)
    t.gap().say(
        f"Expanding, R(k) = {price * sold} + ({sold * step} - {price * lost})k - {step * lost}k^2. "
        f"The parabola opens downwards, its vertex lies at k = {sold * step - price * lost} / "
        f"{2 * lost * step} = {vertex}."
    )
    inside = max(Fraction(0), vertex)
    near = sorted({max(0, math.floor(inside)), math.ceil(inside)})
    t.turn("doubt")
    if vertex < 0:
        t.say("That is negative, and the price may not fall. So k = 0 is best.")
    elif vertex.denominator == 1:
        t.say("A whole number, so this k itself is the best.")
    else:
        t.say("Not whole, so the best whole k is beside it. Compare the neighbours.")
    for k in near:
        t.line(f"k = {k}: {price + step * k} * {sold - lost * k} = {takings[k]}.")
    t.gap().turn("check")
    best_k = [k for k, value in takings.items() if value == best]
    for k in sorted({max(0, best_k[0] - 1), best_k[-1] + 1}):
        if k in takings and k not in best_k:
            t.say(f"For k = {k} it is {price + step * k} * {sold - lost * k} = {takings[k]}, less.")
    t.say(f"So {best} is the most.").gap().turn("close")
    explanation = (
        f"$R(k) = ({price} + {step}k)({sold} - {lost}k)$ has its vertex at $k = {vertex}$; the best "
        f"whole $k \\ge 0$ is {listed((f'${k}$' for k in best_k), 'or')}, with $R = {best}$."
    )
    return Worked(question, t, explanation, str(best), (str(takings[0]), str(best - step)))


def pipes(rng: random.Random, size: int) -> Worked:
    """Working together: rates add up; some start later or leave earlier."""
    n = min(2 + size // 2, 4)
    while True:
        alone = sorted(rng.sample(range(3, 25), n))
        head_start = rng.randint(1, 2)
        rates = [Fraction(1, one) for one in alone]
        done = rates[0] * head_start
        if done < 1:
            break
    names = rng.sample(_NAMES, n)
    together = sum(rates, Fraction(0))
    hours = head_start + (1 - done) / together
    said = listed(f"{name} alone needs {h} hours" for name, h in zip(names, alone, strict=True))
    others = listed(names[1:])
    question = (
        f"To paint a hall, {said}. {names[0]} starts alone; after {head_start} "
        f"hour{'s' if head_start > 1 else ''} {others} join{'s' if n == 2 else ''} in. How many "
        "hours after the start is the hall finished?"
    )
    t = Thought(rng).turn("open").say("In one hour, each does one over their own time:").gap()
    for name, h in zip(names, alone, strict=True):
        t.line(f"{name}: 1/{h} of the hall per hour.")
    t.gap().say(
        f"In the first {head_start} hour{'s' if head_start > 1 else ''} {names[0]} paints "
        f"{head_start}/{alone[0]}{'' if done.numerator == head_start else f' = {done}'}, so "
        f"{1 - done} remains."
    )
    common = math.lcm(*alone)
    parts = [common // h for h in alone]
    t.say(
        f"Together the rates are {' + '.join(f'1/{h}' for h in alone)}. Common denominator "
        f"{common}: {' + '.join(map(str, parts))} = {sum(parts)}, so {together} per hour."
    )
    t.gap().turn("stuck", chance=0.3).say(
        "Averaging the times would be wrong; it is the rates that add up.",
        "I must not add the times, only the rates.",
    )
    t.say(
        f"Time for the rest: ({1 - done}) / ({together}) = {(1 - done) / together} hours. With the "
        f"start, {head_start} + {(1 - done) / together} = {hours}."
    )
    t.gap().turn("check")
    for name, rate, index in zip(names, rates, range(n), strict=True):
        worked = hours if index == 0 else hours - head_start
        t.say(f"{name} works {worked} hours and does {worked * rate}.")
    t.say("These parts add up to 1.").turn("fine")
    t.gap().say(f"As a decimal, {float(hours):.2f} hours. Sensible: less than {alone[0]}.")
    t.turn("close")
    explanation = (
        f"{names[0]} does ${done}$ alone. The rest, ${1 - done}$, goes at the joint rate "
        f"${together}$ per hour, which takes ${(1 - done) / together}$ hours more."
    )
    return Worked(
        question, t, explanation, str(hours), (str(1 / together), str(hours - head_start))
    )


PROBLEMS = (tickets, polygon, urn, revenue, pipes)
