"""Several conversations on one kv_cache: each finds its own again, exactly, within a budget."""

from pathlib import Path

import numpy as np
import pytest

from convert.errors import QwqError
from qwq_local import QwQ, Sampling
from qwq_local.engines.loop import EngineLoop
from qwq_local.engines.stash import Stash, Stashed
from qwq_local.rope import Yarn
from tests.qwq_local.test_engines import greedy, ids_of, logits


def loop_of(qwq: QwQ) -> EngineLoop:
    assert isinstance(qwq.engine, EngineLoop)
    return qwq.engine


@pytest.mark.parametrize("name", ["gguf_qwq", "folder_qwq"])
def test_conversations_that_take_turns_find_their_own(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Would catch another's cache, one that is cut wrongly, and a prompt that is read twice."""
    qwq = request.getfixturevalue(name)
    engine = loop_of(qwq)
    first, second = ids_of(qwq, "One way. " * 80), ids_of(qwq, "Another way. " * 80)
    assert min(len(first), len(second)) > 320
    engine.stash.clear()
    expected = greedy(qwq, first, 12), greedy(qwq, second, 12)
    for _ in range(2):
        for ids, reply in zip((first, second), expected, strict=True):
            assert engine.n_cached(ids) >= 256
            assert engine.n_cached([*ids[:300], 1, 2, 3]) >= 256
            assert greedy(qwq, ids, 12) == reply
    scored = logits(qwq, first)
    engine.stash.clear()
    assert engine.n_cached(first) == 0
    np.testing.assert_array_equal(scored, logits(qwq, first))


def test_a_cache_moves_to_another_engine(gguf_qwq: QwQ, bf16_gguf: Path) -> None:
    """Would catch a state that is not what was saved; it is wrong in place rather than late."""
    ids = ids_of(gguf_qwq, "One way. " * 80)
    reply = greedy(gguf_qwq, ids, 12)
    state = gguf_qwq.engine.export_cache(ids)
    with QwQ.open(bf16_gguf, context=2048, threads=1) as other:
        other.engine.import_cache(ids, state)
        assert other.engine.n_cached(ids) == (len(ids) - 1) // 64 * 64
        assert greedy(other, ids, 12) == reply
        for wrong in (b"", b"x" * 7, (1 << 40).to_bytes(8, "little")):
            with pytest.raises(QwqError, match="damaged; load"):
                other.engine.import_cache(ids, wrong)
    with (
        QwQ.open(bf16_gguf, context=2048, threads=1, kv_type="q8_0") as other,
        pytest.raises(QwqError, match=r"refuses the saved kv_cache \(.*; load"),
    ):
        other.engine.import_cache(ids, state)


def test_the_least_recently_used_go_first() -> None:
    stash = Stash(25)
    entries = [Stashed((i, 1, 2), None, bytes(10)) for i in range(3)]
    stash.put(entries[0])
    stash.put(entries[1])
    stash.use(entries[0])
    stash.put(entries[2])
    assert stash.nbytes == 20
    assert stash.best([1, 1, 2, 3], None) == (0, entries[0])
    assert stash.best([0, 1, 9], None) == (2, entries[0])
    assert stash.best([0, 1, 9], Yarn(2.0)) == (0, None)
    longer = Stashed((0, 1, 2, 3), None, bytes(10))
    stash.put(longer)
    assert stash.best([0, 1, 2, 3], None) == (4, longer)
    assert stash.nbytes == 20
    stash.put(Stashed((5,), None, bytes(26)))
    assert stash.nbytes == 0


def test_sampling_is_not_touched(gguf_qwq: QwQ) -> None:
    """Would catch a stash that changes what a seed gives."""
    prompt = [{"role": "user", "content": "One way. " * 80}]
    other = [{"role": "user", "content": "Another way. " * 80}]

    def reply() -> tuple[str, str]:
        made = gguf_qwq.reply(prompt, sampling=Sampling(), seed=4, max_tokens=30).reply()
        return made.reasoning, made.answer

    first = reply()
    gguf_qwq.reply(other, seed=4, max_tokens=3).reply()
    assert reply() == first
