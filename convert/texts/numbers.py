"""Number theory and counting, worked out at length."""

import math
import random

from convert.texts.thought import Thought, listed
from convert.texts.worked import Worked

_PRIMES = (5, 7, 8, 9, 11, 13, 17, 19)


def remainders(rng: random.Random, size: int) -> Worked:
    """The smallest positive number with given remainders, by sieving, then by inverses."""
    n_moduli = 2 if size < 3 else 3
    while True:
        moduli = sorted(rng.sample(_PRIMES, n_moduli))
        product = math.prod(moduli)
        if math.lcm(*moduli) == product and product > 60:
            break
    wanted = [rng.randrange(1, m) for m in moduli]
    result = next(n for n in range(1, product + 1) if [n % m for m in moduli] == wanted)
    thing = rng.choice(("stickers", "marbles", "seedlings", "postcards", "beads", "chairs"))
    said = [f"{r} are left over in rows of {m}" for r, m in zip(wanted, moduli, strict=True)]
    question = rng.choice(
        (
            (
                f"A box holds some {thing}. {listed(said)[0].upper()}{listed(said)[1:]}. What is the "
                "smallest number that the box can hold?"
            ),
            (
                f"Laid out in equal rows, a pile of {thing} behaves like this: {listed(said)}. Find the "
                "smallest positive number of them."
            ),
            (
                f"I arranged my {thing} in rows. Each time some remained: {listed(said)}. At least how "
                "many do I have?"
            ),
        )
    )
    t = Thought(rng).turn("open")
    names = listed(f"n ≡ {r} (mod {m})" for r, m in zip(wanted, moduli, strict=True))
    t.say(
        f"In congruences: {names}.",
        f"Call the number n. Then {names}.",
        f"So the conditions are {names}, and n should be as small as possible.",
    )
    t.say(
        f"The moduli share no factor, so there is exactly one solution below {product}.",
        f"Since {listed(moduli)} are pairwise coprime, the solution is unique modulo {product}.",
    )
    step, value = moduli[-1], wanted[-1]
    t.gap().say(
        f"Start with the largest modulus, it leaves the fewest candidates: n = {value} + {step}k.",
        f"I'll list the numbers that leave {value} modulo {step} and test them one after the other.",
    )
    for r, m in reversed(list(zip(wanted[:-1], moduli[:-1], strict=True))):
        t.gap().say(f"Now the condition modulo {m}: the remainder must be {r}.")
        tried = 0
        while value % m != r:
            t.line(
                f"{value} = {m} * {value // m} + {value % m}, remainder {value % m}, no.",
                f"{value}: {value} mod {m} is {value % m}, not {r}.",
                f"{value} leaves {value % m}. No.",
            )
            value += step
            tried += 1
            if tried == 5:
                t.turn("doubt").say(
                    f"Each step of {step} changes the remainder modulo {m} by {step % m}, so at "
                    f"most {m} tries are needed. Fine, keep going."
                )
        t.line(f"{value} = {m} * {value // m} + {r}, remainder {r}. Yes!")
        step *= m
        t.gap().say(
            f"So n = {value} + {step}k satisfies all so far.",
            f"Both conditions together repeat every {step}, so n = {value} + {step}k.",
        )
    t.gap().turn("check")
    for r, m in zip(wanted, moduli, strict=True):
        t.say(f"{value} - {r} = {value - r}, and {m} * {(value - r) // m} = {value - r}.")
    t.turn("fine")
    if size > 1:
        t.gap().turn("second").say("Take the constructive proof of the remainder theorem.")
        terms = []
        for r, m in zip(wanted, moduli, strict=True):
            rest = product // m
            inverse = pow(rest, -1, m)
            t.line(
                f"For {m}: the product of the others is {rest}, which is {rest % m} modulo {m}. "
                f"Its inverse: {rest % m} * {inverse} = {rest % m * inverse}, and that leaves 1. "
                f"The term is {r} * {rest} * {inverse} = {r * rest * inverse}."
            )
            terms.append(r * rest * inverse)
        total = sum(terms)
        t.gap().say(
            f"Sum: {' + '.join(map(str, terms))} = {total}. Reduce: {total} - {total // product} * "
            f"{product} = {result}."
        ).turn("agree")
    t.gap().turn("close")
    explanation = (
        f"Writing $n = {wanted[-1]} + {moduli[-1]}k$ and testing the remaining conditions in turn "
        f"gives $n = {result}$, unique modulo ${product}$. Indeed "
        + listed(f"${result} \\bmod {m} = {r}$" for r, m in zip(wanted, moduli, strict=True))
        + "."
    )
    near = (str(result + moduli[0]), str(result + moduli[-1]), str(product - result))
    return Worked(question, t, explanation, str(result), near)


