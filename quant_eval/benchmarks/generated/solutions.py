"""Solutions of the exercises in code.py, whose statements say what each does."""

from collections import Counter, deque
from collections.abc import Sequence


def count_numbers(low: int, high: int, divisor: int, digit: int) -> int:
    return sum(
        sum(map(int, str(n))) % divisor == 0 and str(digit) not in str(n)
        for n in range(low, high + 1)
    )


def longest_stretch(numbers: Sequence[int], most: int) -> int:
    longest = length = 0
    for i, number in enumerate(numbers):
        length = length + 1 if i and abs(number - numbers[i - 1]) <= most else 1
        longest = max(longest, length)
    return longest


def covered_length(intervals: Sequence[Sequence[int]], at_least: int) -> int:
    change = Counter[int]()
    for start, stop in intervals:
        change[start] += 1
        change[stop] -= 1
    covered = depth = before = 0
    for place in sorted(change):
        covered += (place - before) * (depth >= at_least)
        depth += change[place]
        before = place
    return covered


def count_sums(total: int, parts: Sequence[int], modulus: int) -> int:
    ways = [1] + [0] * total
    for n in range(1, total + 1):
        ways[n] = sum(ways[n - part] for part in parts if part <= n) % modulus
    return ways[total]


def fewest_moves(grid: Sequence[str], n_diagonal: int) -> int:
    start = (0, 0, n_diagonal)
    moves = {start: 0}
    queue = deque([start])
    while queue:
        row, column, left = queue.popleft()
        if (row, column) == (len(grid) - 1, len(grid[0]) - 1):
            return moves[row, column, left]
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                place = (row + down, column + right, left - bool(down and right))
                if (
                    0 <= place[0] < len(grid)
                    and 0 <= place[1] < len(grid[0])
                    and place[2] >= 0
                    and grid[place[0]][place[1]] == "."
                    and place not in moves
                ):
                    moves[place] = moves[row, column, left] + 1
                    queue.append(place)
    return -1


def frequent_words(text: str, n: int, shortest: int) -> list[str]:
    counts = Counter(word for word in text.split() if len(word) >= shortest)
    return sorted(counts, key=lambda word: (-counts[word], word))[:n]


def automaton(cells: str, n_steps: int, rule: int) -> str:
    for _ in range(n_steps):
        cells = "".join(
            str(rule >> int(cells[i - 1] + cells[i] + cells[(i + 1) % len(cells)], 2) & 1)
            for i in range(len(cells))
        )
    return cells


def stack_machine(program: Sequence[str], modulus: int) -> list[int]:
    stack: list[int] = []
    for line in program:
        name, _, number = line.partition(" ")
        if name == "PUSH":
            stack.append(int(number) % modulus)
        elif name == "DUP" and stack:
            stack.append(stack[-1])
        elif name in ("ADD", "MUL", "SWAP") and len(stack) > 1:
            b, a = stack.pop(), stack.pop()
            if name == "SWAP":
                stack += [b, a]
            else:
                stack.append((a + b if name == "ADD" else a * b) % modulus)
    return stack


def last_in_circle(n: int, every: int, n_left: int) -> list[int]:
    circle = deque(range(1, n + 1))
    while len(circle) > n_left:
        circle.rotate(1 - every)
        circle.popleft()
    return sorted(circle)


def cost_of_change(a: str, b: str, insertion: int, replacement: int) -> int:
    costs = [insertion * i for i in range(len(b) + 1)]
    for x in a:
        row = [costs[0] + insertion]
        for i, y in enumerate(b):
            change = costs[i] + (0 if x == y else replacement)
            row.append(min(change, costs[i + 1] + insertion, row[i] + insertion))
        costs = row
    return costs[-1]


def fullest_load(weights: Sequence[int], most: int, times: int) -> int:
    loads = {0}
    for weight in weights:
        loads |= {
            load + n * weight
            for load in loads
            for n in range(times + 1)
            if load + n * weight <= most
        }
    return max(loads)


def deepest_nesting(text: str, opening: str, closing: str) -> int:
    depth: list[str] = []
    deepest = 0
    for character in text:
        if character in opening:
            depth.append(closing[opening.index(character)])
            deepest = max(deepest, len(depth))
        elif character in closing and (not depth or depth.pop() != character):
            return -1
    return -1 if depth else deepest
