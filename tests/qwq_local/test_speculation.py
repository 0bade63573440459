"""Speculation: the reply is the plain loop's, whatever is proposed, and costs nothing in vain."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.errors import UsageError
from convert.gguf_export import export_gguf
from convert.gguf_header import read_header
from qwq_local import QwQ, Sampling
from qwq_local.child import Channel
from qwq_local.description import describe_gguf
from qwq_local.engine import Drafts, EngineSettings, Intervention
from qwq_local.engines.draft import DraftDrafter, check_vocabulary
from qwq_local.engines.gguf import GgufEngine
from qwq_local.engines.isolated import IsolatedEngine, open_engine
from qwq_local.engines.loop import EngineLoop
from qwq_local.engines.speculation import KV_UNIT, SIZES, Drafter, NgramDrafter, Pace, Speculator
from qwq_local.local import LocalModel
from tests.qwq_local.conftest import NANO
from tests.synthetic import (
    PLAIN_ADDED_TOKENS,
    SPECIAL_TOKENS,
    write_checkpoint,
    write_tokenizer,
)

GREEDY = Sampling(temperature=0)
HOT = Sampling(temperature=1.1, presence_penalty=0.5)
TEXT = "What is 12 + 34? Line them up: 12, 34. " * 6


@pytest.fixture(scope="module")
def q8_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A type for which batches compute the bits of single rows on every processor tried."""
    path = tmp_path_factory.mktemp("q8") / "nano-qwq-Q8_0.gguf"
    with Checkpoint.open(NANO) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, threads=1)
    return path


@pytest.fixture(scope="module")
def engine(q8_gguf: Path) -> Iterator[GgufEngine]:
    engine = GgufEngine(q8_gguf, read_header(q8_gguf), EngineSettings(2048, 1, speculation="off"))
    yield engine
    engine.close()


class Oracle:
    """Proposes a known sequence, wrong now and then, so that every kind of rejection occurs."""

    is_free = True

    def __init__(self, known: Sequence[int]) -> None:
        self._known = list(known)

    def propose(self, sequence: Sequence[int], n: int) -> list[int]:
        ahead = self._known[len(sequence) :][:n]
        return [t + 1 if (len(sequence) + i) % 11 == 0 else t for i, t in enumerate(ahead)]


def eager(make_drafter: Callable[[], Drafter], *, is_exact: bool = True) -> Speculator:
    """One that always finds that it pays."""
    speculator = Speculator(make_drafter, is_exact=is_exact)
    speculator.pace.least_speedup = 0.0
    return speculator


def reply(
    engine: EngineLoop,
    ids: list[int],
    sampling: Sampling,
    n: int = 150,
    drafts: Drafts | None = None,
) -> list[int]:
    options: dict[str, Any] = {"seed": 4, "max_tokens": n, "stop_ids": (), "drafts": drafts}
    return list(engine.generate(ids, sampling=sampling, **options))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), HOT], ids=["greedy", "default", "hot"])
def test_the_ids_are_those_of_the_plain_loop(engine: GgufEngine, sampling: Sampling) -> None:
    """Would catch a rejected id that stays in the kv_cache, a row or a draw of another id."""
    ids = engine.tokenize(TEXT, parse_special=False)
    engine.speculator = None
    expected = reply(engine, ids, sampling)
    for size in SIZES:
        engine.speculator = speculator = eager(lambda: Oracle(ids + expected))
        speculator._sizes = [size]
        drafts = Drafts()
        assert reply(engine, ids, sampling, drafts=drafts) == expected, size
        assert drafts.n_drafted > drafts.n_accepted > 50, "or too little was tried"
    engine.speculator = eager(NgramDrafter)
    assert reply(engine, ids, sampling) == expected


