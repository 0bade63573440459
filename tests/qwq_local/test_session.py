"""Sessions and replies, on an engine that says what it is told to say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.errors import QwqError, UsageError
from qwq_local import Answer, Done, Notice, QwQ, Reasoning, Reply, Sampling, ToolCall
from qwq_local.local import LocalModel
from qwq_local.reply import Event
from tests.fakes import FakeEngine, describe_fake

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n<think>\n' }}"
)
REPLY = "Hm.\n</think>\n\nYes."
CALL = 'Hm.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def model(*replies: str, template: str = TEMPLATE) -> tuple[QwQ, FakeEngine]:
    engine = FakeEngine(*replies)
    return QwQ(LocalModel(engine, describe_fake(template), Path("fake"))), engine


def prompt_of(engine: FakeEngine, n: int = -1) -> str:
    return b"".join(map(engine.token_bytes, engine.prompts[n])).decode()


def text_of(events: Iterator[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, Done)]


def test_a_reply_is_reasoning_then_answer_then_its_figures() -> None:
    qwq, engine = model(REPLY)
    reply = qwq.ask("Well?", system="Be brief.", seed=3)
    assert (reply.reasoning, reply.answer) == ("Hm.", "Yes.")
    assert (reply.finish_reason, reply.tool_calls, reply.notices) == ("stop", (), ())
    assert prompt_of(engine) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert reply.usage.prompt_tokens == len(engine.prompts[0])
    assert reply.usage.completion_tokens == len(REPLY) + 1
    assert reply.usage.reasoning_tokens == len("Hm.\n</think>")
    assert reply.timings.n_cached + reply.timings.n_prefilled == len(engine.prompts[0])
    assert reply.timings.n_decoded == len(REPLY) + 1


def test_a_session_remembers_answers_and_leaves_thoughts_out() -> None:
    """Would catch a lost turn, or a thought that is shown to the model again."""
    qwq, engine = model(REPLY, REPLY)
    session = qwq.session()
    session.ask("One?")
    session.ask("Two?")
    assert prompt_of(engine) == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    assert session.messages[1]["reasoning_content"] == "Hm."
    session.messages.clear()
    assert len(session.messages) == 4


def test_a_turn_that_was_not_read_to_its_end_leaves_no_trace() -> None:
    qwq, engine = model(REPLY, REPLY)
    session = qwq.session()
    stream = session.send("One?")
    assert next(stream) == Reasoning("H")
    stream.close()
    assert session.messages == []
    session.ask("Two?")
    assert "One?" not in prompt_of(engine)


def test_a_tool_is_called_and_its_result_answered() -> None:
    """Would catch a call that is not shown to the model again, or a result without its call."""
    qwq, engine = model(CALL, REPLY)
    session = qwq.session(tools=TOOLS)
    reply = session.ask("1 + 1?")
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.tool_calls
    assert (call.name, call.arguments) == ("add", {"a": 1})
    session.tool_result(call.id, {"sum": "2 é"})
    assert session.ask().answer == "Yes."
    assert (
        'assistant\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n'
        '<|im_start|>tool\n{"sum": "2 é"}<|im_end|>\n' in prompt_of(engine)
    )
    with pytest.raises(UsageError, match=r"no call .* waits for a result"):
        session.tool_result(call.id, "again")


def test_without_tools_a_call_is_text() -> None:
    qwq, _ = model(CALL)
    reply = qwq.ask("?")
    assert reply.tool_calls == ()
    assert reply.answer.startswith("<tool_call>")


def test_turns_have_seeds_of_their_own() -> None:
    """Would catch a session whose turns all draw the same numbers, or differ from run to run."""

    def seeds(seed: int) -> list[int]:
        qwq, engine = model(REPLY, REPLY)
        session = qwq.session(seed=seed)
        session.ask("a")
        session.ask("b")
        return engine.seeds

    assert seeds(5) == seeds(5)
    assert len({*seeds(5), *seeds(6)}) > 2
    assert max(seeds(2**32 - 2)) <= 2**32 - 2


def test_a_cut_reply_says_so() -> None:
    qwq, _ = model(REPLY)
    reply = qwq.ask("?", max_tokens=2)
    assert (reply.reasoning, reply.answer, reply.finish_reason) == ("Hm", "", "length")
    assert [notice.kind for notice in reply.notices] == ["unfinished_thought"]


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(), []),
        (Sampling(temperature=0), ["greedy decoding"]),
        (Sampling(repetition_penalty=1.05), ["a repetition penalty"]),
        (Sampling(repetition_penalty=0.9), ["a repetition penalty"]),
        (Sampling(temperature=0, repetition_penalty=2), ["greedy decoding", "a repetition"]),
        (Sampling(presence_penalty=1.5, top_k=0, min_p=0.1), []),
    ],
)
def test_sampling_that_hurts_thoughts_is_noticed(sampling: Sampling, words: list[str]) -> None:
    """Would catch a reply that repeats without end, and nobody told why."""
    qwq, _ = model(REPLY, REPLY)
    for reply in (qwq.ask("?", sampling=sampling), qwq.session(sampling=sampling).ask("?")):
        assert [notice.kind for notice in reply.notices] == ["sampling"] * len(words)
        for notice, word in zip(reply.notices, words, strict=True):
            assert notice.text.startswith(word)
        assert reply.answer == "Yes."


def test_characters_cut_across_tokens_come_whole() -> None:
    qwq, _ = model("é🎉\n</think>\n\n中")
    events = text_of(qwq.reply([{"role": "user", "content": "?"}]))
    assert events == [Reasoning("é"), Reasoning("🎉"), Answer("中")]


def test_events_are_values() -> None:
    assert ToolCall("a", "f", {}) == ToolCall("a", "f", {})
    assert Notice("a", "b") != Notice("a", "c")
    with pytest.raises(AttributeError):
        Reply("", "", (), (), "", None, None).answer = "x"  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"text": "x" * 5000}, "tokens leave no room for a reply in a context of 4,096; shorten"),
        ({"text": "?", "seed": -1}, "seed: -1 is out of range; choose"),
        ({"text": "?", "seed": 2**32}, "is out of range; choose"),
        ({"text": "?", "max_tokens": 0}, "max_tokens: 0 leaves no reply; choose"),
    ],
    ids=["overflow", "seed", "large seed", "max_tokens"],
)
def test_requests_that_cannot_be_met_are_refused(arguments: dict[str, Any], error: str) -> None:
    qwq, _ = model(REPLY)
    with pytest.raises(QwqError, match=error):
        qwq.ask(**arguments)


def test_a_reply_is_over_with_done() -> None:
    """Catches a reply that goes on holding the model until its stream is collected."""
    qwq, _ = model(REPLY, REPLY)
    session = qwq.session()
    stream = session.send("?")
    assert any(isinstance(event, Done) for event in stream)  # reads no further
    assert session.ask("again").answer == "Yes."
    assert list(stream) == []


def test_a_turn_needs_something_to_reply_to() -> None:
    qwq, _ = model(REPLY)
    with pytest.raises(UsageError, match="give a text"):
        qwq.session().ask()
