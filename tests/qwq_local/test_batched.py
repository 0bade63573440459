"""Several replies at once: each is as if it were alone, and none waits for another's end."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.errors import EngineError, QwqError, UsageError
from convert.gguf_header import read_header
from qwq_local import QwQ, Sampling
from qwq_local.engine import EngineSettings, shared_prefix
from qwq_local.engines import batched
from qwq_local.engines.batched import BatchedEngine, _Piece
from qwq_local.engines.gguf import GgufEngine, plan_gguf
from qwq_local.engines.isolated import IsolatedEngine
from qwq_local.rope import NATIVE_LENGTH
from tests.qwq_local.conftest import NANO
from tests.qwq_local.test_engines import (
    GREEDY,
    greedy,
    ids_of,
    n_same_but_for_rounding,
    root_mean_square,
)

QUESTIONS = ("Which is larger, 9.9 or 9.11?", "What is 478 + 356?", "Is 7 > 8?", "What is 12 + 7?")
N = len(QUESTIONS)


@pytest.fixture(scope="module")
def batched_qwq(bf16_gguf: Path) -> Iterator[QwQ]:
    with QwQ.open(bf16_gguf, context=1024, threads=1, parallel=N, isolated=False) as qwq:
        yield qwq


def engine_of(qwq: QwQ) -> BatchedEngine:
    assert isinstance(qwq.engine, BatchedEngine)
    return qwq.engine


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks give, each in a thread of its own."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        return [task.result() for task in [threads.submit(task) for task in tasks]]


@pytest.fixture
def batches(batched_qwq: QwQ, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """What is read from now on: of each batch the slots, and how many ids."""
    seen: list[list[tuple[int, int]]] = []
    batch = engine_of(batched_qwq)._batch
    decode = batch._decode

    def watched(pieces: Sequence[_Piece]) -> Any:
        seen.append([(piece.slot_index, len(piece.ids)) for piece in pieces])
        return decode(pieces)

    monkeypatch.setattr(batch, "_decode", watched)
    return seen


def test_replies_made_together_are_those_made_alone(
    gguf_qwq: QwQ, batched_qwq: QwQ, batches: list[list[tuple[int, int]]]
) -> None:
    """Would catch ids, positions or logits that go to the wrong sequence, and none in one batch.

    Where a reply departs, the two best logits lie within what a batch's size may round.
    """
    n_tokens = 60
    prompts = [ids_of(gguf_qwq, text * (2 + 5 * i)) for i, text in enumerate(QUESTIONS)]
    expected = [greedy(gguf_qwq, ids, n_tokens) for ids in prompts]
    made = together(*[lambda ids=ids: greedy(batched_qwq, ids, n_tokens) for ids in prompts])
    assert max(len(batch) for batch in batches) == N
    n_alike = 0
    for ids, ours, theirs in zip(prompts, made, expected, strict=True):
        n_alike += n_same_but_for_rounding(gguf_qwq, ids, ours, theirs)
    assert n_alike > N * n_tokens // 3


def test_replies_stay_together(
    batched_qwq: QwQ, batches: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch replies that take turns, each waiting while the other is read."""

    def wait_for_each_other() -> None:
        batches.clear()
        monkeypatch.setattr(batched, "GRACE_S", 60)

    def n_together() -> int:
        return sum(len(batch) == 2 for batch in batches)

    def read(prompt: list[int]) -> None:
        reply = batched_qwq.engine.generate(
            prompt, sampling=GREEDY, seed=0, max_tokens=900, stop_ids=()
        )
        next(reply)
        both.wait(120)
        while n_together() < 8:
            next(reply)

    both = threading.Barrier(2, action=wait_for_each_other)
    prompts = [ids_of(batched_qwq, text)[:9] for text in QUESTIONS[:2]]
    together(*[lambda prompt=prompt: read(prompt) for prompt in prompts])
    sizes = [len(batch) for batch in batches]
    assert sizes[sizes.index(2) :][:8] == [2] * 8


