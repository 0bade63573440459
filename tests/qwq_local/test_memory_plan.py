"""The memory plan: what llama.cpp takes, what fits, and what would."""

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from convert.errors import QwqError
from convert.gguf_header import read_header
from qwq_local import QwQ, Sampling
from qwq_local.engine import EngineSettings, KvType
from qwq_local.engines import gguf
from qwq_local.engines.gguf import KV_TYPES, GgufEngine, plan_gguf
from qwq_local.memory_plan import (
    GPU_RESERVE_NBYTES,
    Device,
    MemoryPlan,
    ModelSizes,
    find_nvidia_gpus,
    plan_memory,
)

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
    assert 0.1 * GB < share.compute_nbytes < 0.6 * GB
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
    with caplog.at_level(logging.DEBUG, logger="qwq_local.llama"):
        engine = GgufEngine(bf16_gguf, read_header(bf16_gguf), settings)
    engine.close()
    (share,) = engine.memory_plan.shares
    kv, compute = (
        float(re.findall(rf"{name} buffer size = +([\d.]+) MiB", caplog.text)[-1]) * (1 << 20)
        for name in ("KV", "compute")
    )
    assert share.kv_nbytes == pytest.approx(kv, rel=0.01)
    handed_out = 2 * 4 * engine.n_logits_rows * engine.vocab_size
    assert 0.7 * (share.compute_nbytes - handed_out) < compute <= share.compute_nbytes - handed_out


def choice(
    path: Path, monkeypatch: pytest.MonkeyPatch, *devices: Device, context: int | None = 32_768
) -> MemoryPlan:
    """What is chosen for nano-qwq, 9.8 MB of weights and 64 MiB of kv_cache in f16, 34 in q8_0."""
    monkeypatch.setattr(gguf, "find_devices", lambda llama: devices)
    return plan_gguf(path, read_header(path), EngineSettings(context))