def sizes_that_round_otherwise(engine: GgufEngine, ids: list[int]) -> set[int]:
    """Those whose batches give no row the bits that it has when it is read alone."""

    def rows(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        engine.n_logits_rows = size
        return np.concatenate(list(engine.logits(ids)))[: len(ids) // size * size]

    single = rows(1)
    alike = {size: (rows(size) == single[: len(ids) // size * size]) for size in SIZES}
    return {size for size, equal in alike.items() if not equal.all(axis=1).any()}


def test_batches_that_round_otherwise_are_not_read(bf16_gguf: Path) -> None:
    """Would catch speculation that changes replies: in BF16 a batch is another computation."""
    engine = GgufEngine(bf16_gguf, read_header(bf16_gguf), EngineSettings(2048, 1))
    ids = engine.tokenize(TEXT, parse_special=False)
    engine.speculator = None
    expected = reply(engine, ids, GREEDY, 60)
    engine.speculator = speculator = eager(lambda: Oracle(ids + expected))
    drafts = Drafts()
    assert reply(engine, ids, GREEDY, 60, drafts) == expected
    assert not set(speculator._sizes) & sizes_that_round_otherwise(engine, ids)
    if speculator._sizes:  # this processor computes the same bits
        assert drafts.n_accepted > 0
    else:
        assert drafts.n_drafted == 0
    engine.speculator = eager(lambda: Oracle(ids + expected), is_exact=False)
    drafts = Drafts()
    assert len(reply(engine, ids, GREEDY, 60, drafts)) == 60
    assert drafts.n_accepted > 0
    engine.close()


def test_it_is_tried_again_where_kernels_may_change(
    engine: GgufEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch trust in a batch that crosses into positions where nothing was compared."""
    ids = engine.tokenize(TEXT * 4, parse_special=False)[: 3 * KV_UNIT - 40]
    engine.speculator = None
    expected = reply(engine, ids, GREEDY, 80)
    engine.speculator = speculator = eager(lambda: Oracle(ids + expected))
    fed: list[tuple[int, int]] = []
    feed = engine._feed

    def watch(chunk: Sequence[int], *, all_logits: bool) -> None:
        fed.append((engine._n_filled, len(chunk)))
        feed(chunk, all_logits=all_logits)

    monkeypatch.setattr(engine, "_feed", watch)
    assert reply(engine, ids, GREEDY, 80) == expected
    batches = [(start, n) for start, n in fed if n in SIZES]
    assert batches
    assert all(start // KV_UNIT == (start + n - 1) // KV_UNIT for start, n in batches)
    assert {unit for _, unit in speculator._agreed} == {2, 3}


def test_what_is_put_into_a_reply_and_replies_that_take_turns(engine: GgufEngine) -> None:
    """Would catch proposals that outlive what they were made for."""
    first = engine.tokenize(TEXT, parse_special=False)
    second = engine.tokenize("Another text, and another. " * 9, parse_special=False)
    hint = tuple(engine.tokenize("Wait, mind 34.", parse_special=False))

    drafts = Drafts()

    def steered() -> list[int]:
        stream = engine.generate(
            first, sampling=HOT, seed=1, max_tokens=120, stop_ids=(), drafts=drafts
        )
        ids = [next(stream)]
        while len(ids) < 60:
            ids.append(stream.send(Intervention(hint) if len(ids) in (5, 6, 31) else None))
        stream.close()
        return ids

    def in_turns(*counts: Drafts) -> list[list[int]]:
        streams = [
            engine.generate(
                ids, sampling=GREEDY, seed=1, max_tokens=24, stop_ids=(), drafts=counted
            )
            for ids, counted in zip((first, second), counts, strict=True)
        ]
        turns = list(zip(*streams, strict=True))
        return [list(ids) for ids in zip(*turns, strict=True)]

    engine.speculator = None
    expected = steered(), in_turns(Drafts(), Drafts())
    known = [*first, *expected[0][:5], *hint, expected[0][5], *hint, *expected[0][6:]]
    engine.speculator = eager(lambda: Oracle(known))
    assert steered() == expected[0]
    assert drafts.n_accepted > 5
    engine.speculator = eager(lambda: Oracle(first + expected[1][0]))
    assert in_turns(Drafts(), Drafts()) == expected[1]


def test_ngrams_are_found_where_they_were_last() -> None:
    drafter = NgramDrafter()
    sequence = [1, 2, 3, 7, 8, 1, 2, 3, 9, 9, 5, 1, 2, 3]
    assert drafter.propose(sequence[:3], 4) == []
    assert drafter.propose(sequence[:8], 4) == [7, 8, 1, 2]
    assert drafter.propose(sequence, 4) == [9, 9, 5, 1]
    assert NgramDrafter().propose([4, 6] * 4, 5) == [4, 6, 4, 6, 4]


def paced(*, n_right: int, batch_s: float, draft_s: float = 0.0) -> int:
    """The size that is chosen after batches of 8 that brought so many and took so long."""
    pace = Pace()
    for _ in range(40):
        pace.took(1, 0.010)
        pace.took(8, batch_s)
        pace.brought(n_right, ended=n_right < 7)
        if draft_s:
            pace.drafted(7, 7 * draft_s)
    return pace.best([8])


def test_it_is_off_while_it_does_not_pay() -> None:
    """Would catch a choice by hope instead of measured seconds."""
    assert Pace().best(SIZES) == 1, "nothing is known yet"
    assert paced(n_right=7, batch_s=0.020) == 8
    assert paced(n_right=7, batch_s=0.079) == 1  # 8 ids in the time of 7.9
    assert paced(n_right=1, batch_s=0.020) == 1  # 2 ids in the time of 2
    assert paced(n_right=1, batch_s=0.012) == 8
    assert paced(n_right=7, batch_s=0.020, draft_s=0.009) == 1  # the draft is nearly as slow
    assert paced(n_right=7, batch_s=0.020, draft_s=0.001) == 8


def test_nothing_is_read_in_vain(engine: GgufEngine) -> None:
    """Would catch batches that are read to find out what watching would have told."""
    ids = engine.tokenize(TEXT, parse_special=False)
    engine.speculator = None
    expected = reply(engine, ids, GREEDY, 60)
    wrong = [t + 1 for t in ids + expected]
    engine.speculator = speculator = Speculator(lambda: Oracle(wrong), is_exact=True)
    drafts = Drafts()
    assert reply(engine, ids, GREEDY, 60, drafts) == expected
    assert drafts == Drafts(0, 0)
    assert not speculator._agreed


def test_a_draft_model_proposes(q8_gguf: Path, bf16_gguf: Path) -> None:
    """Would catch a draft that loses its place: it is nearly the same model, and nearly right."""
    settings = EngineSettings(2048, 1, draft=str(bf16_gguf))
    engine = GgufEngine(q8_gguf, read_header(q8_gguf), settings)
    ids = engine.tokenize(TEXT, parse_special=False)
    speculator, engine.speculator = engine.speculator, None
    assert speculator is not None
    expected = reply(engine, ids, GREEDY)
    engine.speculator = speculator
    speculator.pace.least_speedup = 0.0
    drafts = Drafts()
    assert reply(engine, ids, GREEDY, drafts=drafts) == expected
    assert drafts.n_accepted > 0.7 * drafts.n_drafted > 50
    for sampling in (Sampling(), HOT):
        engine.speculator = None
        expected = reply(engine, ids, sampling)
        engine.speculator = speculator
        assert reply(engine, ids, sampling) == expected
    long = engine.tokenize(TEXT * 8, parse_special=False)[:1800]
    engine.speculator = None
    expected = reply(engine, long, GREEDY, 20)
    engine.speculator = speculator
    assert reply(engine, long, GREEDY, 20) == expected
    engine.close()


def test_a_draft_without_the_tags_spells_them(tmp_path: Path) -> None:
    """Would catch an id that the draft lacks, as Qwen2.5 lacks those of thoughts."""
    paths = []
    for name, added in (("target", (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)), ("d", SPECIAL_TOKENS)):
        folder = write_checkpoint(tmp_path / name, config={"num_hidden_layers": 1})
        write_tokenizer(folder, added=added)
        paths.append(tmp_path / f"{name}.gguf")
        with Checkpoint.open(folder) as checkpoint:
            export_gguf(checkpoint, "Q8_0", paths[-1], threads=1)
    settings = EngineSettings(512, 1, draft=str(paths[1]))
    with closing(GgufEngine(paths[0], read_header(paths[0]), settings)) as engine:
        draft, speculator = engine._draft, engine.speculator
        assert draft is not None
        assert speculator is not None
        (tag,) = engine.tokenize("</think>", parse_special=False)
        drafter = speculator._make_drafter()
        assert isinstance(drafter, DraftDrafter)
        ids = engine.tokenize("So it is.\n</think>\n\nYes.", parse_special=False)
        assert tag in ids
        drafter.propose(ids, 3)
        spelled = b"".join(map(draft.token_bytes, drafter._spelled))
        assert spelled.decode() == "So it is.\n</think>\n\nYes."
        assert len(drafter._spelled) > len(ids)
        engine.speculator = None
        expected = reply(engine, ids, GREEDY, 40)
        engine.speculator = speculator
        speculator.pace.least_speedup = 0.0
        assert reply(engine, ids, GREEDY, 40) == expected


def test_a_draft_must_speak_the_same_language(tmp_path: Path) -> None:
    """Would catch ids that mean something else to the two models."""

    def vocabulary(tokens: Sequence[str], types: Sequence[int] | None = None) -> dict[str, Any]:
        fields: dict[str, Any] = {"tokenizer.ggml.tokens": list(tokens)}
        return fields | ({"tokenizer.ggml.token_type": np.array(types)} if types else {})

    target = vocabulary(["a", "b", "c", "<think>", "[PAD4]"], [1, 1, 1, 4, 5])
    path = tmp_path / "draft.gguf"
    assert check_vocabulary(path, vocabulary("abc"), target) == {0, 1, 2}
    padded = vocabulary(["a", "b", "c", "[PAD3]"], [1, 1, 1, 5])
    assert check_vocabulary(path, padded, target) == {0, 1, 2}
    with pytest.raises(UsageError, match=r"draft.gguf: its token 1 is 'x' and the model's is 'b';"):
        check_vocabulary(path, vocabulary("axc"), target)
    with pytest.raises(UsageError, match="3,000 tokens are not in both vocabularies, where 1,024"):
        check_vocabulary(path, vocabulary("a" * 1), vocabulary("a" * 3001))


class EagerEngine(IsolatedEngine):
    """One whose process always finds that speculation pays."""

    entry = "tests.qwq_local.test_speculation:serve_eagerly"


def serve_eagerly(channel: Channel) -> None:
    calls = open_engine(channel)
    assert calls is not None
    calls.engine.speculator.pace.least_speedup = 0.0
    while True:
        request = channel.receive()
        channel.send(*calls.answer(request), number=request.number)


def test_a_reply_tells_how_much_was_proposed(q8_gguf: Path) -> None:
    """Would catch counts that are lost on the way from the process."""
    engine = EagerEngine(q8_gguf, EngineSettings(512, 1, draft=str(q8_gguf)))
    description = describe_gguf(q8_gguf, read_header(q8_gguf))
    with QwQ(LocalModel(engine, description, q8_gguf)) as qwq:
        timings = qwq.session(sampling=GREEDY).ask("What is 12 + 34?", max_tokens=60).timings
        assert 10 < timings.n_accepted <= timings.n_drafted < 8 * timings.n_decoded
        timings = qwq.session(sampling=GREEDY).ask("What is 12 + 34?", max_tokens=1).timings
        assert (timings.n_drafted, timings.n_accepted) == (0, 0)
    with pytest.raises(UsageError, match="speculation: 'often' is unknown; use one of off, exact"):
        QwQ.open(q8_gguf, speculation="often")  # type: ignore[arg-type]
