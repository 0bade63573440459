"""The kv_cache of torch engines in buffers, and steps of fixed shape as a graph repeats them."""

import logging
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qwq_local import QwQ
from qwq_local.engines import buffers
from qwq_local.engines.buffers import FixedSteps, KvBuffers, Run
from qwq_local.engines.transformers import TransformersEngine, _quietly
from tests.qwq_local.test_engines import greedy, ids_of

N_TOKENS = 90


def engine_of(qwq: QwQ) -> TransformersEngine:
    assert isinstance(qwq.engine, TransformersEngine)
    return qwq.engine


def theirs(engine: TransformersEngine, ids: list[int], n: int) -> tuple[list[int], torch.Tensor]:
    """Greedy ids over transformers' own growing cache, and their logits, prefilled as ours."""
    model: Any = engine._open_model()
    cache = DynamicCache()
    reply: list[int] = []
    rows = []
    whole = (len(ids) - 1) // 64 * 64
    chunks = [ids[:whole], ids[whole:]] if whole else [ids]
    with torch.inference_mode():
        while len(reply) < n:
            for chunk in chunks:
                output = model(input_ids=torch.tensor([chunk]), past_key_values=cache)
            rows.append(output.logits[0, -1])
            reply.append(int(rows[-1].argmax()))
            chunks = [reply[-1:]]
    return reply, torch.stack(rows)


@pytest.mark.parametrize("name", ["folder_qwq", "gptq_qwq"])
def test_the_ids_are_those_of_a_growing_cache(name: str, request: pytest.FixtureRequest) -> None:
    """Would catch a position that is written elsewhere or seen though it is empty."""
    qwq = request.getfixturevalue(name)
    engine = engine_of(qwq)
    for ids in (ids_of(qwq), ids_of(qwq)[:5]):
        expected, _ = theirs(engine, ids, N_TOKENS)
        assert greedy(qwq, ids, N_TOKENS) == expected
        assert greedy(qwq, ids[:20], 3) == theirs(engine, ids[:20], 3)[0]  # over what is filled
        assert greedy(qwq, ids, N_TOKENS) == expected


def test_steps_of_fixed_shape_give_the_same_ids(
    folder_qwq: QwQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a mask that is off by one, and a step that is repeated for another length.

    Where the two best logits lie within a thousandth, rounding may choose the other.
    """
    engine = engine_of(folder_qwq)
    ids = ids_of(folder_qwq)
    expected, logits = theirs(engine, ids, N_TOKENS)
    second, first = logits.sort(dim=1).values[:, -2:].T
    clear = (first - second > 1e-3).tolist()
    n_clear = [*clear, False].index(False)
    assert n_clear > 20
    monkeypatch.setattr(buffers, "STEP_UNIT", 64)
    captured = []

    def capture(run: Run) -> Run:
        run()
        captured.append(engine._kv_cache.n_visible)
        return run

    steps = FixedSteps(engine._open_model(), engine._kv_cache, capture)
    monkeypatch.setattr(engine, "_steps", steps)
    reply = greedy(folder_qwq, ids, N_TOKENS)
    assert reply[:n_clear] == expected[:n_clear]
    assert len(captured) == len(steps._steps) >= 3
    assert captured[0] == engine._kv_cache.n_max  # in whose memory the others find room
    assert captured[1:] == sorted(captured[1:])
    assert greedy(folder_qwq, ids, N_TOKENS) == reply
    assert len(captured) == len(steps._steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_filled_is_zero(dtype: torch.dtype) -> None:
    """Would catch NaN of memory that was used before, which a mask does not keep out."""
    cache = KvBuffers(1, 8)
    torch.use_deterministic_algorithms(True)  # memory that is not set then holds NaN
    try:
        keys = torch.ones((1, 2, 3, 16), dtype=dtype)
        assert keys.new_empty((4, 4)).isnan().any()
        seen, _ = cache.update(keys, keys, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    layer: Any = cache.layers[0]
    for tensor in (layer.keys, layer.values):
        assert tensor.shape == (1, 2, 8, 16)
        assert tensor.dtype == dtype
        assert (tensor[:, :, :3] == 1).all()
        assert not tensor[:, :, 3:].any()
    assert seen.shape == keys.shape


@pytest.mark.parametrize("how", ["fails", "differs"])
def test_a_graph_that_is_wrong_is_not_used(
    folder_qwq: QwQ, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Would catch trust in a capture that no one looked at."""
    engine = engine_of(folder_qwq)
    ids = ids_of(folder_qwq)
    expected = greedy(folder_qwq, ids, 30)

    def capture(run: Run) -> Run:
        if how == "fails":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: run().roll(1)

    steps = FixedSteps(engine._open_model(), engine._kv_cache, capture)
    monkeypatch.setattr(engine, "_steps", steps)
    with caplog.at_level(logging.WARNING, logger="qwq_local"):
        assert greedy(folder_qwq, ids, 30) == expected
    reasons = {"fails": "not permitted when stream", "differs": "it gives other logits"}
    assert [r for r in caplog.messages if "not captured as a graph" in r and reasons[how] in r]
    assert len(caplog.messages) == 1


def test_loads_that_overlap_put_logging_back() -> None:
    """Would catch a log that stays silent for good: the second load found it silenced."""
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with _quietly():
            entered.set()
            left.wait()

    before = logging.root.manager.disable
    with _quietly():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(0.3)  # it must not, and has had the time
    left.set()
    thread.join()
    assert logging.root.manager.disable == before
