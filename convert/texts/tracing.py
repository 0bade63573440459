"""Small programs followed line by line: what do they print?"""

import random
from collections.abc import Callable

from convert.texts.thought import Thought
from convert.texts.worked import Worked

Traced = tuple[str, list[str], str, str]
"""A program, what happens in it, what it prints, and what it does in a sentence."""


def collatz(rng: random.Random, size: int) -> Traced:
    n = rng.randint(5, 20 + 30 * size)
    program = (
        f"n = {n}\nsteps = 0\npeak = n\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n"
        "    steps += 1\n    peak = max(peak, n)\nprint(steps, peak)"
    )
    steps, peak, lines = 0, n, []
    while n != 1:
        old = n
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
        risen = n > peak
        peak = max(peak, n)
        how = f"{old} / 2 = {n}" if old % 2 == 0 else f"3 * {old} + 1 = {n}"
        parity = "even" if old % 2 == 0 else "odd"
        lines.append(
            f"steps {steps}: {old} is {parity}, {how}" + (", a new peak." if risen else ".")
        )
    return (
        program,
        lines,
        f"{steps} {peak}",
        "counts the steps down to 1 and keeps the largest value",
    )


def palindrome(rng: random.Random, size: int) -> Traced:
    while True:
        n, tries, lines = rng.randint(12, 99 + 900 * size), 0, []
        program = (
            f"n = {n}\nk = 0\nwhile str(n) != str(n)[::-1]:\n    n += int(str(n)[::-1])\n    k += 1\n"
            "print(n, k)"
        )
        while str(n) != str(n)[::-1] and tries < 12:
            back = int(str(n)[::-1])
            lines.append(f"{n} backwards is {back}, not the same. {n} + {back} = {n + back}.")
            n += back
            tries += 1
        if str(n) == str(n)[::-1] and tries > 1:
            break
    lines.append(f"{n} reads the same backwards, so the loop ends.")
    return program, lines, f"{n} {tries}", "adds a number to its reverse until it is a palindrome"


def swaps(rng: random.Random, size: int) -> Traced:
    values = rng.sample(range(1, 40), 4 + size)
    program = (
        f"a = {values}\nswaps = 0\nfor end in range(len(a) - 1, 0, -1):\n    for i in range(end):\n"
        "        if a[i] > a[i + 1]:\n            a[i], a[i + 1] = a[i + 1], a[i]\n"
        "            swaps += 1\nprint(a, swaps)"
    )
    a, n, lines = list(values), 0, []
    for end in range(len(a) - 1, 0, -1):
        lines.append(f"end = {end}:")
        for i in range(end):
            if a[i] > a[i + 1]:
                said = f"  i = {i}: {a[i]} > {a[i + 1]}, swap; "
                a[i], a[i + 1] = a[i + 1], a[i]
                n += 1
                lines.append(f"{said}now {a}, swaps = {n}.")
            else:
                lines.append(f"  i = {i}: {a[i]} and {a[i + 1]} are in order already.")
    return program, lines, f"{a} {n}", "is bubble sort, and it counts its swaps"


def postfix(rng: random.Random, size: int) -> Traced:
    values = [rng.randint(2, 9)]
    tokens = [str(values[0])]
    depth = 1
    for _ in range(3 + 3 * size):
        if depth < 2 or rng.random() < 0.45:
            tokens.append(str(rng.randint(2, 12)))
            depth += 1
        else:
            tokens.append(rng.choice("+-*"))
            depth -= 1
    tokens += [rng.choice("+-") for _ in range(depth - 1)]
    program = (
        f'stack = []\nfor token in "{" ".join(tokens)}".split():\n    if token.isdigit():\n'
        "        stack.append(int(token))\n    else:\n        b, a = stack.pop(), stack.pop()\n"
        '        stack.append(a + b if token == "+" else a - b if token == "-" else a * b)\n'
        "print(stack)"
    )
    stack: list[int] = []
    lines = []
    for token in tokens:
        if token.isdigit():
            stack.append(int(token))
            lines.append(f"{token} is a number, push it: {stack}")
        else:
            b, a = stack.pop(), stack.pop()
            stack.append({"+": a + b, "-": a - b, "*": a * b}[token])
            right = f"({b})" if b < 0 else b
            lines.append(f"'{token}' takes {b} and then {a}: {a} {token} {right} = {stack[-1]}; "
                         f"stack {stack}")  # fmt: skip
    return program, lines, str(stack), "evaluates an expression in postfix notation"


