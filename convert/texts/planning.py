"""Plans: projects with dependencies, what to pack, connections in a timetable."""

import random
from itertools import combinations

from convert.texts.thought import Thought, capital, listed
from convert.texts.worked import Worked

_PROJECTS = (
    ("a garden shed", ("clear the ground", "order timber", "pour the base", "build the frame",
     "put on the roof", "paint the walls", "lay the path", "move the tools in")),
    ("a village fair", ("book the field", "find stallholders", "print posters", "hire a tent",
     "set up the stage", "hang up lights", "rehearse the band", "open the gates")),
    ("a short film", ("write the script", "cast the roles", "find locations", "build the set",
     "shoot indoors", "shoot outdoors", "edit the scenes", "mix the sound")),
    ("a small website", ("collect the texts", "draw the pages", "take photographs", "write the code",
     "fill in content", "test on phones", "translate it", "go online")),
    ("a school play", ("choose the piece", "hold auditions", "learn the lines", "sew costumes",
     "paint scenery", "rehearse together", "print programmes", "play the premiere")),
)  # fmt: skip


def project(rng: random.Random, size: int) -> Worked:
    """The shortest time of a project: earliest starts forwards, latest starts backwards."""
    name, names = rng.choice(_PROJECTS)
    n = min(4 + size, 8)
    tasks = [*names[: n - 1], names[-1]]
    days = [rng.randint(1, 9) for _ in tasks]
    needs: list[list[int]] = []
    for k in range(n):
        earlier = range(max(0, k - 4), k)
        needs.append(sorted(rng.sample(earlier, min(len(earlier), rng.choice((1, 1, 2, 2, 3))))))
    loose = [k for k in range(n - 1) if not any(k in need for need in needs)]
    needs[-1] = sorted({*needs[-1], *loose})
    ends: list[int] = []
    for k in range(n):
        ends.append(max((ends[j] for j in needs[k]), default=0) + days[k])
    total = ends[-1]
    rows = "\n".join(
        f"- {task}: {d} day{'s' if d > 1 else ''}"
        + (f", after: {', '.join(tasks[j] for j in need)}" if need else "")
        for task, d, need in zip(tasks, days, needs, strict=True)
    )
    question = rng.choice(
        (
            (
                f"For {name} these tasks are planned:\n{rows}\nEnough people are there to work in "
                "parallel. After how many days can everything be done at the earliest?"
            ),
            (
                f"Here is the plan for {name}:\n{rows}\nTasks may run at the same time if their "
                "conditions allow it. What is the minimum number of days for the whole?"
            ),
        )
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(
            "Each task can begin when the last of those before it has ended. So I compute the end of "
            "each, in order."
        )
        .gap()
    )
    for k, task in enumerate(tasks):
        if not needs[k]:
            t.line(f"{capital(task)}: nothing before it, starts at 0, ends on day {days[k]}.")
        elif len(needs[k]) == 1:
            start = ends[needs[k][0]]
            t.line(f"{capital(task)}: waits for '{tasks[needs[k][0]]}' until {start}; {start} + "
                   f"{days[k]} = {ends[k]}.")  # fmt: skip
        else:
            start = max(ends[j] for j in needs[k])
            waits = listed(f"'{tasks[j]}' ({ends[j]})" for j in needs[k])
            t.line(f"{capital(task)}: waits for {waits}, the later is {start}; {start} + {days[k]} "
                   f"= {ends[k]}.")  # fmt: skip
    t.gap().turn("doubt").say(
        f"Adding up all durations would give {' + '.join(map(str, days))} = {sum(days)}, but much "
        "of it happens side by side."
    )
    path = [n - 1]
    while needs[path[0]]:
        path.insert(0, max(needs[path[0]], key=lambda j: ends[j]))
    chain = " + ".join(str(days[k]) for k in path)
    t.gap().say(
        f"Which chain decides? Going back from the end: {', '.join(tasks[k] for k in path)}. Its "
        f"length: {chain} = {total}."
    ).turn("fine")
    if size > 1:
        t.gap().turn("second").say("Backwards: the latest start of each that delays nothing.").gap()
        latest = [total] * n
        for k in reversed(range(n)):
            after = [j for j in range(n) if k in needs[j]]
            latest[k] = min((latest[j] for j in after), default=total) - days[k]
            slack = latest[k] - (ends[k] - days[k])
            limit = latest[k] + days[k]
            t.line(
                f"{capital(tasks[k])} must end by {limit}, so start by {limit} - {days[k]} = "
                f"{latest[k]}; earliest {ends[k] - days[k]}, "
                + (f"slack {slack}." if slack else "no slack, critical.")
            )
        t.gap().say("The critical ones form the chain that I found.").turn("agree")
    t.gap().turn("close")
    explanation = (
        f"The longest chain of dependent tasks is {' → '.join(tasks[k] for k in path)} with "
        f"${chain} = {total}$ days; everything else fits beside it."
    )
    return Worked(question, t, explanation, str(total), (str(sum(days)), str(total - days[-1])))