def test_those_who_begin_together_are_read_together(
    batched_qwq: QwQ, batches: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a batch that goes ahead with the first of them while the others turn round."""
    monkeypatch.setattr(batched, "GRACE_S", 60)
    batch = engine_of(batched_qwq)._batch
    prompts = [ids_of(batched_qwq, text)[:9] for text in QUESTIONS]
    with ThreadPoolExecutor(N) as threads, batch.alone():
        for ids in prompts:
            threads.submit(greedy, batched_qwq, ids, 1)
        while batch._n_before < N:
            threading.Event().wait(0.01)
    assert [sorted(slot for slot, _ in one) for one in batches] == [list(range(N))]


def test_a_batch_waits_for_who_has_begun(
    batched_qwq: QwQ, batches: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a reply that misses a batch between turning to its prompt and asking for it."""
    monkeypatch.setattr(batched, "GRACE_S", 60)
    batch = engine_of(batched_qwq)._batch
    read, begun, followed = batch.read, threading.Event(), threading.Event()

    def first_read_late(*arguments: Any, **options: Any) -> Any:
        if begun.is_set():
            followed.set()
        else:
            begun.set()
            assert followed.wait(120)
            while not (batch._is_busy or batches):
                threading.Event().wait(0.01)
        return read(*arguments, **options)

    monkeypatch.setattr(batch, "read", first_read_late)
    prompts = [ids_of(batched_qwq, text)[:9] for text in QUESTIONS[:2]]
    with ThreadPoolExecutor(2) as threads:
        threads.submit(greedy, batched_qwq, prompts[0], 1)
        assert begun.wait(120)
        threads.submit(greedy, batched_qwq, prompts[1], 1)
    assert [len(one) for one in batches] == [2]


def test_logits_read_together_are_those_read_alone(gguf_qwq: QwQ, batched_qwq: QwQ) -> None:
    """Would catch rows that are taken from another's piece."""
    prompts = [ids_of(gguf_qwq, text * 9) for text in QUESTIONS]

    def read(qwq: QwQ, ids: list[int]) -> Any:
        return np.concatenate(list(qwq.engine.logits(ids)))

    made = together(*[lambda ids=ids: read(batched_qwq, ids) for ids in prompts])
    for ids, ours in zip(prompts, made, strict=True):
        theirs = read(gguf_qwq, ids)
        assert root_mean_square(ours - theirs) < 0.01 * theirs.std()


def test_each_reply_draws_with_its_own_seed(gguf_qwq: QwQ, batched_qwq: QwQ) -> None:
    """Would catch samplers that share a state, or that are fed another's logits.

    The engine for one is led along each reply: it draws from the same logits but for rounding, and
    so the same id but for one or two in a hundred.
    """
    engine = gguf_qwq.engine
    assert isinstance(engine, GgufEngine)
    sampling, n_tokens = Sampling(temperature=2.0, top_k=0, top_p=1.0), 40
    ids = ids_of(gguf_qwq, QUESTIONS[0])

    def sample(seed: int) -> list[int]:
        made = batched_qwq.engine.generate(
            ids, sampling=sampling, seed=seed, max_tokens=n_tokens, stop_ids=()
        )
        return list(made)

    made = together(*[lambda seed=seed: sample(seed) for seed in range(N)])
    assert len(set(map(tuple, made))) == N
    n_alike = 0
    for seed, reply in enumerate(made):
        sequence = list(ids)
        with engine._sampler(sampling, seed, ids) as sampler:
            for token_id in reply:
                engine._hold(sequence, None)
                n_alike += sampler.draw() == token_id
                sequence.append(token_id)
    assert n_alike > 0.9 * N * n_tokens


def test_a_long_prompt_joins_the_replies_of_others(
    batched_qwq: QwQ, batches: list[list[tuple[int, int]]]
) -> None:
    """Would catch a prefill for which all replies stand still."""
    engine = batched_qwq.engine
    running = engine.generate(
        ids_of(batched_qwq), sampling=GREEDY, seed=0, max_tokens=40, stop_ids=()
    )
    next(running)
    long = ids_of(batched_qwq, "A long story. " * 90)
    assert len(long) > 512
    batches.clear()

    def read() -> None:
        for _ in engine.prefill(long):
            pass

    together(read, lambda: list(running))
    mixed = [batch for batch in batches if len({slot for slot, _ in batch}) > 1]
    assert mixed
    assert {n for batch in mixed for _, n in batch} == {1, 128}


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_cancelled_reply_frees_its_place(
    when: str, batched_qwq: QwQ, batches: list[list[tuple[int, int]]]
) -> None:
    """Within one micro-batch, while others go on."""
    engine = engine_of(batched_qwq)
    other = ids_of(batched_qwq, QUESTIONS[1])
    messages = [{"role": "user", "content": "A long story. " * (100 if when == "prefill" else 1)}]
    seen_at_cancel: list[int] = []

    def cancel(*_: int) -> None:
        stream.cancel()
        seen_at_cancel.append(len(batches))

    stream = batched_qwq.reply(
        messages, sampling=GREEDY, on_progress=cancel if when == "prefill" else None
    )

    def read() -> str:
        if when == "decode":
            next(stream)
            cancel()
        return stream.reply().finish_reason

    reason, reply = together(read, lambda: greedy(batched_qwq, other, 30))
    assert reason == "cancelled"
    assert len(reply) == 30
    later = [n for batch in batches[seen_at_cancel[0] :] for _, n in batch]
    assert len(later) <= 30 + 1  # the other's, and one
    assert max(later, default=0) <= len(other)
    assert not any(slot.n_streams for slot in engine._slots)


def test_what_fails_alone_fails_no_other(batched_qwq: QwQ) -> None:
    """An id that there is not makes llama.cpp refuse the whole batch."""
    engine = engine_of(batched_qwq)
    good, bad = ids_of(batched_qwq)[:60], [1, 2, engine.vocab_size + 7]
    expected = greedy(batched_qwq, good, 9)
    with ThreadPoolExecutor(2) as threads:
        with engine._batch.alone():
            tasks = [threads.submit(greedy, batched_qwq, ids, 9) for ids in (good, bad)]
            while sum(slot.n_streams for slot in engine._slots) < 2:
                threading.Event().wait(0.01)
        assert tasks[0].result() == expected
        with pytest.raises(QwqError, match="status -1"):
            tasks[1].result()
    assert greedy(batched_qwq, good, 9) == expected


def test_what_one_has_read_serves_all(
    batched_qwq: QwQ, gguf_qwq: QwQ, batches: list[list[tuple[int, int]]]
) -> None:
    """A prompt's beginning is copied between sequences, and each goes its own way from there."""
    engine = batched_qwq.engine
    shared = ids_of(batched_qwq, "The same beginning. " * 20)
    prompts = [shared + ids_of(batched_qwq, text) for text in QUESTIONS]
    expected = [greedy(gguf_qwq, ids, 12) for ids in prompts]
    assert greedy(batched_qwq, prompts[0], 12) == expected[0]
    n_known = [len(prompts[0]) - 1, *[shared_prefix(prompts[0], ids) for ids in prompts[1:]]]
    assert [engine.n_cached(ids) for ids in prompts] == n_known
    batches.clear()
    made = [greedy(batched_qwq, ids, 12) for ids in prompts]
    n_read = sum(n for batch in batches for _, n in batch)
    assert n_read <= sum(map(len, prompts)) - sum(n_known) + N * 12
    n_alike = [
        n_same_but_for_rounding(gguf_qwq, ids, ours, theirs)
        for ids, ours, theirs in zip(prompts, made, expected, strict=True)
    ]
    assert sum(n_alike) > 0.75 * N * 12
    assert all(engine.n_cached(ids) >= len(shared) for ids in prompts)


def test_more_replies_than_places_take_turns(batched_qwq: QwQ) -> None:
    """Even within one thread: nobody waits for who cannot come."""
    prompts = [ids_of(batched_qwq, f"{i}. {TEXT}") for i, TEXT in enumerate(QUESTIONS * 2)]
    expected = [greedy(batched_qwq, ids, 5) for ids in prompts]
    streams = [
        batched_qwq.engine.generate(ids, sampling=GREEDY, seed=0, max_tokens=5, stop_ids=())
        for ids in prompts
    ]
    turns = list(zip(*streams, strict=True))
    assert list(map(list, zip(*turns, strict=True))) == expected


def test_everything_works_in_every_place(parallel_qwq: QwQ) -> None:
    """A grammar, a budget, a hint and an early answer, in one batch."""
    with_hint = parallel_qwq.session(sampling=GREEDY).send("What is 12 + 34?", max_tokens=200)
    with_hint.steer("ones first")
    early = parallel_qwq.session(sampling=GREEDY).send("What is 478 + 356?", max_tokens=200)
    early.answer_now()
    bounded = parallel_qwq.session(sampling=GREEDY).send(
        "Which is larger, 9.9 or 9.11?", reasoning_tokens=5, max_tokens=200
    )
    held = parallel_qwq.session(sampling=GREEDY).send(
        "What is 1 + 2?", reasoning_tokens=9, answer_format='root ::= "so be it"', max_tokens=200
    )
    hint, now, budget, grammar = together(with_hint.reply, early.reply, bounded.reply, held.reply)
    assert "Wait, the user adds: ones first" in hint.reasoning
    assert "The time is limited" in now.reasoning
    assert [notice.kind for notice in budget.notices] == ["sampling", "budget"]
    assert grammar.answer == "so be it"


def test_a_dead_process_is_an_error_for_all_and_the_next_turn_goes_on(bf16_gguf: Path) -> None:
    with QwQ.open(bf16_gguf, context=1024, threads=1, parallel=2) as qwq:
        assert isinstance(qwq.engine, IsolatedEngine)
        streams = [qwq.reply([{"role": "user", "content": text}]) for text in QUESTIONS[:2]]
        for stream in streams:
            next(stream)
        pid = qwq.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineError, match="SIGKILL"):
                stream.reply()
        assert qwq.ask(QUESTIONS[0], sampling=GREEDY, max_tokens=20).usage.completion_tokens


