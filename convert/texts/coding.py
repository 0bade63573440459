"""Functions written and tested by hand, and broken ones mended."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from convert.calibration import Conversation
from convert.texts.thought import Thought
from convert.texts.tracing import printed
from convert.texts.worked import Dice, Maker, user


@dataclass(frozen=True, slots=True)
class Task:
    """A function to write: what is asked, what to think of, the code, and how cases go.

    case(rng, size) -> (arguments as source, result as source, what happens on the way).
    """

    name: str
    requests: tuple[str, ...]
    plan: tuple[str, ...]
    worries: tuple[str, ...]
    code: str
    cost: str
    case: Callable[[random.Random, int], tuple[str, str, list[str]]]


def _runs(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    text = "".join(rng.choice("abz") * rng.randint(1, 4) for _ in range(2 + 2 * size))
    runs: list[tuple[str, int]] = []
    lines = []
    for c in text:
        if runs and runs[-1][0] == c:
            runs[-1] = (c, runs[-1][1] + 1)
            lines.append(f"'{c}' again, the last run grows to {runs[-1]}.")
        else:
            runs.append((c, 1))
            lines.append(f"'{c}' differs from what came before, so a new run {runs[-1]}.")
    return repr(text), repr(runs), lines


def _brackets(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    text = "".join(
        rng.choice(("()", "[]", "{}", "([])", "{()}", "[", ")")) for _ in range(1 + size)
    )
    pairs = {")": "(", "]": "[", "}": "{"}
    stack: list[str] = []
    lines = []
    for c in text:
        if c not in pairs:
            stack.append(c)
            lines.append(f"'{c}' opens: stack {''.join(stack)!r}.")
        elif stack and stack[-1] == pairs[c]:
            stack.pop()
            lines.append(f"'{c}' closes the {pairs[c]!r} on top: stack {''.join(stack)!r}.")
        else:
            lines.append(f"'{c}' has no partner on top of {''.join(stack)!r}. False at once.")
            return repr(text), "False", lines
    lines.append(f"At the end the stack is {''.join(stack)!r}, so {not stack}.")
    return repr(text), str(not stack), lines


def _factors(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    n = 1
    for _ in range(1 + size):
        n *= rng.choice((2, 2, 3, 3, 5, 7, 11, 13))
    rest, p, found, lines = n, 2, [], []
    while p * p <= rest:
        if rest % p == 0:
            lines.append(f"{p} divides {rest}: {rest} / {p} = {rest // p}.")
            found.append(p)
            rest //= p
        else:
            lines.append(f"{p} does not divide {rest}, and {p} * {p} = {p * p} is still at most "
                         f"{rest}. Next {p + 1}.")  # fmt: skip
            p += 1
    if rest > 1:
        found.append(rest)
        lines.append(
            f"Now {p} * {p} = {p * p} exceeds {rest}, so {rest} itself is prime. Append it."
        )
    return str(n), repr(found), lines


def _left(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    values = sorted(rng.randint(1, 12 + 6 * size) for _ in range(4 + 3 * size))
    wanted = rng.choice([*values, values[0] - 1, values[-1] + 1])
    low, high, lines = 0, len(values), []
    while low < high:
        middle = (low + high) // 2
        said = f"low = {low}, high = {high}: middle = {middle}, value {values[middle]}"
        if values[middle] < wanted:
            low = middle + 1
            lines.append(f"{said} < {wanted}, so low = {low}.")
        else:
            high = middle
            lines.append(f"{said} >= {wanted}, so high = {high}.")
    lines.append(f"low = high = {low}.")
    return f"{values}, {wanted}", str(low), lines


def _merged(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    a = sorted(rng.randint(1, 30) for _ in range(1 + size))
    b = sorted(rng.randint(1, 30) for _ in range(rng.randint(0, 2 + size)))
    i = j = 0
    out: list[int] = []
    lines = []
    while i < len(a) and j < len(b):
        if b[j] < a[i]:
            out.append(b[j])
            lines.append(f"{b[j]} < {a[i]}, take {b[j]} from the second: {out}")
            j += 1
        else:
            out.append(a[i])
            lines.append(f"{a[i]} <= {b[j]}, take {a[i]} from the first: {out}")
            i += 1
    rest = a[i:] + b[j:]
    lines.append(f"One list is used up, the rest {rest} follows: {out + rest}")
    return f"{a}, {b}", repr(out + rest), lines


def _roman(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    n = rng.randint(4, min(3999, 40 * 9**size))
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    signs = "M CM D CD C XC L XL X IX V IV I".split()
    rest, out, lines = n, "", []
    for value, sign in zip(values, signs, strict=True):
        while rest >= value:
            rest -= value
            out += sign
            lines.append(f"{sign} fits: {rest + value} - {value} = {rest}, so far {out}.")
    return str(n), repr(out), lines


def _window(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    values = [rng.randint(-9, 12) for _ in range(4 + 2 * size)]
    best, here, lines = values[0], values[0], [f"Start: best = here = {values[0]}."]
    for x in values[1:]:
        old = here
        here = max(x, here + x)
        best = max(best, here)
        second = f"({x})" if x < 0 else x
        lines.append(f"{x}: {old} + {second} = {old + x} against {x} alone, here = {here}, best = "
                     f"{best}.")  # fmt: skip
    return repr(values), str(best), lines


def _clock(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    seconds = rng.randint(1, 50 * 12**size)
    parts, lines, rest = [], [], seconds
    for name, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        n, left = divmod(rest, length)
        lines.append(f"{rest} = {length} * {n} + {left}: " + (f"{n}{name}." if n else "left out."))
        if n:
            parts.append(f"{n}{name}")
        rest = left
    return str(seconds), repr(" ".join(parts)), lines


def _transposed(rng: random.Random, size: int) -> tuple[str, str, list[str]]:
    rows, columns = rng.randint(2, 1 + size + 1), rng.randint(2, 2 + size)
    matrix = [[rng.randint(0, 9) for _ in range(columns)] for _ in range(rows)]
    turned = [list(row) for row in zip(*matrix[::-1], strict=True)]
    lines = [
        f"Column {k}, read from the bottom up: {row}. That is row {k} of the result."
        for k, row in enumerate(turned)
    ]
    return repr(matrix), repr(turned), lines


TASKS = (
    Task(
        "runs",
        (
            (
                "Write a Python function `runs(text)` that returns the runs of equal characters as "
                "pairs (character, length)."
            ),
            (
                "I need run-length encoding in Python: `runs(text)`, giving a list of (character, "
                "count) tuples. Keep it simple."
            ),
        ),
        (
            "One pass, with the last run kept open at the end of the list.",
            "itertools.groupby would do it too, but an explicit loop shows what happens.",
        ),
        (
            "An empty string should give an empty list; the loop never runs, so it does.",
            "Tuples are immutable, so the last pair must be replaced, not changed.",
        ),
        'def runs(text):\n    """Return [(character, length), ...] of the runs in text."""\n'
        "    found = []\n    for c in text:\n        if found and found[-1][0] == c:\n"
        "            found[-1] = (c, found[-1][1] + 1)\n        else:\n"
        "            found.append((c, 1))\n    return found",
        "Each character is looked at once, so the time is linear.",
        _runs,
    ),
    Task(
        "balanced",
        (
            (
                "Write `balanced(text)` in Python: True if the brackets (), [] and {} in it are "
                "properly nested. Other characters do not occur."
            ),
            (
                "How do I check in Python that brackets of three kinds are closed in the right order? "
                "Please give me a function `balanced(text)`."
            ),
        ),
        (
            "A stack of open brackets; every closing one must match the top.",
            "Counting is not enough, since '([)]' has equal counts and is wrong. So a stack.",
        ),
        (
            "At the end the stack must be empty, or something was never closed.",
            "A closing bracket on an empty stack must not crash; test the stack first.",
        ),
        'def balanced(text):\n    """Whether all brackets in text are closed in the right order."""\n'
        '    opening = {")": "(", "]": "[", "}": "{"}\n    stack = []\n    for c in text:\n'
        "        if c not in opening:\n            stack.append(c)\n"
        "        elif not stack or stack.pop() != opening[c]:\n            return False\n"
        "    return not stack",
        "Time and memory are linear in the length of the text.",
        _brackets,
    ),
    Task(
        "prime_factors",
        (
            (
                "Please write `prime_factors(n)` in Python for n ≥ 1, the prime factors in ascending "
                "order, repeated as often as they divide."
            ),
            (
                "A short Python function `prime_factors(n)`, please, that lists the prime factors with "
                "multiplicity."
            ),
        ),
        (
            "Trial division: divide by p as long as it goes, stop when p * p exceeds the rest.",
            "What remains above 1 when the loop stops has no divisor up to its root, so it is prime.",
        ),
        (
            "n = 1 has no prime factors, and the loop is skipped: an empty list. Good.",
            "Composite candidates such as 4 are harmless: their primes are divided out by then.",
        ),
        'def prime_factors(n):\n    """Return the prime factors of n in ascending order."""\n'
        "    found = []\n    p = 2\n    while p * p <= n:\n        if n % p == 0:\n"
        "            found.append(p)\n            n //= p\n        else:\n            p += 1\n"
        "    if n > 1:\n        found.append(n)\n    return found",
        "It takes at most about sqrt(n) divisions.",
        _factors,
    ),
    Task(
        "first_at_least",
        (
            (
                "Write a binary search `first_at_least(values, wanted)`: the first index in the sorted "
                "list whose value is at least `wanted`, or len(values) if there is none."
            ),
            (
                "In Python, without bisect: `first_at_least(values, wanted)`, the leftmost position "
                "where `wanted` could be inserted to keep the list sorted."
            ),
        ),
        (
            "Half-open interval [low, high): the answer is always inside or equal to high.",
            "Invariant: everything before low is too small, everything from high on is large enough.",
        ),
        (
            "Equal values: high moves to the middle, so the leftmost is found.",
            "Does it end? With low < high the middle is below high, so the interval shrinks each time.",
        ),
        "def first_at_least(values, wanted):\n"
        '    """Return the first index whose value is >= wanted, len(values) without one."""\n'
        "    low, high = 0, len(values)\n    while low < high:\n        middle = (low + high) // 2\n"
        "        if values[middle] < wanted:\n            low = middle + 1\n        else:\n"
        "            high = middle\n    return low",
        "The interval halves with each step, so about log2(n) comparisons are made.",
        _left,
    ),
    Task(
        "merge",
        (
            (
                "Write `merge(a, b)` in Python: two sorted lists become one sorted list, in linear "
                "time."
            ),
            "Give me the merging step of merge sort as a Python function `merge(a, b)`.",
        ),
        (
            "Two indices; take the smaller head each time, then append what is left.",
            "sorted(a + b) is shorter, but the linear time was asked for, so two pointers.",
        ),
        (
            "With equal heads take from the first list, so that the merge is stable.",
            "If one of them is empty the loop is skipped and the other is copied. Fine.",
        ),
        'def merge(a, b):\n    """Return the items of two sorted lists as one sorted list."""\n'
        "    merged = []\n    i = j = 0\n    while i < len(a) and j < len(b):\n"
        "        if b[j] < a[i]:\n            merged.append(b[j])\n            j += 1\n"
        "        else:\n            merged.append(a[i])\n            i += 1\n"
        "    return merged + a[i:] + b[j:]",
        "Every item is moved once: O(len(a) + len(b)).",
        _merged,
    ),
    Task(
        "roman",
        (
            "Write `roman(n)` in Python for 1 ≤ n ≤ 3999, the Roman numeral as a string.",
            (
                "How can I turn an integer below 4000 into a Roman numeral in Python? A function "
                "`roman(n)` would be nice."
            ),
        ),
        (
            "A table of values from 1000 down, the subtractive pairs included; take greedily.",
            "If IV, IX, XL and so on stand in the table, no special cases are needed.",
        ),
        (
            "Greedy is right here, as each value is used at most three times before a larger fits.",
            "Zero and negatives are outside of what was asked; no code for them.",
        ),
        'def roman(n):\n    """Return n, from 1 to 3999, as a Roman numeral."""\n'
        '    signs = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"),\n'
        '             (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]\n'
        '    numeral = ""\n    for value, sign in signs:\n        while n >= value:\n'
        "            numeral += sign\n            n -= value\n    return numeral",
        "The number of steps is the length of the numeral, at most fifteen.",
        _roman,
    ),
    Task(
        "best_sum",
        (
            (
                "Find the largest sum of a non-empty contiguous part of a list of integers. A Python "
                "function `best_sum(values)`, please, in linear time."
            ),
            (
                "Write `best_sum(values)`: the maximum over all contiguous, non-empty slices of their "
                "sum. The list is not empty."
            ),
        ),
        (
            (
                "Kadane's idea: the best slice that ends here either extends the one before or starts "
                "anew."
            ),
            "All slices would be quadratic. Keep the best sum ending at each place instead.",
        ),
        (
            "All values negative: the answer is the largest single value, so don't start from 0.",
            "Ties do not matter, only the sum is wanted.",
        ),
        'def best_sum(values):\n    """Return the largest sum of a non-empty contiguous slice."""\n'
        "    best = here = values[0]\n    for x in values[1:]:\n        here = max(x, here + x)\n"
        "        best = max(best, here)\n    return best",
        "One pass, constant memory.",
        _window,
    ),
    Task(
        "duration",
        (
            (
                "Write `duration(seconds)` in Python that formats a positive number of seconds like "
                '"1d 2h 5s"; parts that are zero are left out.'
            ),
            (
                'I want a Python function `duration(seconds)`: 3725 should become "1h 2m 5s". Skip the '
                "zero parts."
            ),
        ),
        (
            "divmod with 86400, 3600, 60 and 1, collecting the parts that are not zero.",
            "A table of units keeps it to one loop.",
        ),
        (
            "Each unit is used once, since the rest after divmod is smaller than the unit.",
            'Joining with a space leaves no trailing blank, unlike adding "1h " piece by piece.',
        ),
        'def duration(seconds):\n    """Format seconds as days, hours, minutes and seconds."""\n'
        '    parts = []\n    for name, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):\n'
        "        n, seconds = divmod(seconds, length)\n        if n:\n"
        '            parts.append(f"{n}{name}")\n    return " ".join(parts)',
        "There are four divisions, whatever the number.",
        _clock,
    ),
    Task(
        "rotated",
        (
            (
                "Rotate a matrix (a list of rows) by 90 degrees clockwise in Python: `rotated(matrix)` "
                "returns a new one."
            ),
            (
                "Please write `rotated(matrix)`, which turns a rectangular list of lists a quarter to "
                "the right without changing the argument."
            ),
        ),
        (
            (
                "The first column, from the bottom up, becomes the first row. So: reverse the rows, then "
                "transpose."
            ),
            "zip(*rows) transposes; with the rows reversed first it is a clockwise turn.",
        ),
        (
            "zip gives tuples; turn them into lists so that the result has the argument's type.",
            "Not square is no problem: r rows and c columns become c rows and r columns.",
        ),
        'def rotated(matrix):\n    """Return the matrix turned by 90 degrees clockwise."""\n'
        "    return [list(row) for row in zip(*matrix[::-1])]",
        "Every cell is copied once.",
        _transposed,
    ),
)


def written(rng: Dice, size: int) -> Conversation:
    """A function with its tests, each test worked through before it is written down."""
    task = rng.own(TASKS)
    t = Thought(rng).turn("open").say(*task.plan)
    t.gap().say("Edge cases.").say(*task.worries).say(*task.worries)
    t.gap().say(
        "Let me write it.",
        "So the code would be:",
        "First version, which I will then test by hand:",
    )
    t.gap().lines(f"```python\n{task.code}\n```".splitlines()).gap()
    t.say("Now some cases, followed by hand.", "Let me run it in my head on a few inputs.")
    tests: list[str] = []
    for _ in range(1 + size):
        arguments, result, lines = task.case(rng, rng.randint(1, size))
        if any(arguments in test for test in tests):
            continue
        t.gap().line(f"{task.name}({arguments}):")
        for number, line in enumerate(lines, start=1):
            t.line(line)
            if number % 12 == 0:
                t.turn("fine", "doubt")
        t.line(f"It returns {result}.").turn("fine", "doubt", "next", chance=0.6)
        tests.append(f"assert {task.name}({arguments}) == {result}")
    t.gap().turn("check").say(*task.worries).turn("close")
    block = f"```python\n{task.code}\n\n\n" + "\n".join(tests) + "\n```"
    answer = rng.choice((f"{block}\n\n{task.cost}", f"{task.cost}\n\n{block}", block))
    return Conversation("code", (user(rng.choice(task.requests)),), t.text, answer)


@dataclass(frozen=True, slots=True)
class Bug:
    """A broken function: call and what was expected and what comes, the way to it, the remedy."""

    complaint: str
    code: str
    call: str
    expected: str
    found: str
    guesses: tuple[str, ...]
    trail: Sequence[str]
    cause: str
    mended: str


BUGS = (
    Bug(
        "My median function is wrong for lists of even length.",
        "def median(values):\n    values = sorted(values)\n    middle = len(values) // 2\n"
        "    return values[middle]",
        "median([4, 1, 3, 2])",
        "2.5",
        "3",
        ("Is the list sorted? Yes, sorted() makes a sorted copy.",),
        (
            (
                "sorted gives [1, 2, 3, 4], and 4 // 2 = 2, so it returns the item at index 2, which is "
                "3."
            ),
            (
                "For an even number of values the median is the mean of the two in the middle: (2 + 3) "
                "/ 2 = 2.5."
            ),
            "For odd lengths the single middle value is right as it stands.",
        ),
        "With an even number of values there are two in the middle, and their mean is wanted.",
        "def median(values):\n    values = sorted(values)\n    middle = len(values) // 2\n"
        "    if len(values) % 2:\n        return values[middle]\n"
        "    return (values[middle - 1] + values[middle]) / 2",
    ),
    Bug(
        "The second call of this function returns items of the first call. Why?",
        "def collect(item, into=[]):\n    into.append(item)\n    return into",
        'collect("a") and collect("b")',
        "['b']",
        "['a', 'b']",
        ("Maybe the caller passes the same list twice? No, nothing is passed at all.",),
        (
            "A default value is evaluated once, when the function is defined, and then shared.",
            'The first call appends "a" to that one list; the second finds it there and appends "b".',
            "The usual remedy is None as the default and a new list inside.",
        ),
        "The default list is made once and shared by all calls.",
        "def collect(item, into=None):\n    if into is None:\n        into = []\n"
        "    into.append(item)\n    return into",
    ),
    Bug(
        "This should remove all negative numbers in place, but some stay.",
        "def drop_negative(values):\n    for x in values:\n        if x < 0:\n"
        "            values.remove(x)\n    return values",
        "drop_negative([3, -1, -2, 5])",
        "[3, 5]",
        "[3, -2, 5]",
        ("Does remove take the wrong one of two equal values? Possible, but not the cause here.",),
        (
            "Index 0: 3 stays. Index 1: -1 is removed, and the list becomes [3, -2, 5].",
            (
                "The iterator goes on to index 2, which is 5 now. The -2 moved to index 1 and is never "
                "looked at."
            ),
            "So changing a list while iterating over it skips the neighbour of whatever is removed.",
            "Assigning a filtered list to values[:] keeps it in place and is linear, too.",
        ),
        "Removing an item shifts the following ones, so the loop skips the one after it.",
        "def drop_negative(values):\n    values[:] = [x for x in values if x >= 0]\n    return values",
    ),
    Bug(
        "My average crashes or is off, depending on the input.",
        "def average(values):\n    total = 0\n    for i in range(1, len(values)):\n"
        "        total += values[i]\n    return total / len(values)",
        "average([6, 2, 4])",
        "4.0",
        "2.0",
        ("Integer division? No, a single slash divides exactly in Python 3.",),
        (
            "range(1, 3) gives 1 and 2. So 2 + 4 = 6 is added, and the 6 at index 0 is missed.",
            "6 / 3 = 2.0 comes out where 12 / 3 = 4.0 is right.",
            "And the crash: an empty list has length 0, so there is a division by zero.",
        ),
        "The loop starts at index 1 and misses the first value; an empty list divides by zero.",
        "def average(values):\n    if not values:\n"
        '        raise ValueError("average of no values")\n    return sum(values) / len(values)',
    ),
    Bug(
        "Why does this say that 1 is prime and 9 is prime?",
        "def is_prime(n):\n    for p in range(2, int(n ** 0.5)):\n        if n % p == 0:\n"
        "            return False\n    return True",
        "is_prime(9)",
        "False",
        "True",
        ("Is 9 ** 0.5 inexact, 2.999...? No, it is exactly 3.0 in floating point.",),
        (
            "For 9: int(9 ** 0.5) = 3, and range(2, 3) holds only 2. 9 % 2 = 1, so nothing is found.",
            (
                "The end of a range is excluded, so the root itself is never tried: squares of primes "
                "pass."
            ),
            "For 1 the range is empty and True is returned, but 1 is not prime by definition.",
            "math.isqrt avoids floating point for large n altogether.",
        ),
        "The root itself is excluded from the range, and numbers below 2 are never rejected.",
        "import math\n\n\ndef is_prime(n):\n    if n < 2:\n        return False\n"
        "    for p in range(2, math.isqrt(n) + 1):\n        if n % p == 0:\n"
        "            return False\n    return True",
    ),
    Bug(
        "All buttons of my toy menu print the same number. What is wrong?",
        "def make_buttons(n):\n    buttons = []\n    for i in range(n):\n"
        "        buttons.append(lambda: i)\n    return buttons",
        "[press() for press in make_buttons(3)]",
        "[0, 1, 2]",
        "[2, 2, 2]",
        ("Is the same function appended three times? No, each lambda is a new object.",),
        (
            "Each lambda looks up i when it is called, not when it is made.",
            "By then the loop has ended and i is 2, so every button gives 2.",
            "A default argument is evaluated at once and keeps the value of that moment.",
        ),
        "The lambdas share the variable i and read it only when they are called.",
        "def make_buttons(n):\n    buttons = []\n    for i in range(n):\n"
        "        buttons.append(lambda i=i: i)\n    return buttons",
    ),
    Bug(
        "My word counter treats the same word as different ones.",
        "def count_words(text):\n    counts = {}\n    for word in text.split(' '):\n"
        "        counts[word] = counts.get(word, 0) + 1\n    return counts",
        'count_words("Rain and  rain")',
        "{'rain': 2, 'and': 1}",
        "{'Rain': 1, 'and': 1, '': 1, 'rain': 1}",
        ("Could get(word, 0) be at fault? No, that part counts correctly.",),
        (
            "split(' ') cuts at every single blank, so two blanks in a row give an empty word.",
            "split() without an argument cuts at any run of white space and gives no empty words.",
            "And 'Rain' differs from 'rain'; lower() before splitting makes them one.",
        ),
        "Upper case is kept apart, and two blanks in a row make an empty word.",
        "def count_words(text):\n    counts = {}\n    for word in text.lower().split():\n"
        "        counts[word] = counts.get(word, 0) + 1\n    return counts",
    ),
    Bug(
        "This Fibonacci function takes forever for n = 40, and F(0) is wrong.",
        "def fib(n):\n    if n <= 2:\n        return 1\n    return fib(n - 1) + fib(n - 2)",
        "fib(0)",
        "0",
        "1",
        ("Is the recursion endless for some n? No, every call goes down until 2 or less.",),
        (
            "fib(0) meets n <= 2 and returns 1, though F(0) = 0.",
            (
                "As to the time: fib(40) calls fib(39) and fib(38), fib(39) calls fib(38) again; the "
                "same values are computed over and over, about 1.6 times as many calls for each step of "
                "n."
            ),
            "A loop with two variables does n additions and no recursion.",
        ),
        "The base case swallows n = 0, and the two recursive calls repeat each other's work.",
        "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    ),
)


def mended(rng: Dice, size: int) -> Conversation:
    """A broken function: the failing case followed, the cause, the remedy."""
    bug = rng.own(BUGS)
    question = bug.complaint + f"\n\n```python\n{bug.code}\n```"
    if rng.random() < 0.5:
        question += f"\n\nFor example, `{bug.call}` should give `{bug.expected}`."
    t = Thought(rng).turn("open")
    t.say("I need a concrete failing case first.", "Let me find out what really happens.")
    t.gap().say(f"Take {bug.call}: expected is {bug.expected}.")
    t.say(*bug.guesses).turn("stuck", chance=0.3)
    t.gap()
    for step in bug.trail:
        t.say(step)
        t.turn("doubt", "fine", chance=0.25)
    t.gap().say(f"So that's how {bug.found} comes about. {bug.cause}")
    t.gap().say("The mended version:").gap().lines(f"```python\n{bug.mended}\n```".splitlines())
    t.gap().turn("check").say(
        f"{bug.call} now gives {bug.expected}. I should also think of the smallest inputs.",
        f"Following {bug.call} again, it comes to {bug.expected} this time.",
    )
    t.turn("close")
    answer = (
        f"{bug.cause} That is why `{bug.call}` gives `{bug.found}` and not `{bug.expected}`.\n\n"
        f"```python\n{bug.mended}\n```"
    )
    return Conversation("code", (user(question),), t.text, answer)


def traced(rng: Dice, size: int) -> Conversation:
    worked = printed(rng, size)
    return Conversation("code", (user(worked.question),), worked.thought.text, worked.explanation)


MAKERS: tuple[Maker, ...] = (traced, written, mended)