_GOODS = (
    "tent stove lantern rope blanket camera kettle hammock binoculars map-case drone tripod "
    "first-aid-kit guitar telescope radio"
).split()


def packing(rng: random.Random, size: int) -> Worked:
    """The best load within a limit: greed, its failure or luck, then all combinations."""
    n = min(3 + size, 7)
    names = rng.sample(_GOODS, n)
    weights = [rng.randint(2, 12) for _ in names]
    values = [rng.randint(3, 20) for _ in names]
    limit = sum(weights) * rng.choice((45, 50, 55, 60)) // 100
    options = []
    for k in range(n + 1):
        for chosen in combinations(range(n), k):
            weight = sum(weights[i] for i in chosen)
            options.append((chosen, weight, sum(values[i] for i in chosen)))
    best = max(value for _, weight, value in options if weight <= limit)
    rows = "\n".join(
        f"- {a}: {w} kg, value {v}" for a, w, v in zip(names, weights, values, strict=True)
    )
    question = (
        f"A cargo bike carries at most {limit} kg. There is one of each of these:\n{rows}\n"
        + rng.choice(
            (
                "Which total value is the largest that can be carried?",
                "Choose what to load so that the total value is as large as possible. How large?",
            )
        )
    )
    t = (
        Thought(rng)
        .turn("open")
        .say("First idea: take what has the best value per kilogram.")
        .gap()
    )
    ranked = sorted(range(n), key=lambda i: (-values[i] / weights[i], i))
    load = worth = 0
    for i in ranked:
        rate = f"{values[i]} / {weights[i]} is about {values[i] / weights[i]:.2f}"
        if load + weights[i] <= limit:
            t.line(f"{names[i]}: {rate}; {load} + {weights[i]} = {load + weights[i]} kg, take it.")
            load, worth = load + weights[i], worth + values[i]
        else:
            t.line(f"{names[i]}: {rate}; {load} + {weights[i]} = {load + weights[i]} kg, too much.")
    t.gap().say(f"Greed gives a value of {worth} at {load} kg.").turn("doubt").say(
        "But greedy choices need not be best here, as things cannot be divided."
    )
    t.gap().say(f"There are only 2^{n} = {2**n} combinations. So go through them all.").gap()
    record = 0
    for chosen, weight, value in options[1:]:
        what = listed(names[i] for i in chosen)
        sum_w = " + ".join(str(weights[i]) for i in chosen)
        sum_w = sum_w if len(chosen) == 1 else f"{sum_w} = {weight}"
        if weight > limit:
            t.line(f"{what}: {sum_w} kg, too heavy.", f"{what}: {sum_w}, over {limit}.")
            continue
        sum_v = " + ".join(str(values[i]) for i in chosen)
        sum_v = sum_v if len(chosen) == 1 else f"{sum_v} = {value}"
        t.line(f"{what}: {sum_w} kg, value {sum_v}.")
        if value > record:
            record = value
            t.say("The best so far.", "A new best.", "Better than all before.")
    t.gap().say(
        f"The maximum is {best}. "
        + ("So greed was right after all." if best == worth else "Greed missed it.")
    ).turn("close")
    chosen, weight, _ = next(o for o in options if o[1] <= limit and o[2] == best)
    explanation = (
        f"Going through all combinations within {limit} kg, the best is "
        f"{listed(names[i] for i in chosen)}: {weight} kg, value {best}."
    )
    return Worked(
        question, t, explanation, str(best), (str(worth), str(sum(values)), str(best - 1))
    )


