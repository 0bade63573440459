"""The engine in a process of its own: it may die, and no conversation with it."""

import itertools
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from convert.errors import EngineError, GgufError, QwqError, UsageError
from qwq_local import Limits, QwQ, Sampling, child
from qwq_local.engines import isolated, parallel
from qwq_local.engines.gguf import GgufEngine
from qwq_local.engines.isolated import Calls, IsolatedEngine
from tests.qwq_local.ctrl_c import interrupted, use_narrow_pipes

GREEDY = Sampling(temperature=0)


@pytest.fixture(params=[1, 2], ids="{} at once".format)
def qwq(bf16_gguf: Path, request: pytest.FixtureRequest) -> Iterator[QwQ]:
    with QwQ.open(bf16_gguf, context=1024, threads=1, parallel=request.param) as model:
        yield model


def engine_of(qwq: QwQ) -> IsolatedEngine:
    assert isinstance(qwq.engine, IsolatedEngine)
    return qwq.engine


def kill(qwq: QwQ, number: int = signal.SIGKILL) -> None:
    pid = engine_of(qwq).pid
    assert pid is not None
    os.kill(pid, number)


def test_it_computes_what_the_engine_within_computes(gguf_qwq: QwQ, isolated_qwq: QwQ) -> None:
    """Would catch an argument that is lost on the way."""
    messages = [{"role": "user", "content": "What is 12 + 34?"}]
    sampling = Sampling(temperature=1.2, top_k=7, presence_penalty=0.3)
    ours, theirs = (
        q.reply(messages, sampling=sampling, seed=3, max_tokens=60).reply()
        for q in (isolated_qwq, gguf_qwq)
    )
    assert (ours.reasoning, ours.answer, ours.usage) == (
        theirs.reasoning,
        theirs.answer,
        theirs.usage,
    )
    steered = []
    for one in (isolated_qwq, gguf_qwq):
        stream = one.reply(messages, seed=3, max_tokens=80, limits=Limits(80, reasoning_tokens=30))
        stream.steer("ones first")
        made = stream.reply()
        steered.append((made.reasoning, made.answer, made.usage))
    assert steered[0] == steered[1]
    assert "ones first" in steered[0][0]
    ids = isolated_qwq.engine.tokenize("Which is larger?" * 20, parse_special=False)
    for first in (0, 70):
        here, there = (one.engine.logits(ids, first=first) for one in (gguf_qwq, isolated_qwq))
        for a, b in zip(here, there, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_id_is_read_before_the_next_is_asked_for(gguf_qwq: QwQ) -> None:
    """Would catch a process that waits for its reader, or reads what nobody will ask for."""
    engine = gguf_qwq.engine
    assert isinstance(engine, GgufEngine)
    ids = engine.tokenize("What is 12 + 34?", parse_special=False)

    def reading(stop_ids: Collection[int]) -> list[int]:
        n_fed = []
        stream = engine.generate(ids, sampling=GREEDY, seed=0, max_tokens=3, stop_ids=stop_ids)
        for _ in stream:
            before = engine._n_filled
            engine.read_on()
            engine.read_on()
            n_fed.append(engine._n_filled - before)
        return n_fed

    assert reading(()) == [1, 1, 0]
    first = next(engine.generate(ids, sampling=GREEDY, seed=0, max_tokens=1, stop_ids=()))
    assert reading({first}) == [0]


def test_a_folders_process_may_die_too(isolated_folder_qwq: QwQ) -> None:
    session = isolated_folder_qwq.session(sampling=GREEDY)
    stream = session.send("What is 12 + 34?", max_tokens=20)
    next(stream)
    kill(isolated_folder_qwq)
    with pytest.raises(EngineError, match="it died with signal SIGKILL"):
        stream.reply()
    assert session.ask("What is 12 + 34?", max_tokens=20).usage.completion_tokens == 20


def test_a_gptq_folder_runs_in_a_process_of_its_own(gptq_folder: Path, gptq_qwq: QwQ) -> None:
    """Would catch kernels that are not found there, or that compute something else there."""
    ids = gptq_qwq.engine.tokenize("What is 12 + 34?", parse_special=False)
    with QwQ.open(gptq_folder, context=512, threads=1) as qwq:
        assert engine_of(qwq).pid not in (None, os.getpid())
        made, expected = (
            list(one.engine.generate(ids, sampling=GREEDY, seed=0, max_tokens=20, stop_ids=()))
            for one in (qwq, gptq_qwq)
        )
        assert made == expected
        kill(qwq)
        with pytest.raises(EngineError, match="it died with signal SIGKILL"):
            qwq.engine.tokenize("?", parse_special=False)


def test_a_build_for_another_processor_is_told_of(qwq: QwQ) -> None:
    kill(qwq, signal.SIGILL)
    with pytest.raises(EngineError, match=r"compiled for another processor; .* `make setup`"):
        qwq.session(sampling=GREEDY).ask("What is 12 + 34?", max_tokens=5)


def test_a_dead_process_is_an_error_and_the_next_turn_goes_on(qwq: QwQ) -> None:
    """Would catch an application that dies with it, hangs, or forgets what was said."""
    session = qwq.session(sampling=GREEDY)
    session.ask("What is 12 + 34?", max_tokens=30)
    stream = session.send("And 35?", max_tokens=30)
    next(stream)
    next(stream)
    kill(qwq, signal.SIGABRT)
    with pytest.raises(EngineError, match=r"it died with signal SIGABRT .*; ask again"):
        stream.reply()
    assert len(session.messages) == 2
    reply = session.ask("And 35?", max_tokens=30)
    assert len(session.messages) == 4
    fresh = qwq.session(sampling=GREEDY)
    fresh.ask("What is 12 + 34?", max_tokens=30)
    again = fresh.ask("And 35?", max_tokens=30)
    assert (reply.reasoning, reply.answer) == (again.reasoning, again.answer)


def test_killing_it_at_random_moments_loses_nothing(qwq: QwQ) -> None:
    """Would catch a moment, in a prefill, a token or between turns, from which nothing recovers."""
    moments = random.Random(5)
    session = qwq.session(sampling=GREEDY)
    turns = n_deaths = 0
    while turns < 6:
        timer = threading.Timer(moments.uniform(0.0, 0.25), _kill_if_alive, [qwq])
        if moments.random() < 0.7:
            timer.start()
        try:
            session.ask(f"What is {turns} + 34? " * 10, max_tokens=40)
            turns += 1
        except EngineError:
            n_deaths += 1
        finally:
            timer.cancel()
        assert len(session.messages) == 2 * turns
        if n_deaths > 40:
            break
    assert turns == 6
    assert [m["content"][:9] for m in session.messages[::2]] == [f"What is {i}" for i in range(6)]


@contextmanager
def killed_if_it_hangs(qwq: QwQ) -> Iterator[None]:
    """For a test of bytes that may be lost: who waits for them is to get EngineError."""
    timer = threading.Timer(300, _kill_if_alive, [qwq])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _kill_if_alive(qwq: QwQ) -> None:
    pid = engine_of(qwq).pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("nbytes", "n_parallel"), [(32, 1), (None, 1), (32, 2)])
