"""The memory plan: what llama.cpp takes, what fits, and what would."""

import json
import logging
import re
from pathlib import Path

import pytest

from convert.errors import QwqError
from convert.gguf_header import read_header
from qwq_local import QwQ
from qwq_local.engine import EngineSettings, KvType
from qwq_local.engines import gguf
from qwq_local.engines.gguf import GgufEngine, plan_gguf
from qwq_local.memory_plan import Device, MemoryPlan, ModelSizes, plan_memory

GB = 10**9
QWQ = ModelSizes(19_900_000_000, 64, 2 * 8 * 128, 5120, 27648, 152064)  # as Q4_K_M


def plan(*devices: Device, context: int = 32_768, kv_type: KvType = "f16") -> MemoryPlan:
    return plan_memory(QWQ, devices, context=context, kv_type=kv_type, batch=512, n_logits_rows=192)


def test_qwq_on_a_processor() -> None:
    """Would catch a kv_cache off by a factor: 8 GiB in f16, 4.25 GiB in q8_0."""
    memory = Device("memory", False, 32 * GB)
    (share,) = plan(memory).shares
    assert share.weights_nbytes == 19_900_000_000
    assert share.kv_nbytes == 8 << 30
    assert plan(memory, kv_type="q8_0").shares[0].kv_nbytes == round(4.25 * (1 << 30))
    assert 0.1 * GB < share.compute_nbytes < 0.5 * GB
    assert plan(memory).fits
    assert not plan(Device("memory", False, 28 * GB)).fits


def test_layers_go_to_the_gpu_as_far_as_it_holds_them() -> None:
    memory = Device("memory", False, 64 * GB)
    large, small, tiny = (Device("CUDA0", True, n * GB) for n in (40, 16, 1))
    assert plan(large, memory).n_gpu_layers == 65
    partly = plan(small, memory)
    assert 0 < partly.n_gpu_layers < 65
    assert sum(s.weights_nbytes for s in partly.shares) == pytest.approx(QWQ.weights_nbytes, abs=9)
    assert partly.fits
    assert plan(tiny, memory).n_gpu_layers == 0
    assert plan(small, Device("CUDA1", True, 20 * GB), memory).n_gpu_layers == 65


@pytest.mark.parametrize(("context", "kv_type"), [(2048, "f16"), (16_384, "q8_0")])
def test_llama_takes_what_was_planned(
    bf16_gguf: Path, caplog: pytest.LogCaptureFixture, context: int, kv_type: KvType
) -> None:
    """Would catch an estimate that llama.cpp exceeds; its own log says what it takes."""
    settings = EngineSettings(context, 1, "native", kv_type)
    with caplog.at_level(logging.DEBUG, logger="qwq_local"):
        engine = GgufEngine(bf16_gguf, read_header(bf16_gguf), settings)
    engine.close()
    (share,) = engine.memory_plan.shares
    kv, compute = (
        float(re.findall(rf"{name} buffer size = +([\d.]+) MiB", caplog.text)[-1]) * (1 << 20)
        for name in ("KV", "compute")
    )
    assert share.kv_nbytes == pytest.approx(kv, rel=0.01)
    assert 0.7 * share.compute_nbytes < compute <= share.compute_nbytes


def test_what_does_not_fit_is_refused_with_what_would(
    bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch an allocation that takes the machine down."""
    free = Device("memory", False, 60_000_000)
    monkeypatch.setattr(gguf, "find_devices", lambda llama: (free,))
    with pytest.raises(QwqError, match=r"takes .* of memory, where .* free; --context 16384 --kv"):
        QwQ.open(bf16_gguf, context=32_768, isolated=False)
    free = Device("memory", False, 60_000)
    with pytest.raises(QwqError, match="choose a smaller type of file"):
        QwQ.open(bf16_gguf, context=32_768, isolated=False)


def test_it_is_shown_without_loading(bf16_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from qwq_local.cli import app

    result = CliRunner().invoke(app, ["plan", str(bf16_gguf), "--context", "4096", "--json"])
    plans = json.loads(result.stdout)
    assert [p["kv_type"] for p in plans] == ["f16", "q8_0"]
    assert all(p["context"] == 4096 and p["fits"] for p in plans)
    result = CliRunner().invoke(app, ["plan", str(bf16_gguf), "--context", "4096"])
    assert "4,096 tokens, kv_cache in f16, batches of 512, 0 layers on GPUs: fits" in result.stdout
    settings = EngineSettings(4096)
    expected = plan_gguf(bf16_gguf, read_header(bf16_gguf), settings)
    assert plans[0]["shares"][0]["kv_nbytes"] == expected.shares[0].kv_nbytes
