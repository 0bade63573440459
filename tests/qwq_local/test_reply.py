"""The splitter: what a reply says, whatever way its bytes are cut."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_local.reply import Answer, Event, Notice, Reasoning, ReplySplitter, ToolCall

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def split(pieces: list[bytes], *, opens_thought: bool = True, tools: bool = True) -> list[Event]:
    splitter = ReplySplitter(opens_thought=opens_thought, tools=tools, call_prefix="call_")
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return merged(events + list(splitter.finish()))


def merged(events: list[Event]) -> list[Event]:
    """Adjacent pieces of one kind as one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        match last, event:
            case (Reasoning(a), Reasoning(b)):
                joined[-1] = Reasoning(a + b)
            case (Answer(a), Answer(b)):
                joined[-1] = Answer(a + b)
            case _:
                joined.append(event)
    return joined


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(bounds)]


# Words that make tags, parts of tags, newlines and characters of several bytes likely.
WORDS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "</",
    "thi",
    "nk>",
    "<",
    "\n",
    "\n\n",
]
WORDS += ["a", " b", "é", "🎉", CALL, '{"name": ', "tool_call>", "<|im_end|>"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=14).map("".join)


@given(TEXTS, st.lists(st.integers(0, 10**6), max_size=40), st.booleans(), st.booleans())
@example("thought\n</think>\n\nanswer", list(range(25)), True, True)
def test_the_cuts_do_not_matter(
    text: str, places: list[int], opens_thought: bool, tools: bool
) -> None:
    """Would catch a tag, a newline or a character that is lost or leaked at a cut."""
    data = text.encode()
    whole = split([data], opens_thought=opens_thought, tools=tools)
    assert split(cut(data, places), opens_thought=opens_thought, tools=tools) == whole
    single = [data[i : i + 1] for i in range(len(data))]
    assert split(single, opens_thought=opens_thought, tools=tools) == whole


@given(TEXTS)
@example("thought\n\n</think>\n\n\nanswer\n")
@example("<think>\n\nthought\n</think>answer </think>")
def test_a_whole_reply_reads_as_a_regular_expression_does(text: str) -> None:
    """The splitter's slow twin, for replies without tools: would catch a wrong border."""
    match = re.fullmatch(
        r"(?:<think>\n?)?(?P<thought>.*?)(?:\n?</think>\n*(?P<answer>.*))?", text, re.DOTALL
    )
    assert match is not None
    expected: list[Event] = []
    if match["thought"]:
        expected.append(Reasoning(match["thought"]))
    if match["answer"]:
        expected.append(Answer(match["answer"]))
    if match["answer"] is None:
        expected.append(Notice("unfinished_thought", "the reply ended inside its thought"))
    assert split([text.encode()], tools=False) == expected


@pytest.mark.parametrize("at", range(1, len("</think>")))
def test_nothing_is_held_back_that_cannot_be_a_tag(at: int) -> None:
    """Would catch text that waits for more than a tag could need."""
    splitter = ReplySplitter(opens_thought=True, tools=True, call_prefix="")
    assert list(splitter.feed(b"ab")) == [Reasoning("ab")]
    assert list(splitter.feed(b"</think>"[:at])) == []
    assert list(splitter.feed(b"x")) == [Reasoning("</think>"[:at] + "x")]
    assert list(splitter.feed(b"\n</think>\n\nyes")) == [Answer("yes")]
    assert list(splitter.feed(b"\n")) == []
    assert list(splitter.feed(b"no")) == [Answer("\nno")]


def test_without_tools_an_answer_waits_for_nothing() -> None:
    splitter = ReplySplitter(opens_thought=False, tools=False, call_prefix="")
    assert list(splitter.feed(b"<tool_call>\n")) == [Answer("<tool_call>\n")]


def test_calls_come_out_of_the_answer() -> None:
    second = CALL.replace("add", "sub")
    assert split([f"t\n</think>\n\nSo:\n{CALL}\n{second}".encode()]) == [
        Reasoning("t"),
        Answer("So:"),
        ToolCall("call_0", "add", {"a": 1}),
        ToolCall("call_1", "sub", {"a": 1}),
    ]


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        '{"arguments": {}}',
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_a_broken_call_is_given_back_as_text(body: str, end: str) -> None:
    """Would catch a call that vanishes, or a crash on what a model may write."""
    text = f"So:\n<tool_call>\n{body}\n{end}"
    events = split([text.encode()], opens_thought=False)
    assert events == [
        Answer(text),
        Notice("broken_tool_call", "a tool call is not valid JSON; it is given as text"),
    ]


def test_arguments_encoded_twice_are_an_object() -> None:
    arguments = json.dumps({"a": [1, "é"]})
    call = json.dumps({"name": "f", "arguments": arguments})
    events = split([f"<tool_call>{call}</tool_call>".encode()], opens_thought=False)
    assert events == [ToolCall("call_0", "f", {"a": [1, "é"]})]


def test_bytes_that_are_no_text_are_marked() -> None:
    assert split([b"a\xff", b"\xf0\x9f"], opens_thought=False) == [Answer("a\ufffd\ufffd")]