def test_ctrl_c_at_any_moment_costs_its_request_alone(
    bf16_gguf: Path, nbytes: int | None, n_parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a byte lost or sent twice, and an answer that is taken for that of another.

    At every moment of a request and of a reply: before it is sent, within and after that, while it
    is waited for, between two reads of its answer. The process stays the same.
    """
    if nbytes is not None:
        use_narrow_pipes(monkeypatch, nbytes)
    question = "What is 12 + 34?"
    opened = QwQ.open(bf16_gguf, context=256, threads=1, parallel=n_parallel)
    with opened as qwq, killed_if_it_hangs(qwq):
        engine = engine_of(qwq)
        pid, ids = engine.pid, engine.tokenize(question, parse_special=False)

        def reply() -> list[int]:
            stream = engine.generate(ids, sampling=GREEDY, seed=0, max_tokens=2, stop_ids=())
            return list(stream)

        expected = reply()
        for task in (lambda: engine.tokenize("Another text.", parse_special=False), reply):
            n_moments = 0
            while interrupted(task, n_moments, child, isolated, parallel):
                assert engine.tokenize(question, parse_special=False) == ids
                n_moments += 1
            assert n_moments > 30
            assert reply() == expected
        assert engine.pid == pid


def test_ctrl_c_leaves_it_whole(qwq: QwQ) -> None:
    """Would catch an answer that is taken for that of the next request, and a process that is lost.

    The key is pressed again after a while, since Python drops an exception that falls into a
    finalizer.
    """
    caught = threading.Event()

    def press() -> None:
        delay_s = 0.2
        while not caught.wait(delay_s):
            os.kill(os.getpid(), signal.SIGINT)
            delay_s = 15

    session, pid = qwq.session(sampling=GREEDY), engine_of(qwq).pid
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        list(map(session.ask, itertools.repeat("What is 12 + 34? " * 20)))
    caught.set()
    expected = qwq.session(sampling=GREEDY, seed=1).ask("What is 1 + 2?", max_tokens=20)
    again = qwq.session(sampling=GREEDY, seed=1).ask("What is 1 + 2?", max_tokens=20)
    assert (expected.reasoning, expected.answer) == (again.reasoning, again.answer)
    assert engine_of(qwq).pid == pid


def test_closing_from_another_thread_ends_a_reply(bf16_gguf: Path) -> None:
    """Would catch a close() that waits for what its process is at, and a death for no reason."""
    qwq = QwQ.open(bf16_gguf, context=1024, threads=1)
    stream = qwq.session(sampling=GREEDY).send("What is 478 + 356?", max_tokens=900)
    next(stream)
    kill(qwq, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(deque, stream, 0)
        while not engine_of(qwq)._lock.locked():
            threading.Event().wait(0.01)
        closing = threads.submit(qwq.close)
        try:
            with pytest.raises(QwqError, match="closed"):
                reading.result(60)
        finally:
            _kill_if_alive(qwq)
        closing.result(60)
    with pytest.raises(QwqError, match="closed"):
        qwq.ask("?")


def test_loading_tells_its_progress_and_its_errors(bf16_gguf: Path, tmp_path: Path) -> None:
    """Would catch errors that lose their type on the way from the process."""
    seen: list[tuple[int, int]] = []
    QwQ.open(bf16_gguf, context=256, on_progress=lambda *p: seen.append(p)).close()
    assert seen[-1] == (100, 100)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    path = tmp_path / "odd.gguf"
    path.write_bytes(bf16_gguf.read_bytes().replace(b"blk.3.attn_q.weight", b"blk.3.attn_X.weight"))
    with pytest.raises(GgufError, match=r"odd.gguf: llama.cpp cannot load it \(.*attn_q"):
        QwQ.open(path)
    with pytest.raises(UsageError, match="context: "):
        QwQ.open(bf16_gguf, context=10**9)


def test_a_grammar_holds_the_answer_to_a_schema(isolated_qwq: QwQ) -> None:
    """Would catch a grammar that is not switched on, or that breaks the thought."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}}
    session = isolated_qwq.session(sampling=GREEDY)
    form = 'root ::= "yes, " [0-9] [0-9]'
    reply = session.ask("What is 12 + 34?", reasoning_tokens=20, answer_format=form)
    assert reply.answer.startswith("yes, ")
    assert reply.answer[5:].isdigit()
    assert reply.finish_reason == "stop"
    for wrong in ("root ::= (", "no grammar", ""):
        with pytest.raises(UsageError, match="answer_format: it is no GBNF grammar"):
            session.ask("?", answer_format=wrong)
    reply = session.ask("?", reasoning_tokens=4, max_tokens=100, answer_format=schema)
    assert reply.answer.lstrip().startswith("{")
    with pytest.raises(UsageError, match="answer_format: the JSON schema cannot be"):
        session.ask("?", answer_format={"type": "nonsense"})


@pytest.mark.parametrize("n_rows", [1, 5, 1000])
def test_logits_in_pieces_are_all_of_them(
    gguf_qwq: QwQ, monkeypatch: pytest.MonkeyPatch, n_rows: int
) -> None:
    """Catches a row that falls between two messages, which only large vocabularies need."""
    engine = gguf_qwq.engine
    monkeypatch.setattr(isolated, "PIECE_NBYTES", 4 * engine.vocab_size * n_rows)
    ids = engine.tokenize("What is 12 + 34?", parse_special=False)
    calls = Calls(engine)
    stream, _ = calls.open("logits", [ids, 0, None])
    pieces = []
    while (told := calls.next(stream, None))[1]:
        pieces.append(np.frombuffer(told[1], dtype=np.float32).reshape(-1, engine.vocab_size))
    assert max(map(len, pieces)) == min(n_rows, len(ids))
    np.testing.assert_array_equal(np.concatenate(pieces), np.concatenate([*engine.logits(ids)]))
