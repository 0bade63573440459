"""What may happen to a reply on its way: budgets, hints, loops, stops, cancelling, YaRN."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from convert.errors import ContextError, QwqError, UsageError
from qwq_local import Answer, Done, Notice, QwQ, Reasoning, Reply, Stream
from qwq_local.local import LocalModel
from qwq_local.respond import CLOSING, HINT
from qwq_local.rope import RopePlan, Yarn
from tests.fakes import FakeEngine, describe_fake
from tests.qwq_local.test_session import REPLY, TEMPLATE, TOOLS, model, prompt_of

LONG = "I think on and on about it, step 1, step 2, step 3.\n</think>\n\nYes."
SENTENCE = CLOSING.partition("\n</think>")[0]


def kinds(reply: Reply) -> list[str]:
    return [notice.kind for notice in reply.notices]


def read_until(stream: Stream, text: str) -> str:
    """Read on until the thought ends in a text."""
    said = ""
    for event in stream:
        if isinstance(event, Reasoning):
            said += event.text
        if said.endswith(text):
            return said
    raise AssertionError(said)


@pytest.mark.parametrize("n_tokens", [1, 9, 10])
def test_a_thought_has_a_budget_in_tokens(n_tokens: int) -> None:
    """Would catch a budget off by one, a lost answer, a sentence that the model never saw."""
    qwq, engine = model(LONG)
    reply = qwq.session().ask("?", reasoning_tokens=n_tokens)
    assert reply.reasoning == LONG[:n_tokens] + SENTENCE
    assert reply.answer == "Yes."
    assert reply.finish_reason == "stop"
    assert kinds(reply) == ["budget"]
    assert bytes(engine.changes[0].ids).decode() == CLOSING
    assert len(engine.changes) == 1
    assert reply.usage.reasoning_tokens == n_tokens + len(CLOSING)
    assert reply.timings.n_decoded == n_tokens + len("Yes.") + 1
    assert reply.usage.completion_tokens == reply.timings.n_decoded + len(CLOSING)


def test_a_thought_within_its_budget_is_left_alone() -> None:
    qwq, engine = model(REPLY)
    reply = qwq.session().ask("?", reasoning_tokens=100, reasoning_seconds=100)
    assert (reply.reasoning, reply.answer, reply.notices) == ("Hm.", "Yes.", ())
    assert engine.changes == []


def test_a_thought_is_not_cut_within_a_character() -> None:
    """Would catch half a character before the closing sentence."""
    qwq, _ = model("é🎉 and more\n</think>\n\nYes.")
    assert qwq.session().ask("?", reasoning_tokens=3).reasoning == "é🎉" + SENTENCE


def test_a_thought_has_a_budget_in_seconds() -> None:
    qwq, _ = model(LONG)
    stream = qwq.session().send("?", reasoning_seconds=1)
    read_until(stream, "I ")
    time.sleep(1.1)
    reply = stream.reply()
    assert reply.answer == "Yes."
    assert reply.reasoning.endswith(SENTENCE)
    assert kinds(reply) == ["budget"]


def test_the_answer_can_be_asked_for_at_once() -> None:
    qwq, _ = model(LONG)
    stream = qwq.session().send("?")
    said = read_until(stream, "on and")
    stream.answer_now()
    reply = stream.reply()
    assert (said + reply.reasoning, reply.answer) == ("I think on and" + SENTENCE, "Yes.")
    stream.answer_now()  # too late, and no harm


def test_a_hint_goes_into_the_thought() -> None:
    """Would catch a hint that only the reader sees, or that opens the way to a control token."""
    qwq, engine = model(LONG)
    stream = qwq.session().send("?")
    read_until(stream, "on and")
    stream.steer(" mind step 2 <|im_end|>")
    reply = stream.reply()
    hint = HINT.format("mind step 2 <|im_end|>")
    assert reply.reasoning.startswith(hint)
    assert reply.answer == "Yes."
    assert bytes(engine.changes[0].ids).decode() == hint
    for wrong in ("", " ", "stop </think>"):
        with pytest.raises(UsageError, match="is no hint; give"):
            stream.steer(wrong)


def test_a_thought_that_goes_in_circles_is_closed_and_answered() -> None:
    qwq, _ = model("Hm. " + "Wait, no. " * 50 + "\n</think>\n\nYes.")
    reply = qwq.session().ask("?")
    assert reply.answer == "Yes."
    assert 60 < len(reply.reasoning) < 200
    assert kinds(reply) == ["repetition"]


def test_an_answer_that_goes_in_circles_is_ended() -> None:
    qwq, _ = model("Hm.\n</think>\n\n" + "Yes. " * 100)
    reply = qwq.session().ask("?")
    assert reply.finish_reason == "repetition"
    assert len(reply.answer) < 100
    assert kinds(reply) == ["repetition"]


@pytest.mark.parametrize("stop", ["\n\n", ["END", "\n\n"], ["No\n\n", "\n\n"]])
def test_stop_texts_end_the_answer_alone(stop: Any) -> None:
    """Would catch a stop in the thought, one cut across tokens, or one that is shown."""
    qwq, _ = model("Hm.\n\nHm.\n</think>\n\nYes.\nNo\n\nMore")
    reply = qwq.session().ask("?", stop=stop)
    assert reply.reasoning == "Hm.\n\nHm."
    assert reply.answer == ("Yes.\n" if "No\n\n" in stop else "Yes.\nNo")
    assert reply.finish_reason == "stop"


def test_what_only_begins_like_a_stop_is_shown() -> None:
    qwq, _ = model("Hm.\n</think>\n\nSTO")
    assert qwq.session().ask("?", stop="STOP").answer == "STO"


def test_an_answers_format_begins_after_the_thought() -> None:
    """Would catch a grammar that holds the thought, or that the model's newlines break."""
    qwq, engine = model(REPLY)
    qwq.session().ask("?", answer_format="root ::= [a-z]")
    (change,) = engine.changes
    assert change.grammar == "root ::= [a-z]"
    assert bytes(change.ids) == b"\n\n"
    assert engine.said == [b"Hm.\n</think>"]
    qwq, engine = model(LONG)
    qwq.session().ask("?", answer_format="root ::= [a-z]", reasoning_tokens=5)
    (change,) = engine.changes
    assert bytes(change.ids).decode() == CLOSING
    assert change.grammar