def change(rng: random.Random, size: int) -> Worked:
    """Ways to pay an amount: by cases of the largest coin, then by a table."""
    coins = sorted(rng.choice(((2, 5, 10), (1, 5, 10), (3, 4, 10), (2, 5, 20), (5, 10, 25))))
    low, middle, high = coins
    amount = rng.randint(3, 4 + 2 * size) * high + rng.randint(0, high - 1)
    cases = []
    for n_high in range(amount // high + 1):
        rest = amount - high * n_high
        cases.append([n for n in range(rest // middle + 1) if (rest - middle * n) % low == 0])
    total = sum(map(len, cases))
    question = rng.choice(
        (
            (
                f"A machine takes coins of {low}, {middle} and {high} cents. In how many ways can "
                f"exactly {amount} cents be paid, if the order does not matter?"
            ),
            (
                f"Stamps come in values of {low}, {middle} and {high} cents, as many as you like. How "
                f"many combinations make a postage of exactly {amount} cents?"
            ),
            (
                f"With weights of {low} g, {middle} g and {high} g, any number of each, how many "
                f"different selections weigh {amount} g in total?"
            ),
        )
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(
            f"I need the solutions of {low}a + {middle}b + {high}c = {amount} in whole numbers from 0."
        )
    )
    t.say(
        f"The largest value restricts most, so I split by c, from 0 to {amount // high}.",
        f"Case by case over c seems best: c is at most {amount // high}.",
    ).gap()
    running = 0
    for n_high, fits in enumerate(cases):
        rest = amount - high * n_high
        t.line(
            f"c = {n_high}: {amount} - {high} * {n_high} = {rest} is left for {low}a + {middle}b.",
            f"With {n_high} of the {high}s, the rest is {amount} - {high} * {n_high} = {rest}.",
        )
        if low == 1:
            t.say(
                f"b can be anything from 0 to {rest // middle}, and a fills up: {len(fits)} ways."
            )
        elif not fits:
            t.say(f"No b from 0 to {rest // middle} leaves a multiple of {low}. Nothing here.")
        else:
            shown = [f"{rest} - {middle} * {n} = {rest - middle * n}" for n in fits[:2]]
            t.say(
                f"{rest} - {middle}b must be a multiple of {low}. That holds for b = "
                f"{listed(fits)} ({'; '.join(shown)}), so {len(fits)}.",
                f"Which b leave a multiple of {low}? b = {listed(fits)}. That makes {len(fits)}.",
            )
        t.say(f"Running total: {running} + {len(fits)} = {running + len(fits)}.")
        running += len(fits)
        t.turn("fine", "doubt", chance=0.12)
    t.gap().say(f"So {total} in total.").turn("doubt")
    t.say(
        "Did I count c = 0 as well? Yes, that was the first case.",
        "Zero of a kind is allowed; nothing in the text forbids it.",
    )
    if size > 1:
        t.gap().turn("second").say(
            "Build it up: let w(s) be the ways without the largest value, then add copies of it."
        )
        small = [len([b for b in range(s // middle + 1) if (s - middle * b) % low == 0])
                 for s in range(amount + 1)]  # fmt: skip
        parts = [small[amount - high * c] for c in range(amount // high + 1)]
        places = [amount - high * c for c in range(amount // high + 1)]
        t.gap().lines(
            f"w({s}): {low}a + {middle}b = {s} has {n} solutions."
            for s, n in zip(reversed(places), reversed(parts), strict=True)
        )
        t.gap().say(f"Adding up: {' + '.join(map(str, reversed(parts)))} = {total}.").turn("agree")
    t.gap().turn("close")
    explanation = (
        f"Split by the number $c$ of {high}s. For $c = 0, 1, \\dots, {amount // high}$ the "
        f"remaining amount can be made in ${', '.join(str(len(one)) for one in cases)}$ ways, "
        f"which add up to ${total}$."
    )
    return Worked(question, t, explanation, str(total), (str(total - len(cases[0])),))


def sequence(rng: random.Random, size: int) -> Worked:
    """A far term of a recurrence modulo a small number, through its period."""
    while True:
        modulus = rng.randint(5, 7 + 4 * size)
        u, v, w = rng.randint(1, 4), rng.randint(1, 4), rng.randint(0, 4)
        first, second = rng.randint(0, modulus - 1), rng.randint(1, modulus - 1)
        terms = [first, second]
        pairs = {(first, second): 1}
        while True:
            terms.append((u * terms[-1] + v * terms[-2] + w) % modulus)
            pair = (terms[-2], terms[-1])
            if pair in pairs:
                break
            pairs[pair] = len(terms) - 1
        start, period = pairs[pair], len(terms) - 1 - pairs[pair]
        if start == 1 and 5 <= period <= 8 + 14 * size:
            break
    wanted = rng.randint(200, 5000)
    index = (wanted - 1) % period
    rule = f"{u if u > 1 else ''}a_n + {v if v > 1 else ''}a_{{n-1}}" + (f" + {w}" if w else "")
    question = (
        f"A sequence starts with a_1 = {first} and a_2 = {second}. For n ≥ 2, a_{{n+1}} is the "
        f"remainder of {rule} when divided by {modulus}. "
    ) + rng.choice((f"Find a_{{{wanted}}}.", f"What is a_{{{wanted}}}?"))
    t = Thought(rng).turn("open")
    t.say(
        f"Terms are remainders modulo {modulus}, so pairs of neighbours must repeat sooner or "
        f"later: there are only {modulus} * {modulus} = {modulus * modulus} of them.",
        f"Computing {wanted} terms by hand is hopeless, but the sequence must be periodic, as it "
        f"has at most {modulus * modulus} different pairs of neighbours.",
    ).gap()
    for n in range(2, len(terms)):
        before, last = terms[n - 2], terms[n - 1]
        value = u * last + v * before + w
        work = f"{u} * {last} + {v} * {before}" + (f" + {w}" if w else "") + f" = {value}"
        t.line(f"a_{n + 1}: {work}, remainder {terms[n]}.")
        if n % 9 == 0:
            t.turn("check", "doubt", chance=0.4)
            t.say(
                f"No repetition of the pair {first}, {second} so far.",
                f"Still waiting for {first} followed by {second}.",
            )
    t.gap().say(
        f"There: a_{period + 1} = {first} and a_{period + 2} = {second}, the same pair as at the "
        f"start. So the period is {period}.",
        f"The pair {first}, {second} has come back at place {period + 1}. Everything repeats with "
        f"period {period}.",
    )
    t.gap().say(
        f"Now {wanted} modulo {period}: {period} * {wanted // period} = "
        f"{period * (wanted // period)}, and {wanted} - {period * (wanted // period)} = "
        f"{wanted % period}."
    )
    place = index + 1
    if wanted % period == 0:
        t.say(f"Remainder 0 means the last place of a period, a_{period}.").turn("doubt")
        t.say("Counting starts at 1, so yes, the remainder 0 is the end and not the start.")
    t.say(f"So a_{{{wanted}}} = a_{place} = {terms[index]}.").turn("fine")
    if size > 1:
        again = index
        t.gap().turn("check").say(
            f"Is the period maybe shorter, which would not matter, or did I slip? Recompute around "
            f"place {place}:"
        )
        if again >= 2:
            b, c = terms[again - 2], terms[again - 1]
            t.say(
                f"{u} * {c} + {v} * {b}" + (f" + {w}" if w else "") + f" = {u * c + v * b + w}, "
                f"which leaves {terms[again]} modulo {modulus}."
            )
        t.turn("agree")
    t.gap().turn("close")
    explanation = (
        f"Computing terms until the pair $({first}, {second})$ returns shows that the sequence has "
        f"period ${period}$. Since ${wanted} \\equiv {wanted % period} \\pmod{{{period}}}$, "
        f"$a_{{{wanted}}} = a_{{{place}}} = {terms[index]}$."
    )
    return Worked(question, t, explanation, str(terms[index]))


def payments(rng: random.Random, size: int) -> Worked:
    """Solutions of ax + by = c from 0 on: Euclid's algorithm, back again, and the bounds."""
    while True:
        a, b = rng.randint(5, 20 + 12 * size), rng.randint(5, 20 + 12 * size)
        if a > b and math.gcd(a, b) == 1 and a % b > 1:
            break
    x0, y0 = rng.randint(2, 4 + 3 * size), rng.randint(2, 12 + 3 * size)
    total = a * x0 + b * y0
    solutions = [
        (x, (total - a * x) // b) for x in range(total // a + 1) if (total - a * x) % b == 0
    ]
    big, small = rng.choice(
        (("crates", "bags"), ("large tins", "small tins"), ("benches", "stools"), ("vans", "cars"))
    )
    unit = rng.choice(("kilograms", "euros", "units", "points"))
    question = rng.choice(
        (
            (
                f"{big.capitalize()} count {a} {unit} each and {small} {b}. In how many ways can one "
                f"take {big} and {small}, possibly none of a kind, for exactly {total} {unit}?"
            ),
            (
                f"Each of the {big} makes {a} {unit}, each of the {small} makes {b}. How many pairs of "
                f"numbers (zero allowed) of {big} and {small} make {total} {unit} together?"
            ),
        )
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(f"With x {big} and y {small}: {a}x + {b}y = {total}, both at least 0.")
    )
    t.gap().say("First Euclid, to see whether there are solutions at all.")
    rows = []
    p, q = a, b
    while q:
        t.line(f"{p} = {p // q} * {q} + {p % q}")
        rows.append((p, q))
        p, q = q, p % q
    t.line(f"So gcd({a}, {b}) = 1, and whole solutions exist for every right side.")
    inverse = pow(a, -1, b)
    x_first = solutions[0][0]
    t.gap().say(
        f"Modulo {b} the equation says {a % b}x ≡ {total % b}.",
        f"To get rid of y, look modulo {b}: {a} ≡ {a % b} and {total} ≡ {total % b}, so "
        f"{a % b}x ≡ {total % b} (mod {b}).",
    )
    t.say(
        f"What is the inverse of {a % b} modulo {b}? I try multiples: "
        + ", ".join(f"{a % b} * {k} = {a % b * k}" for k in range(max(1, inverse - 2), inverse + 1))
        + f", and {a % b * inverse} leaves 1 modulo {b}. So the inverse is {inverse}."
    )
    t.say(
        f"Then x ≡ {inverse} * {total % b} = {inverse * (total % b)}, which is {x_first} modulo {b}."
    )
    t.gap().say(
        f"So x = {x_first} + {b}k, and y = ({total} - {a}x) / {b}.",
        f"The solutions are x = {x_first}, {x_first + b}, {x_first + 2 * b}, and so on, as long as "
        "y stays at least 0.",
    )
    for x, y in solutions:
        t.line(f"x = {x}: {total} - {a} * {x} = {total - a * x}, and {b} * {y} = {b * y}. y = {y}.")
    beyond = solutions[-1][0] + b
    t.line(
        f"x = {beyond}: {a} * {beyond} = {a * beyond}, more than {total}. Too large.",
        f"The next would be x = {beyond}, but {a} * {beyond} = {a * beyond} exceeds {total}.",
    )
    t.gap().turn("doubt").say(
        f"From one solution to the next x grows by {b} and y falls by {a}; that is what the list "
        "shows."
        if len(solutions) > 1
        else "Only a single pair survives; the next step would make y negative."
    )
    if size > 2:
        t.gap().turn("second").say(f"Trying y instead: {b}y ≡ {total % a} (mod {a}).").gap()
        for y in range(min(a, total // b + 1)):
            value = total - b * y
            good = value % a == 0
            t.line(
                f"y = {y}: {total} - {b} * {y} = {value}, "
                + (f"= {a} * {value // a}. Yes." if good else f"remainder {value % a} modulo {a}.")
            )
        t.gap().turn("agree")
    t.gap().say(f"That makes {len(solutions)} in all.").turn("close")
    pairs = listed(f"$({x}, {y})$" for x, y in solutions)
    explanation = (
        f"We need ${a}x + {b}y = {total}$ with $x, y \\ge 0$. Modulo ${b}$ this forces "
        f"$x \\equiv {x_first}$, and the pairs that keep $y \\ge 0$ are {pairs}."
    )
    return Worked(question, t, explanation, str(len(solutions)))


def ending(rng: random.Random, size: int) -> Worked:
    """The last two digits of a power, by squaring, then by the cycle."""
    base = rng.choice([n for n in range(3, 98) if n % 10 not in (0, 1)])
    exponent = rng.randint(30, 90 + 300 * size)
    result = pow(base, exponent, 100)
    question = rng.choice(
        (
            f"What are the last two digits of {base}^{exponent}, read as a number?",
            f"Find the remainder of {base}^{exponent} modulo 100.",
        )
    )
    t = (
        Thought(rng)
        .turn("open")
        .say("Only the residue modulo 100 matters, so I may reduce after every multiplication.")
    )
    bits = [k for k in range(exponent.bit_length()) if exponent >> k & 1]
    t.say(
        f"Write the exponent in binary: {exponent} = {' + '.join(str(1 << k) for k in bits[::-1])}.",
    ).gap()
    squares = [base % 100]
    t.line(f"{base}^1 ≡ {base}.")
    for k in range(1, exponent.bit_length()):
        before = squares[-1]
        squares.append(before * before % 100)
        t.line(f"{base}^{1 << k}: {before} * {before} = {before * before}, so {squares[-1]}.")
        t.turn("fine", "doubt", chance=0.1)
    t.gap().say("Now multiply those that are needed.")
    value = squares[bits[0]]
    t.line(f"Start with {base}^{1 << bits[0]} ≡ {value}.")
    for k in bits[1:]:
        t.line(
            f"Times {base}^{1 << k}: {value} * {squares[k]} = {value * squares[k]}, so "
            f"{value * squares[k] % 100}."
        )
        value = value * squares[k] % 100
    t.gap().say(f"So the power ends in {value:02d}.").turn("doubt")
    if size > 1:
        t.gap().turn("second").say("The powers modulo 100 run in a cycle; let me find it.")
        seen: list[int] = []
        power = base % 100
        while power not in seen:
            seen.append(power)
            power = power * base % 100
        start, period = seen.index(power), len(seen) - seen.index(power)
        t.gap()
        for n, residue in enumerate(seen, start=1):
            t.line(f"{base}^{n} ≡ {residue}")
        t.line(f"{base}^{len(seen) + 1} ≡ {power}, which has been there: exponent {start + 1}.")
        place = (exponent - 1 - start) % period + start
        t.gap().say(
            f"The cycle has length {period}. {exponent} falls on the same place as "
            f"{place + 1}, whose residue is {seen[place]}."
        ).turn("agree")
    t.gap().turn("close")
    explanation = (
        f"Repeated squaring modulo $100$, with ${exponent}$ written in binary, gives "
        f"${base}^{{{exponent}}} \\equiv {result} \\pmod{{100}}$."
    )
    return Worked(question, t, explanation, str(result), (str((result + 50) % 100),))


def multiples(rng: random.Random, size: int) -> Worked:
    """Numbers up to a bound that none of three divides, by inclusion and exclusion."""
    while True:
        divisors = sorted(rng.sample((2, 3, 4, 5, 6, 7, 9, 10, 11), 3))
        a, b, c = divisors
        if b % a and c % a and c % b:
            break
    bound = rng.randint(60, 90 + 200 * size)
    good = [n for n in range(1, bound + 1) if all(n % d for d in divisors)]
    question = rng.choice(
        (
            (
                f"How many of the whole numbers from 1 to {bound} are divisible by none of {a}, {b} "
                f"and {c}?"
            ),
            (
                f"Lockers 1 to {bound} are closed. Everyone whose number is a multiple of {a}, of {b} "
                f"or of {c} gets opened. How many stay closed?"
            ),
        )
    )
    question = question.replace("Everyone", "Every one")
    t = (
        Thought(rng)
        .turn("open")
        .say("Count those that at least one divides, and subtract. Inclusion and exclusion, then.")
    )
    t.gap()
    for d in divisors:
        t.line(f"Multiples of {d}: {bound} = {d} * {bound // d} + {bound % d}, so {bound // d}.")
    pairs = [(a, b), (a, c), (b, c)]
    t.gap().say(
        "For pairs I need the least common multiples, not simply the products.",
        "Careful with the pairs: the product is only right where they share no factor.",
    )
    for p, q in pairs:
        m = math.lcm(p, q)
        t.line(f"lcm({p}, {q}) = {m}: {bound // m} multiples, since {m} * {bound // m} = "
               f"{m * (bound // m)}.")  # fmt: skip
    all_three = math.lcm(*divisors)
    t.line(f"lcm of all three: {all_three}, so {bound // all_three} up to {bound}.")
    singles = [bound // d for d in divisors]
    doubles = [bound // math.lcm(p, q) for p, q in pairs]
    union = sum(singles) - sum(doubles) + bound // all_three
    t.gap().say(
        f"Union: {' + '.join(map(str, singles))} = {sum(singles)}, minus "
        f"{' + '.join(map(str, doubles))} = {sum(doubles)}, plus {bound // all_three}. That is "
        f"{sum(singles)} - {sum(doubles)} + {bound // all_three} = {union}."
    )
    t.say(f"Left over: {bound} - {union} = {bound - union}.")
    t.gap().turn("check").say("On a small range I can list the survivors and compare.")
    part = min(bound, 30 * size)
    survivors = [n for n in good if n <= part]
    small = [part // d for d in divisors]
    small_2 = [part // math.lcm(p, q) for p, q in pairs]
    formula = part - sum(small) + sum(small_2) - part // all_three
    t.say(
        f"Up to {part} these remain: {', '.join(map(str, survivors))}. Counted: {len(survivors)}. "
        f"The formula: {part} - {sum(small)} + {sum(small_2)} - {part // all_three} = {formula}."
    )
    t.turn("agree").gap().turn("close")
    explanation = (
        f"By inclusion and exclusion ${union}$ of the numbers are divisible by at least one of "
        f"${a}, {b}, {c}$ (least common multiples for the overlaps), so ${bound} - {union} = "
        f"{bound - union}$ are left."
    )
    near = (str(bound - sum(singles)), str(union), str(bound - union - bound // all_three))
    return Worked(question, t, explanation, str(bound - union), near)


def walks(rng: random.Random, size: int) -> Worked:
    """Shortest ways over a grid with closed corners, row by row."""
    while True:
        right, up = rng.randint(3, 4 + size), rng.randint(3, 3 + size)
        corners = [(x, y) for x in range(right + 1) for y in range(up + 1)][1:-1]
        closed = sorted(rng.sample(corners, 1 + size))
        rows: list[list[int]] = []
        for y in range(up + 1):
            row: list[int] = []
            for x in range(right + 1):
                below = rows[y - 1][x] if y else 0
                left = row[x - 1] if x else 0
                ways = 1 if x == y == 0 else below + left
                row.append(0 if (x, y) in closed else ways)
            rows.append(row)
        if rows[up][right] > 1:
            break
    total = rows[up][right]
    where = listed(f"({x}, {y})" for x, y in closed)
    question = (
        f"On a grid of streets one walks from (0, 0) to ({right}, {up}), each step one to the "
        f"right or one up. The crossing{'s' if len(closed) > 1 else ''} {where} may not be "
        f"entered. How many ways are there?"
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(
            "Each crossing is reached from the left or from below, so its number of ways is the sum of "
            "these two, and 0 where it is closed."
        )
    )
    t.say("I fill in a table, row by row from the bottom.").gap()
    for y in range(up + 1):
        for x in range(right + 1):
            if (x, y) in closed:
                t.line(f"({x}, {y}) is closed: 0.")
            elif x and y:
                left, below = rows[y][x - 1], rows[y - 1][x]
                t.line(f"({x}, {y}): {left} from the left, {below} from below, {left} + {below} = "
                       f"{left + below}.")  # fmt: skip
            elif x or y:
                t.line(f"({x}, {y}): on the edge, one way to come, so {rows[y][x]}.")
        t.line(f"Row {y}: {' '.join(map(str, rows[y]))}")
        t.turn("fine", "next", chance=0.4)
    free = math.comb(right + up, up)
    t.gap().turn("doubt").say(
        f"Without closed crossings there would be C({right + up}, {up}) = {free}, so {total} is "
        f"possible: {free} - {total} = {free - total} ways are lost."
    )
    if size > 1:
        x, y = closed[0]
        through = math.comb(x + y, x) * math.comb(right - x + up - y, up - y)
        t.gap().turn("check").say(
            f"Through ({x}, {y}) alone would lead C({x + y}, {x}) * C({right - x + up - y}, "
            f"{up - y}) = {math.comb(x + y, x)} * {math.comb(right - x + up - y, up - y)} = "
            f"{through} of them, which is at most the {free - total} lost. "
            "Plausible."
        )
    t.gap().turn("close")
    explanation = (
        "Filling in the number of ways crossing by crossing (the sum of left and below, $0$ where "
        f"closed) gives ${total}$ at $({right}, {up})$."
    )
    return Worked(question, t, explanation, str(total), (str(free - total), str(free)))


PROBLEMS = (remainders, change, sequence, payments, ending, multiples, walks)
