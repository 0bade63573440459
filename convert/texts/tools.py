"""Requests that take several tool calls: which one next, and what its result means."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from convert.calibration import Conversation
from convert.texts.thought import Thought, listed
from convert.texts.worked import Dice, Maker, user

Tool = dict[str, Any]


def _tool(name: str, description: str, required: Sequence[str], /, **properties: str) -> Tool:
    """A description in OpenAI's form; properties: type and meaning, parted by a colon."""
    described = {}
    for key, value in properties.items():
        kind, _, meaning = value.partition(":")
        described[key] = {"type": kind, "description": meaning.strip()}
    parameters = {"type": "object", "properties": described, "required": list(required)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Step:
    """A call: why it is made, and what comes back."""

    why: tuple[str, ...]
    name: str
    arguments: dict[str, Any]
    result: object


@dataclass(frozen=True, slots=True)
class Story:
    """A request with all its calls, and what is thought and said in the end."""

    tools: tuple[Tool, ...]
    request: str
    steps: tuple[Step, ...]
    conclusion: tuple[str, ...]
    answer: str
    system: str = ""


_CALCULATE = _tool("calculate", "Evaluate an arithmetic expression.", ("expression",), expression="string: such as 2 * (3 + 4)")  # fmt: skip
_SEARCH = _tool("search_notes", "Find notes that contain a word.", ("word",), word="string: what to look for")  # fmt: skip
_WEATHER = _tool("get_forecast", "Forecast for a place on a day.", ("place", "day"), place="string: a town", day="string: a date, YYYY-MM-DD")  # fmt: skip


def shop(rng: random.Random, size: int) -> Story:
    """Prices and stock of several articles, then the total."""
    articles = rng.sample(
        "lamp kettle rug clock mirror basket stool vase teapot easel".split(), 1 + size
    )
    tools = (
        _tool("find_article", "Look up an article by name.", ("name",), name="string: the article"),
        _tool(
            "get_stock",
            "Pieces in stock of an article.",
            ("article_id",),
            article_id="integer: from find_article",
        ),
        _CALCULATE,
    )
    wanted = {name: rng.randint(1, 4) for name in articles}
    steps, terms, short = [], [], []
    for name, n in wanted.items():
        number, price = rng.randint(1000, 9999), rng.randint(8, 120)
        stock = rng.choice((0, n, n + 3, n + 11, 40, max(0, n - 1)))
        steps.append(
            Step(
                (
                    f"I know nothing about the {name} yet, not even its id. find_article first.",
                    f"For the {name} I need its id and price, so look it up by name.",
                    f"Next is the {name}; the stock tool wants an id, which find_article gives.",
                ),
                "find_article",
                {"name": name},
                {"article_id": number, "name": name, "price": price},
            )
        )
        steps.append(
            Step(
                (
                    (
                        f"The {name} costs {price} and has id {number}. Is there enough of it? "
                        f"{n} are wanted."
                    ),
                    f"Found: id {number}, price {price}. Now the stock for {n} pieces.",
                ),
                "get_stock",
                {"article_id": number},
                {"article_id": number, "in_stock": stock},
            )
        )
        if stock < n:
            short.append(f"{name} ({stock} of {n})")
        else:
            terms.append((n, price))
    order = listed(f"{n} {name}{'s' if n > 1 else ''}" for name, n in wanted.items())
    total = sum(n * price for n, price in terms)
    if terms:
        expression = " + ".join(f"{n} * {price}" for n, price in terms)
        steps.append(
            Step(
                (
                    "All articles are looked up. I could add in my head, but the calculator is safer.",
                    "Now the sum over what is in stock; what is missing must not be charged.",
                ),
                "calculate",
                {"expression": expression},
                {"value": total},
            )
        )
    answer = (
        f"What is in stock of your order comes to {total}." if terms else "Nothing is in stock."
    )
    if short:
        answer += f" Not enough is there of: {listed(short)}; I left {'that' if len(short) == 1 else 'those'} out."
    return Story(
        tools,
        f"I'd like {order}. Are they in stock, and what would it cost together?",
        tuple(steps),
        (
            f"The calculator says {total}." if terms else "None of it can be delivered.",
            "Report the sum, and be plain about what is missing."
            if short
            else "Everything is available, so the answer can be short.",
        ),
        answer,
    )


def meeting(rng: random.Random, size: int) -> Story:
    """A time at which everybody is free, then the entry in the calendar."""
    people = rng.sample("Anna Bruno Carla David Esra Fynn Gloria Henk".split(), 2 + size // 2)
    day = f"2025-0{rng.randint(1, 9)}-{rng.randint(10, 28)}"
    hours = list(range(9, 17))
    while True:
        busy = {name: sorted(rng.sample(hours, rng.randint(2, 4))) for name in people}
        free = [hour for hour in hours if all(hour not in busy[name] for name in people)]
        if free:
            break
    tools = (
        _tool(
            "get_calendar",
            "Busy hours of a person on a day.",
            ("person", "day"),
            person="string: a first name",
            day="string: a date, YYYY-MM-DD",
        ),
        _tool(
            "create_event",
            "Put an event into calendars.",
            ("title", "day", "hour", "people"),
            title="string: what it is",
            day="string: a date",
            hour="integer: when it begins",
            people="array: first names",
        ),
        _SEARCH,
    )
    topic = rng.choice(("the budget", "the new logo", "the summer fair", "the roof repair"))
    steps = []
    left = hours
    for name in people:
        before = left
        left = [hour for hour in left if hour not in busy[name]]
        known = "nothing is excluded yet" if before == hours else f"still possible: {before}"
        steps.append(
            Step(
                (
                    f"I need {name}'s busy hours; {known}.",
                    f"Whose calendar is missing? {name}'s. So far {known}.",
                ),
                "get_calendar",
                {"person": name, "day": day},
                {"person": name, "busy": [f"{hour}:00" for hour in busy[name]]},
            )
        )
    steps.append(
        Step(
            (
                (
                    f"Everyone is free at {listed(f'{hour}:00' for hour in free)}; the earliest is "
                    f"{free[0]}:00. The request says to book it, so I may."
                ),
                f"Going through the hours from 9 on, the first that nobody has taken is {free[0]}:00.",
            ),
            "create_event",
            {"title": f"Talk about {topic}", "day": day, "hour": free[0], "people": people},
            {"status": "created", "event_id": rng.randint(100, 999)},
        )
    )
    return Story(
        tools,
        f"Find the first hour on {day}, between 9 and 17, when {listed(people)} are all free, and "
        f"book one hour to talk about {topic}.",
        tuple(steps),
        ("The event was created. Confirm the time and name the people.",),
        f"Done: {listed(people)} meet on {day} at {free[0]}:00 to talk about {topic}.",
    )


def outing(rng: random.Random, size: int) -> Story:
    """The best day for a trip from forecasts, one of which fails at first."""
    place = rng.choice(("Lindau", "Aveiro", "Ghent", "Bergen", "Split", "Uppsala", "Graz"))
    days = [f"2025-06-{d:02d}" for d in sorted(rng.sample(range(1, 29), 1 + size))]
    tools = (_WEATHER, _SEARCH, _CALCULATE)
    steps = []
    rain: dict[str, int] = {}
    broken = rng.randrange(len(days)) if size > 1 else -1
    for k, day in enumerate(days):
        if k == broken:
            steps.append(
                Step(
                    (f"Now the forecast of {day}.",),
                    "get_forecast",
                    {"place": place, "day": day},
                    {"error": "service busy, try again"},
                )
            )
        rain[day] = rng.choice([r for r in range(5, 95, 5) if r not in rain.values()])
        why = (
            ("The service was busy. That is no answer about the weather, so ask once more.",)
            if k == broken
            else (f"The forecast of {day} is missing.", f"One call a day is needed; {day} it is.")
        )
        forecast = {"rain_percent": rain[day], "high_c": rng.randint(14, 30)}
        steps.append(Step(why, "get_forecast", {"place": place, "day": day}, forecast))
    best = min(rain, key=lambda day: rain[day])
    compared = "; ".join(f"{day}: {chance} %" for day, chance in rain.items())
    return Story(
        tools,
        f"We want to hike near {place} on {listed(days, 'or')}. On which of these is rain least "
        "likely?",
        tuple(steps),
        (f"Rain: {compared}. The lowest is {rain[best]} % on {best}.",),
        f"{best} looks best, with a chance of rain of {rain[best]} %."
        + (f" The others: {compared}." if len(rain) > 1 else ""),
        system=rng.choice(("", "You are a helpful assistant. Answer in at most three sentences.")),
    )


def money(rng: random.Random, size: int) -> Story:
    """Amounts in several currencies, converted and added."""
    currencies = rng.sample(("USD", "GBP", "CHF", "JPY", "SEK", "PLN"), 1 + min(size, 3))
    rates = {"USD": 0.9, "GBP": 1.15, "CHF": 1.05, "JPY": 0.006, "SEK": 0.09, "PLN": 0.23}
    tools = (
        _tool(
            "get_rate",
            "Euros for one unit of a currency.",
            ("currency",),
            currency="string: three letters",
        ),
        _CALCULATE,
    )
    amounts = {one: rng.randint(2, 40) * 100 for one in currencies}
    steps = [
        Step(
            (
                f"I need the rate of {one}. My memory of rates is not reliable, so ask.",
                f"{one} next; rates change, the tool knows today's.",
            ),
            "get_rate",
            {"currency": one},
            {"currency": one, "eur": rates[one]},
        )
        for one in currencies
    ]
    expression = " + ".join(f"{amounts[one]} * {rates[one]}" for one in currencies)
    total = round(sum(amounts[one] * rates[one] for one in currencies), 2)
    steps.append(
        Step(
            ("All rates are known. The sum is easy to get wrong with decimals, so calculate.",),
            "calculate",
            {"expression": expression},
            {"value": total},
        )
    )
    held = listed(f"{amount} {one}" for one, amount in amounts.items())
    return Story(
        tools,
        f"I have {held} left from travelling. How many euros is that today?",
        tuple(steps),
        (f"{expression} = {total}. Give it in euros with the rates, so that it can be checked.",),
        f"Together that is {total:.2f} EUR (rates: "
        + ", ".join(f"{one} {rates[one]}" for one in currencies)
        + ").",
    )


STORIES: tuple[Callable[[random.Random, int], Story], ...] = (shop, meeting, outing, money)


def used(rng: Dice, size: int) -> Conversation:
    """A turn of such a story: its next call, or the answer after the last result."""
    story = rng.choice(STORIES)(rng, size)
    n = len(story.steps)
    done = rng.choice((0, n, n, rng.randrange(n)))
    messages: list[dict[str, Any]] = []
    if story.system:
        messages.append({"role": "system", "content": story.system})
    messages.append(user(story.request))
    for number, step in enumerate(story.steps[:done]):
        function = {"name": step.name, "arguments": step.arguments}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        content = json.dumps(step.result)
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
    t = Thought(rng)
    if done == 0:
        t.turn("open")
        names = listed(tool["function"]["name"] for tool in story.tools)
        t.say(
            f"Available are {names}.",
            f"Which tools do I have? {names}.",
        )
    else:
        t.say("What has come back so far:", "Let me collect the results.", "So, the state:").gap()
        for step in story.steps[:done]:
            t.line(f"{step.name}({json.dumps(step.arguments)}) gave {json.dumps(step.result)}.")
        t.gap()
    if done == n:
        for sentence in story.conclusion:
            t.say(sentence)
        t.turn("check", "close")
        answer = story.answer
    else:
        step = story.steps[done]
        t.say(*step.why)
        arguments = listed(f"{key} = {json.dumps(value)}" for key, value in step.arguments.items())
        t.say(
            f"The call: {step.name} with {arguments}.",
            f"So call {step.name}, {arguments}.",
        )
        if rng.random() < 0.4:
            t.say("One call at a time; what comes after depends on the result.")
        said = json.dumps({"name": step.name, "arguments": step.arguments}, ensure_ascii=False)
        answer = f"<tool_call>\n{said}\n</tool_call>"
    return Conversation("tools", tuple(messages), t.text, answer, tools=story.tools)


MAKERS: tuple[Maker, ...] = (used,)