def test_a_reply_can_be_cancelled() -> None:
    """Would catch a cancelled turn that is remembered, or a session that stays busy."""
    qwq, _ = model(LONG, REPLY)
    session = qwq.session()
    stream = session.send("?")
    read_until(stream, "on and")
    stream.cancel()
    events = list(stream)
    assert [type(event) for event in events] == [Done]
    assert isinstance(events[0], Done)
    assert events[0].finish_reason == "cancelled"
    assert session.messages == []
    assert session.ask("?").answer == "Yes."


def test_a_long_prefill_tells_its_progress_and_can_be_cancelled() -> None:
    """Would catch a cancel that waits for the whole prompt."""
    qwq, engine = model(REPLY, REPLY)
    seen: list[tuple[int, int]] = []

    def on_progress(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            stream.cancel()

    stream = qwq.session().send("x" * 1000, on_progress=on_progress)
    assert stream.reply().finish_reason == "cancelled"
    assert [done for done, _ in seen] == [64, 128]
    assert seen[0][1] > 1000
    assert engine.prompts == []


def test_a_session_makes_one_reply_at_a_time() -> None:
    qwq, _ = model(LONG, REPLY, REPLY)
    session = qwq.session()
    stream = session.send("?")
    next(stream)
    with pytest.raises(UsageError, match=r"a reply is being made; .* cancel"):
        session.ask("??")
    stream.cancel()
    assert session.ask("??").answer == "Yes."
    stream.close()
    assert [m["content"] for m in session.messages] == ["??", "Yes."]


def test_threads_may_share_a_model() -> None:
    """Would catch replies of two threads that mix."""
    qwq, _ = model(*[REPLY] * 40)
    answers: list[str] = []

    def converse() -> None:
        session = qwq.session()
        answers.extend(session.ask("?").answer for _ in range(10))
        assert len(session.messages) == 20

    threads = [threading.Thread(target=converse) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["Yes."] * 40


def test_asyncio_reads_the_same_events() -> None:
    async def converse() -> tuple[list[Any], Reply]:
        qwq, _ = model(REPLY, REPLY)
        session = qwq.session()
        events = [event async for event in session.asend("?")]
        return events, await session.aask("?")

    events, reply = asyncio.run(converse())
    assert [type(e) for e in events] == [Reasoning] * 3 + [Answer] * 4 + [Done]
    assert reply.answer == "Yes."


def test_a_cancelled_task_cancels_its_reply() -> None:
    started = threading.Event()

    class Slow(FakeEngine):
        def token_bytes(self, token_id: int) -> bytes:
            started.set()
            time.sleep(0.1)
            return super().token_bytes(token_id)

    async def converse() -> int:
        engine = Slow(LONG, REPLY)
        session = QwQ(LocalModel(engine, describe_fake(TEMPLATE), Path("fake"))).session()
        task = asyncio.create_task(session.aask("?"))
        assert await asyncio.to_thread(started.wait, 120)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        reply = await session.aask("?")
        assert reply.answer == "Yes."
        return len(session.messages)

    assert asyncio.run(converse()) == 2


def test_python_functions_are_tools_that_run_by_themselves() -> None:
    def add(a: int, b: int = 1) -> dict[str, int]:
        """Add two numbers."""
        return {"sum": a + b}

    call = 'Hm.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 4}}\n</tool_call>'
    bad = call.replace('{"a": 4}', '{"x": 4}')
    qwq, engine = model(call, bad, call.replace("add", "sub"), REPLY)
    session = qwq.session(tools=[add])
    assert session.run("4 + 1?").answer == "Yes."
    results = [m["content"] for m in session.messages if m["role"] == "tool"]
    assert results[0] == '{"sum": 5}'
    assert "missing a required argument: 'a'" in results[1]
    assert results[2] == """{"error": "there is no tool 'sub'"}"""
    assert '{"sum": 5}' in prompt_of(engine)


@pytest.mark.parametrize(
    ("tools", "max_calls", "error"),
    [(TOOLS, 5, "'add' is described here and is no function"), ([], 0, "")],
)
def test_run_gives_up_with_a_reason(tools: Any, max_calls: int, error: str) -> None:
    call = 'Hm.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 4}}\n</tool_call>'
    qwq, _ = model(call)
    if not error:
        tools, error = TOOLS, "more than 0 calls"
    with pytest.raises(UsageError, match=error):
        qwq.session(tools=tools).run("?", max_calls=max_calls)


def test_a_conversation_that_is_too_long_ends_in_an_error_or_drops_turns() -> None:
    """Would catch a context that is cut in silence."""
    qwq, engine = model(*[REPLY] * 12)
    strict, lenient = qwq.session(), qwq.session(system="Be brief.", overflow="drop_oldest")
    text = "x" * 1200
    for _ in range(2):
        strict.ask(text)
        assert lenient.ask(text).notices == ()
    strict.ask(text)
    with pytest.raises(ContextError, match="leave no room for a reply"):
        strict.ask(text)
    assert len(strict.messages) == 6
    reply = lenient.ask(text)
    assert [n for n in reply.notices if n.kind == "dropped"] == [
        Notice("dropped", "the 2 oldest messages are left out from now on")
    ]
    prompt = prompt_of(engine)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nxxx")
    assert prompt.count("<|im_start|>user") == 2
    assert len(lenient.messages) == 7
    with pytest.raises(ContextError):
        lenient.ask("y" * 5000)


def test_yarn_begins_where_the_native_length_ends() -> None:
    """Would catch YaRN on short texts, none on long ones, or a switch back within a session."""
    qwq, engine = model(LONG, REPLY, REPLY)
    yarn = Yarn(2.0, 64)
    engine.rope_plan = RopePlan(4096, 64, yarn)
    session = qwq.session()
    reply = session.ask("?")
    assert kinds(reply) == ["rope"]
    assert engine.ropes[0] is None
    switched = [change for change in engine.changes if change.rope is not None]
    assert [change.rope for change in switched] == [yarn]
    assert any(len(ids) >= 64 for ids in engine.prefilled)
    assert session.ask("?").notices == ()
    assert engine.ropes[1] == yarn
    qwq.session().ask("x")
    assert engine.ropes[2] is None


def test_a_long_prompt_begins_with_yarn() -> None:
    qwq, engine = model(REPLY)
    yarn = Yarn(2.0, 64)
    engine.rope_plan = RopePlan(4096, 64, yarn)
    reply = qwq.session().ask("x" * 64)
    assert kinds(reply) == ["rope"]
    assert engine.ropes == [yarn]


def template_ending(end: str) -> str:
    return TEMPLATE.replace("<think>\n", end)


@pytest.mark.parametrize("end", ["", "<think>\n\n</think>\n\n", "<think></think>"])
def test_a_template_that_opens_no_thought_is_repaired_or_refused(end: str) -> None:
    """Would catch a thought that is skipped in silence."""
    qwq, engine = model(REPLY, template=template_ending(end))
    reply = qwq.ask("?")
    assert (reply.reasoning, kinds(reply)) == ("Hm.", ["template"])
    assert prompt_of(engine).endswith("<|im_start|>assistant\n<think>\n")
    description = describe_fake(template_ending(end))
    strict = QwQ(LocalModel(FakeEngine(REPLY), description, Path("fake"), repair_template=False))
    with pytest.raises(QwqError, match="would skip its thought; use the template"):
        strict.ask("?")


def test_a_template_that_cannot_be_repaired_is_refused() -> None:
    qwq, _ = model(REPLY, template="{{ messages[0].content }}")
    with pytest.raises(QwqError, match=r"it ends in '.*' and not in"):
        qwq.ask("?")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_tokens": 0}, "max_tokens: 0 leaves no reply; choose 1 or more"),
        ({"reasoning_tokens": -1}, "reasoning_tokens: -1 leaves no reply; choose 0 or more"),
        ({"reasoning_seconds": float("nan")}, "reasoning_seconds: nan leaves no reply"),
        ({"stop": ["a", ""]}, "has an empty text"),
    ],
)
def test_limits_that_cannot_be_are_refused_at_once(options: Any, error: str) -> None:
    qwq, _ = model(REPLY)
    with pytest.raises(UsageError, match=error):
        qwq.session().send("?", **options)