def circle(rng: random.Random, size: int) -> Traced:
    n, step = rng.randint(5, 5 + 3 * size), rng.randint(2, 4)
    program = (
        f"people = list(range(1, {n + 1}))\nat = 0\nwhile len(people) > 1:\n"
        f"    at = (at + {step - 1}) % len(people)\n    people.pop(at)\nprint(people[0])"
    )
    people, at, lines = list(range(1, n + 1)), 0, []
    while len(people) > 1:
        old, at = at, (at + step - 1) % len(people)
        gone = people.pop(at)
        lines.append(
            f"at = ({old} + {step - 1}) % {len(people) + 1} = {at}; {gone} leaves, {people} remain."
        )
    return program, lines, str(people[0]), f"removes every {step}th of a circle until one is left"


def tally(rng: random.Random, size: int) -> Traced:
    word = "".join(rng.choice("abcde") for _ in range(6 + 4 * size))
    program = (
        f'last = {{}}\nbest = 0\nstart = 0\nfor i, c in enumerate("{word}"):\n'
        "    if last.get(c, -1) >= start:\n        start = last[c] + 1\n    last[c] = i\n"
        "    best = max(best, i - start + 1)\nprint(best, start)"
    )
    last: dict[str, int] = {}
    best = start = 0
    lines = []
    for i, c in enumerate(word):
        said = f"i = {i}, c = '{c}': "
        if last.get(c, -1) >= start:
            start = last[c] + 1
            said += f"seen at {last[c]}, inside the window, so start = {start}; "
        elif c in last:
            said += f"seen at {last[c]}, but that lies before start; "
        else:
            said += "new; "
        last[c] = i
        best = max(best, i - start + 1)
        lines.append(f"{said}length {i} - {start} + 1 = {i - start + 1}, best = {best}.")
    return program, lines, f"{best} {start}", "finds the longest stretch without a repeated letter"


def grid(rng: random.Random, size: int) -> Traced:
    n, m = rng.randint(3, 3 + size), rng.randint(3, 7)
    k = rng.randint(0, m - 1)
    program = (
        f"total = 0\nfor i in range(1, {n + 1}):\n    for j in range(i, {n + 1}):\n"
        f"        if (i * j + {k}) % {m} == 0:\n            continue\n        total += i * j % {m}\n"
        "print(total)"
    )
    total, lines = 0, []
    for i in range(1, n + 1):
        for j in range(i, n + 1):
            if (i * j + k) % m == 0:
                lines.append(f"i = {i}, j = {j}: {i} * {j} + {k} = {i * j + k}, divisible by {m}, "
                             "skipped.")  # fmt: skip
            else:
                total += i * j % m
                lines.append(f"i = {i}, j = {j}: {i} * {j} = {i * j}, modulo {m} it is {i * j % m}; "
                             f"total = {total}.")  # fmt: skip
    return program, lines, str(total), "adds up remainders of products, some of them left out"


PROGRAMS: tuple[Callable[[random.Random, int], Traced], ...] = (
    collatz,
    palindrome,
    swaps,
    postfix,
    circle,
    tally,
    grid,
)


def printed(rng: random.Random, size: int) -> Worked:
    """What a program prints, found by running it in one's head."""
    program, lines, output, does = rng.choice(PROGRAMS)(rng, size)
    question = rng.choice(
        (
            f"What does this Python program print?\n\n```python\n{program}\n```",
            (
                f"Without running it: what is the output of the following program?\n\n```python\n"
                f"{program}\n```"
            ),
            f"```python\n{program}\n```\n\nTrace this code and tell me exactly what it prints.",
        )
    )
    t = Thought(rng).turn("open")
    t.say(
        "I'll act as the interpreter and keep track of every variable.",
        "Let me go through the loop by hand, one pass after the other.",
        "There is no way around following it, so let me be careful with each step.",
    )
    if rng.random() < 0.5:
        t.say(f"From the look of it, the program {does}.")
    t.gap()
    for n, line in enumerate(lines, start=1):
        t.line(line)
        if n % 11 == 0:
            t.gap().turn("doubt", "check").say(
                "The line before this one is where I would slip most easily. It holds.",
                "I compare with the state two passes ago; nothing is lost.",
                "The loop's condition is still true, so it goes on.",
                "The variables are where they should be.",
            ).gap()
    t.gap().say(
        f"The loop is done. It prints {output}.",
        f"Now the last line: print shows {output}.",
        f"So the output is {output}.",
    )
    t.turn("doubt", chance=0.5).turn("close")
    reason = rng.choice(
        (
            f"The program {does}. Followed step by step, it takes {len(lines)} steps and prints:",
            f"It {does}; at the end it prints:",
        )
    )
    return Worked(question, t, f"{reason}\n\n```\n{output}\n```", output)
