"""The next turn is ready: read ahead while idle, exactly, and given up for whoever asks."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qwq_local import QwQ, Sampling
from qwq_local.engines.loop import REUSE_UNIT
from qwq_local.local import LocalModel
from qwq_local.rope import Yarn
from tests.fakes import FakeEngine, describe_fake
from tests.qwq_local.test_session import REPLY, TEMPLATE

GREEDY = Sampling(temperature=0)
COUNTING = " ".join(map(str, range(100, 180)))


def test_the_second_turn_costs_only_its_own_tokens(bf16_gguf: Path) -> None:
    """Would catch a stripped thought that makes all after it be read again, or read wrongly."""
    with QwQ.open(bf16_gguf, context=2048, threads=1, isolated=False) as qwq:
        session = qwq.session(sampling=GREEDY)
        first = session.ask(
            "Count from 100.", reasoning_tokens=30, answer_format=f'root ::= "{COUNTING}"'
        )
        assert first.answer == COUNTING
        qwq.wait_until_idle()
        second = session.ask("Go on.", max_tokens=40)
        assert second.timings.n_prefilled < 2 * REUSE_UNIT
        assert second.timings.n_cached > 200
    with QwQ.open(bf16_gguf, context=2048, threads=1, isolated=False) as qwq:
        fresh = qwq.reply(
            [*session.messages[:2], {"role": "user", "content": "Go on."}],
            sampling=GREEDY,
            max_tokens=40,
        ).reply()
    assert fresh.timings.n_cached == 0
    assert (fresh.reasoning, fresh.answer) == (second.reasoning, second.answer)
    assert fresh.usage == second.usage


class HeldPrefill(FakeEngine):
    """Reads ahead one unit, and no more before that is to be given up."""

    model: LocalModel
    is_held = True
    n_steps = 0

    def prefill(self, ids: Sequence[int], *, rope: Yarn | None = None) -> Iterator[int]:
        for n_read in super().prefill(ids, rope=rope):
            if threading.current_thread().name == "qwq-warm":
                while self.is_held and not self.model._warming.is_set():
                    time.sleep(0.001)
                self.n_steps += 1
            yield n_read


@pytest.mark.parametrize("n_turns", [1, 3])
def test_reading_ahead_is_given_up_for_a_message(n_turns: int) -> None:
    """Would catch a message that waits until the idle work is done."""
    engine = HeldPrefill(*[REPLY] * (n_turns + 1))
    engine.model = LocalModel(engine, describe_fake(TEMPLATE), Path("fake"))
    qwq = QwQ(engine.model)
    session = qwq.session()
    for _ in range(n_turns):
        session.ask("x" * 900)
    assert qwq.session().ask("y").answer == "Yes."
    assert engine.n_steps <= n_turns
    engine.is_held = False
    qwq.wait_until_idle()
    assert max(map(len, engine.prefilled)) > 900 * n_turns


def test_what_is_read_ahead_is_what_the_next_prompt_begins_with() -> None:
    """Would catch a role or a tool turn that renders otherwise."""
    call = 'Hm.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    engine = FakeEngine(REPLY, call, REPLY)
    qwq = QwQ(LocalModel(engine, describe_fake(TEMPLATE), Path("fake")))
    session = qwq.session(tools=tools)
    warmed = []
    session.ask("?")
    qwq.wait_until_idle()
    warmed.append(engine.prefilled[-1])
    reply = session.ask("?")
    qwq.wait_until_idle()
    warmed.append(engine.prefilled[-1])
    session.tool_result(reply.tool_calls[0].id, "2")
    session.ask()
    for ids, prompt in zip(warmed, engine.prompts[1:], strict=True):
        assert prompt[: len(ids) - 1] == ids[:-1]
        assert len(prompt) - len(ids) < 50