def test_the_kv_cache_is_chosen_by_what_is_free(
    bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch q8_0 where f16 fits, f16 where it does not, and layers that leave the GPU."""

    def memory(mb: int) -> Device:
        return Device("memory", False, mb * 10**6)

    def gpu(mb: int) -> Device:
        return Device("CUDA0", True, GPU_RESERVE_NBYTES + mb * 10**6)

    sizes = [
        plan_gguf(bf16_gguf, read_header(bf16_gguf), EngineSettings(32_768, kv_type=kv_type))
        for kv_type in KV_TYPES
    ]
    f16, q8 = (plan.shares[0].nbytes / 10**6 for plan in sizes)
    roomy, tight = int(f16 + 2), int(q8 + 2)
    chosen = choice(bf16_gguf, monkeypatch, memory(roomy))
    assert (chosen.kv_type, chosen.batch, chosen.fits) == ("f16", 512, True)
    chosen = choice(bf16_gguf, monkeypatch, memory(tight))
    assert (chosen.kv_type, chosen.batch, chosen.fits) == ("q8_0", 512, True)
    chosen = choice(bf16_gguf, monkeypatch, memory(int(q8 - 5)))
    assert (chosen.kv_type, chosen.batch, chosen.fits) == ("q8_0", 256, True)
    assert not choice(bf16_gguf, monkeypatch, memory(10)).fits
    on_gpu = tight - 4  # the logits that are handed out take no memory there
    for mb, kv_type, is_on_gpu in (
        (roomy, "f16", True),
        (on_gpu, "q8_0", True),
        (20, "f16", False),
    ):
        chosen = choice(bf16_gguf, monkeypatch, gpu(mb), memory(9999))
        assert (chosen.kv_type, chosen.is_on_gpu) == (kv_type, is_on_gpu)


def test_a_long_context_in_q8_0_goes_before_a_short_one_in_f16(
    bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Memory", (), {"available": 120 * 10**6})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    plan = choice(bf16_gguf, monkeypatch, Device("memory", False, 120 * 10**6), context=None)
    assert (plan.kv_type, plan.context) == ("q8_0", 32_768)


def test_a_type_that_is_chosen_is_used(bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a plan that llama.cpp is not told of, and replies that depend on the batch."""
    header = read_header(bf16_gguf)
    (needed,) = plan_gguf(bf16_gguf, header, EngineSettings(16_384, kv_type="q8_0")).shares
    free = Device("memory", False, needed.nbytes - 10**6)
    monkeypatch.setattr(gguf, "find_devices", lambda llama: (free,))
    engine = GgufEngine(bf16_gguf, header, EngineSettings(16_384, 1))
    assert (engine.memory_plan.kv_type, engine.prefill_batch) == ("q8_0", 256)
    ids = engine.tokenize("What is 12 + 34? " * 60, parse_special=False)
    assert len(ids) > 256

    def greedy(engine: GgufEngine) -> list[int]:
        sampling = Sampling(temperature=0)
        return list(engine.generate(ids, sampling=sampling, seed=0, max_tokens=20, stop_ids=()))

    reply = greedy(engine)
    state = engine.export_cache(ids)
    engine.close()
    monkeypatch.undo()
    other = GgufEngine(bf16_gguf, header, EngineSettings(16_384, 1, kv_type="q8_0"))
    other.import_cache(ids, state)  # refuses another type
    assert other.prefill_batch == 512
    assert greedy(other) == reply
    other.close()


def test_a_gpu_that_is_not_used_is_named(
    bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a card of 24 GB that stays idle without a word; the driver is a stand-in."""
    from typer.testing import CliRunner

    from qwq_local.cli import app

    class Driver:
        NVMLError = RuntimeError
        nvmlInit = nvmlShutdown = staticmethod(lambda: None)  # noqa: N815
        nvmlDeviceGetCount = staticmethod(lambda: 1)  # noqa: N815
        nvmlDeviceGetHandleByIndex = staticmethod(int)  # noqa: N815
        nvmlDeviceGetName = staticmethod(lambda handle: "GeForce")  # noqa: N815
        nvmlDeviceGetMemoryInfo = staticmethod(lambda _: SimpleNamespace(free=24 * GB))  # noqa: N815

    class NoDriver(Driver):
        @staticmethod
        def nvmlInit() -> None:  # noqa: N802
            raise RuntimeError

    monkeypatch.setattr(gguf, "find_devices", lambda llama: (Device("memory", False, GB),))
    monkeypatch.setitem(sys.modules, "pynvml", Driver)
    result = CliRunner().invoke(app, ["plan", str(bf16_gguf)])
    assert "not used: GeForce, 24.000 GB free; where llama-cpp-python is" in result.stdout
    monkeypatch.setitem(sys.modules, "pynvml", NoDriver)
    assert find_nvidia_gpus() == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_nvidia_gpus() == ()


def test_what_does_not_fit_is_refused_with_what_would(
    bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch an allocation that takes the machine down."""
    free = Device("memory", False, 66_000_000)
    monkeypatch.setattr(gguf, "find_devices", lambda llama: (free,))
    advice = r"takes .* of memory, where .* free; --context 32768 --kv-type q8_0 would fit"
    with pytest.raises(QwqError, match=advice):
        QwQ.open(bf16_gguf, context=32_768, kv_type="f16", isolated=False)
    free = Device("memory", False, 44_000_000)
    with pytest.raises(QwqError, match="free; --context 16384 --kv-type q8_0 would fit"):
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
    assert [p["chosen"] for p in plans] == [True, False]
    result = CliRunner().invoke(app, ["plan", str(bf16_gguf), "--context", "4096"])
    assert "4,096 tokens, kv_cache in f16, batches of 512, 0 layers on GPUs: fits" in result.stdout
    settings = EngineSettings(4096)
    expected = plan_gguf(bf16_gguf, read_header(bf16_gguf), settings)
    assert plans[0]["shares"][0]["kv_nbytes"] == expected.shares[0].kv_nbytes
