"""`qwq eval run`: what it measures unasked, and what its options bring into the reports."""

import json
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from quant_eval.options import BENCHMARK_MAX_TOKENS, UNLIMITED_S, settings_for
from quant_eval.pipeline import NANO_CHECKPOINT
from quant_eval.suite import SMOKE
from tests.quant_eval.test_pipeline import run


def test_a_smoke_run_with_tasks_stays_one() -> None:
    """Catches `--smoke --task x` that takes a day, and benchmarks cut in a full run."""
    tasks, needles = [Path("mathematics")], [8192]
    smoke = settings_for(None, tasks, needles, smoke=True)
    for limit in ("n_tokens", "n_problems", "task_seconds", "max_tokens"):
        assert getattr(smoke, limit) == getattr(SMOKE, limit)
    assert smoke.n_task_problems == 1
    assert smoke.needles == (8192,)
    assert settings_for(None, tasks, smoke=True, max_tokens=9).max_tokens == 9
    full = settings_for(None, tasks, needles)
    assert (full.max_tokens, full.task_seconds) == (BENCHMARK_MAX_TOKENS, UNLIMITED_S)
    assert full.n_task_problems is None


@pytest.mark.slow
def test_a_smoke_run_of_nano(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a smoke run that measures more than a little, and a floor that is not shown."""
    paths = {name: tmp_path / f"nano-{name}.gguf" for name in ("BF16", "Q2_K")}
    with Checkpoint.open(NANO_CHECKPOINT) as checkpoint:
        for name, path in paths.items():
            export_gguf(checkpoint, name, path, threads=2)
    out = tmp_path / "out"
    options = ("--reference", NANO_CHECKPOINT, "--smoke", "--task", "mathematics", "-o", out)
    command = ("eval", "run", paths["Q2_K"], *options, "--floor", paths["BF16"], "--json")
    assert run(monkeypatch, *command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["max_tokens"] == SMOKE.max_tokens
    assert report["benchmarks"] == {"mathematics": "built in"}
    (row,) = report["files"]  # the floor is no row of its own
    assert all(one["n"] + one["n_ungraded"] <= 1 for one in row["accuracy"].values())
    reply = row["divergence"]["reply"]
    assert reply["n_tokens"] < 1000
    assert reply["kl_median_nats"]["standard_error"] > 0
    assert row["floor"]["name"] == "nano-BF16.gguf"
    noise = row["floor"]["divergence"]["reply"]["kl_nats"]["value"]
    assert noise < reply["kl_nats"]["value"] / 100
    assert row["speed"]["tokens_per_s"]["n"] > 0
    page = (out / "report.html").read_text()
    assert "Noise of the path itself: in brackets, the same number of nano-BF16.gguf" in page
    assert "<dt>task mathematics</dt><dd>built in, at most 1 problem</dd>" in page
    refused = ("eval", "run", paths["BF16"], *options, "--floor", paths["Q2_K"])
    assert run(monkeypatch, *refused) == 2
    assert "bits per weight and the noise of the path shows" in capsys.readouterr().err