def test_closing_ends_what_is_being_made(bf16_gguf: Path) -> None:
    """Would catch a crash on memory that was freed, and who waits for ever."""
    for isolated in (True, False):
        qwq = QwQ.open(bf16_gguf, context=1024, threads=1, parallel=2, isolated=isolated)
        streams = [
            qwq.engine.generate(
                ids_of(qwq, text), sampling=GREEDY, seed=0, max_tokens=900, stop_ids=()
            )
            for text in QUESTIONS[:2]
        ]
        for stream in streams:
            next(stream)
        threading.Timer(0.05, qwq.close).start()

        def read(stream: Iterator[int]) -> str:
            with pytest.raises(QwqError) as caught:
                list(stream)
            return str(caught.value)

        for message in together(*[lambda stream=stream: read(stream) for stream in streams]):
            assert "the model is closed" in message


@pytest.mark.parametrize("parallel", [0, 65])
def test_so_many_replies_cannot_be(bf16_gguf: Path, parallel: int) -> None:
    with pytest.raises(UsageError, match=rf"^parallel: {parallel} .*; choose 1 to 64"):
        QwQ.open(bf16_gguf, parallel=parallel)


def test_where_several_cannot_be_is_said(bf16_gguf: Path) -> None:
    with pytest.raises(UsageError, match="a folder makes one; use a GGUF file"):
        QwQ.open(NANO, parallel=2)
    with pytest.raises(UsageError, match="choose --rope native or --rope yarn"):
        QwQ.open(bf16_gguf, context=NATIVE_LENGTH + 1, parallel=2)


def test_each_reply_has_a_context_of_its_own(bf16_gguf: Path) -> None:
    """In the memory plan too: so many kv_caches."""
    header = read_header(bf16_gguf)
    one, four = (
        plan_gguf(bf16_gguf, header, EngineSettings(1024, parallel=n)).shares[-1] for n in (1, 4)
    )
    assert four.kv_nbytes == 4 * one.kv_nbytes
    assert four.compute_nbytes > one.compute_nbytes