_TOWNS = "Alder Birch Cedar Dale Elm Fern Grove Heath Ivy Juniper Knoll Larch".split()


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def connections(rng: random.Random, size: int) -> Worked:
    """The earliest arrival over a change, from two timetables, with a time to change trains."""
    while True:
        start, *middles, end = rng.sample(_TOWNS, 2 + min(size, 3))
        change, ready = rng.choice((4, 5, 6, 8)), rng.randint(7, 10) * 60 + rng.randint(0, 59)
        first, second = [], []
        for middle in middles:
            ride = rng.randint(18, 70)
            leaves = sorted(rng.sample(range(ready - 20, ready + 80), 2 + size))
            first += [(leave, leave + ride + rng.randint(0, 4), middle) for leave in leaves]
            further = rng.randint(15, 60)
            leaves = sorted(rng.sample(range(ready + 20, ready + 190), 2 + size))
            second += [(leave, leave + further + rng.randint(0, 4), middle) for leave in leaves]
        found = [
            (b[1], a, b)
            for a in first
            for b in second
            if a[0] >= ready and a[2] == b[2] and b[0] >= a[1] + change
        ]
        if len(found) > size:
            break
    arrival, _, _ = min(found)
    rows = [f"| {start} {_clock(a)} | {m} {_clock(b)} |" for a, b, m in sorted(first)]
    rows += [f"| {m} {_clock(a)} | {end} {_clock(b)} |" for a, b, m in sorted(second)]
    question = (
        "| departs | arrives |\n|---|---|\n" + "\n".join(rows) + f"\n\nI can be at {start} station "
        f"at {_clock(ready)}. Changing trains takes {change} minutes. When can I be in {end} at the "
        "earliest?"
    )
    t = (
        Thought(rng)
        .turn("open")
        .say(
            f"Trains from {start} before {_clock(ready)} are out. For each of the others, look for the "
            f"first one onward that leaves at least {change} minutes after the arrival."
        )
        .gap()
    )
    reached = []
    for leave, arrive, middle in sorted(first):
        if leave < ready:
            t.line(f"{_clock(leave)} to {middle}: leaves before {_clock(ready)}, missed.")
            continue
        t.line(
            f"{_clock(leave)} to {middle}: there at {_clock(arrive)}, ready to leave at "
            f"{_clock(arrive + change)}."
        )
        onward = sorted((a, b) for a, b, m in second if m == middle)
        late = [_clock(a) for a, _ in onward if a < arrive + change]
        if late:
            t.say(f"The {listed(late)} {'is' if len(late) == 1 else 'are'} too early.")
        fits = [(b, a) for a, b in onward if a >= arrive + change]
        if not fits:
            t.say("Nothing leaves after that.")
            continue
        b, a = min(fits)
        reached.append(b)
        t.say(f"The {_clock(a)} is possible, in {end} at {_clock(b)}.")
        t.turn("fine", "doubt", chance=0.15)
    t.gap().say(f"The arrivals that I found: {', '.join(map(_clock, reached))}.")
    t.say(f"The earliest is {_clock(arrival)}.").turn("check").say(
        "A later train onward could be faster and overtake, so for each change I took the earliest "
        "arrival and not merely the first departure."
    ).turn("close")
    _, leg, onward_leg = min(found)
    explanation = (
        f"Take the {_clock(leg[0])} to {leg[2]} (arrives {_clock(leg[1])}) and change to the "
        f"{_clock(onward_leg[0])}, which is in {end} at {_clock(onward_leg[1])}."
    )
    others = {_clock(one[0]) for one in found} | {_clock(arrival + k) for k in (5, 12, 20)}
    near = tuple(sorted(others - {_clock(arrival)}))
    return Worked(question, t, explanation, _clock(arrival), near)


PROBLEMS = (project, packing, connections)
