"""Sessions on disk: the same conversation again, whole or not at all."""

import json
from collections import deque
from pathlib import Path

import pytest
import safetensors.torch

from convert.errors import OutputExistsError, QwqError, UsageError
from qwq_local import QwQ, Sampling
from qwq_local.local import LocalModel
from qwq_local.rope import plan_rope
from tests.fakes import FakeEngine, describe_fake
from tests.qwq_local.test_session import REPLY, TEMPLATE, TOOLS, model
from tests.qwq_local.test_warm import COUNTING

GREEDY = Sampling(temperature=0)


def test_a_session_goes_on_where_it_was(tmp_path: Path) -> None:
    """Would catch a setting or a message that is lost."""
    qwq, engine = model(REPLY, REPLY, REPLY)
    session = qwq.session(
        system="Be brief.", tools=TOOLS, sampling=Sampling(top_k=7), seed=3, overflow="drop_oldest"
    )
    session.ask("One?")
    path = tmp_path / "talk.session"
    session.save(path)
    loaded = qwq.load_session(path)
    assert loaded.messages == session.messages
    session.ask("Two?")
    loaded.ask("Two?")
    assert engine.prompts[-1] == engine.prompts[-2]
    assert engine.seeds[-1] == engine.seeds[-2]
    with pytest.raises(OutputExistsError):
        session.save(path)
    session.save(path, force=True)
    assert len(qwq.load_session(path).messages) == 5


def test_with_its_cache_the_next_turn_needs_no_prefill(bf16_gguf: Path, tmp_path: Path) -> None:
    """Would catch a cache that is of no use, or of another text."""
    path = tmp_path / "talk.session"
    form = f'root ::= "{COUNTING}"'
    with QwQ.open(bf16_gguf, context=2048, threads=1) as qwq:
        session = qwq.session(sampling=GREEDY, seed=1)
        session.ask("Count from 100.", reasoning_tokens=10, answer_format=form)
        session.save(path, cache=True)
        expected = session.ask("Go on.", max_tokens=20)
    with QwQ.open(bf16_gguf, context=2048, threads=1) as qwq:
        reply = qwq.load_session(path).ask("Go on.", max_tokens=20)
        assert reply.timings.n_cached > 200
        assert reply.timings.n_cached == expected.timings.n_cached
        assert (reply.reasoning, reply.answer) == (expected.reasoning, expected.answer)
        without = qwq.load_session(path, cache=False)
        assert len(without.messages) == 2
    with (
        QwQ.open(bf16_gguf, context=2048, threads=1, kv_type="q8_0") as other,
        pytest.raises(QwqError, match="refuses the saved kv_cache"),
    ):
        other.load_session(path)


def test_a_folders_cache_of_another_type_is_refused(folder_qwq: QwQ) -> None:
    """Would catch keys and values that are rounded without a word, or that others are added to."""
    engine = folder_qwq.engine
    ids = engine.tokenize("What is 12 + 34? " * 12, parse_special=False)
    deque(engine.prefill(ids), maxlen=0)
    state = engine.export_cache(ids)
    engine.import_cache(ids, state)
    assert engine.n_cached(ids) == int.from_bytes(state[:8], "little") > 60
    tensors = safetensors.torch.load(state[8:])
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    with pytest.raises(QwqError, match=r"holds torch.bfloat16 and .* in torch.float32; open"):
        engine.import_cache(ids, state[:8] + safetensors.torch.save(half))
    assert engine.n_cached(ids) == 0


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """Would catch half a conversation that passes for a whole one."""
    qwq, _ = model(REPLY)
    session = qwq.session()
    session.ask("One?")
    path = tmp_path / "talk.session"
    session.save(path, cache=True)
    data = path.read_bytes()
    qwq.load_session(path)
    wrong = [b"", b"{}", b"[]\n", data[:-1], data + b"x", data.replace(b"One?", b"Two?")]
    wrong += [data.replace(b'"format": 2', b'"format": 9'), b"\xff" + data, data[: len(data) // 2]]
    for damaged in wrong:
        path.write_bytes(damaged)
        with pytest.raises(QwqError, match=r"talk\.session: .*; "):
            qwq.load_session(path)
    path.unlink()
    with pytest.raises(QwqError, match="is no saved session"):
        qwq.load_session(path)


def test_it_is_bound_to_its_model(tmp_path: Path, bf16_gguf: Path, gguf_qwq: QwQ) -> None:
    qwq, _ = model(REPLY)
    session = qwq.session()
    session.ask("One?")
    path = tmp_path / "talk.session"
    session.save(path)
    with pytest.raises(QwqError, match=r"was saved with another model .*; open the model"):
        gguf_qwq.load_session(path)
    other = QwQ(LocalModel(FakeEngine(), describe_fake(TEMPLATE + " "), Path("fake")))
    with pytest.raises(QwqError, match="was saved with another template"):
        other.load_session(path)
    saved = json.loads(path.read_bytes().partition(b"\n")[0])
    assert set(saved["bound_to"]) == {"model", "template"}


@pytest.mark.parametrize("lengths", [(40_960, 131_072), (40_960, 4096), (4096, 40_960)])
def test_its_cache_is_bound_to_the_rope(tmp_path: Path, lengths: tuple[int, int]) -> None:
    """Would catch positions that were read at another scale, and are taken for these."""
    path = tmp_path / "talk.session"

    def opened(n_context: int, *replies: str) -> tuple[QwQ, FakeEngine]:
        engine = FakeEngine(*replies)
        engine.rope_plan = plan_rope("yarn", n_context)
        return QwQ(LocalModel(engine, describe_fake(TEMPLATE), Path("fake"))), engine

    qwq, _ = opened(lengths[0], REPLY)
    session = qwq.session()
    session.ask("One?")
    session.save(path, cache=True)
    same, engine = opened(lengths[0])
    same.load_session(path)
    assert engine.imported
    other, engine = opened(lengths[1])
    with pytest.raises(QwqError, match=r"its kv_cache was read with .*; open the model with"):
        other.load_session(path)
    assert not hasattr(engine, "imported")
    assert len(other.load_session(path, cache=False).messages) == 2


def test_nothing_is_saved_during_a_reply(tmp_path: Path) -> None:
    qwq, _ = model(REPLY)
    session = qwq.session()
    stream = session.send("?")
    next(stream)
    with pytest.raises(UsageError, match="a reply is being made"):
        session.save(tmp_path / "talk.session")
    stream.close()
