"""`qwq convert gptq` as a user meets it; what the folder holds is tested with the export."""

import json
import re
import subprocess
import sys
from inspect import signature
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from convert import gptq_export
from convert.checkpoint import Checkpoint
from convert.cli import app
from convert.errors import OutputExistsError, QwqError, UsageError
from convert.estimate import estimate_calibration, estimate_gptq, estimate_rounding
from convert.gptq import GptqSettings
from convert.gptq_cli import _about, _bar, gptq_command
from convert.gptq_export import DEFAULT_N_TOKENS, gptq_batches
from convert.hessian import accumulate_hessian
from convert.passages import SMALL_VOCABULARY, built_in_passages
from convert.qwen2 import parse_config
from tests.synthetic import CONFIG

QWQ_32B = CONFIG | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}


def gptq(*arguments: str | int | Path) -> Result:
    """Run the command in this process; errors come out as they are, main makes lines of them."""
    return CliRunner().invoke(app, ["gptq", *map(str, arguments)], catch_exceptions=False)


def test_a_folder_is_written(small: Path, tmp_path: Path) -> None:
    """Catches a result that is not alone on stdout, and a plan or summary that is missing."""
    out = tmp_path / "out"
    run = gptq(small, "-o", out, "--tokens", 300)
    assert run.stdout == f"{out}\n"
    assert "bits per weight" in run.stderr
    assert "beside torch's own; time: about" in run.stderr
    assert "7 linears in" in run.stderr
    assert "damping, chosen on" in run.stderr
    meta = json.loads((out / "quantize_config.json").read_text())["meta"]
    assert meta["calibration_tokens"] == 300
    n_fitted = 300 - meta["held_out_tokens"]
    shown = " ".join(run.stderr.split())
    warning = f"{n_fitted} tokens for 512 columns are {n_fitted / 512:.1f} for each and fewer than"
    assert shown.index(warning) < shown.index("beside torch's own") < shown.rindex(warning)
    assert f"{n_fitted} tokens, {n_fitted / 512:.1f} for each of up to 512 columns, judged" in shown
    assert f"{n_fitted} tokens, {n_fitted / 512:.1f} for each of up to 512 columns (set" in shown


def test_the_plan_counts_the_tokens_that_there_are(small: Path, tmp_path: Path) -> None:
    """Catches an estimate for --tokens where the text holds fewer, and a file that is left out."""
    (tmp_path / "one.txt").write_text("What the first file says. " * 10)
    (tmp_path / "two.txt").write_text("What the second says. " * 4)
    texts = ("--text", tmp_path / "one.txt", "--text", tmp_path / "two.txt")
    shown = gptq(small, "-o", tmp_path / "out", *texts, "--dry-run").stdout
    counted = re.search(r"fitted to (\d+) tokens.* judged by (\d+) held out", shown)
    assert counted is not None
    gptq(small, "-o", tmp_path / "out", *texts)
    meta = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["meta"]
    assert int(counted[2]) == meta["held_out_tokens"] > 0
    assert sum(map(int, counted.groups())) == meta["calibration_tokens"] < 400


def test_memory_is_that_of_the_device(small: Path) -> None:
    """Catches the processor's time and memory printed as a GPU's."""
    settings = GptqSettings()
    with Checkpoint.open(small) as checkpoint:
        batches = gptq_batches(
            checkpoint, built_in_passages(SMALL_VOCABULARY - 1), settings, n_tokens=300
        )
        here = _about(checkpoint, settings, batches, device="cpu")
        there = _about(checkpoint, settings, batches, device="cuda:0")
    assert re.fullmatch(r"memory: \S+ MB beside torch's own; time: about .+ as it is now", here)
    assert re.fullmatch(r"memory: \S+ MB on cuda:0 and \S+ MB on the host, .+ own", there)


def test_the_bar_shows_layer_and_time_left() -> None:
    """Catches a bar without the layer, and one that forgets its pace while a linear takes minutes.

    Begun with 21 of 64 layers done: three linears in 300 s leave 298 of 100 s each.
    """
    clock = [0.0]
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=120, get_time=lambda: clock[0])
    with _bar(console, 64) as show:
        for done, time_s in ((147, 0.0), (148, 100.0), (149, 200.0), (150, 300.0)):
            clock[0] = time_s
            show(done, 448)
    assert "layer 22 of 64, linear" in shown.getvalue()
    assert "150/448" in shown.getvalue()
    assert "8:16:40" in shown.getvalue()


def test_the_command_and_the_library_agree_on_defaults() -> None:
    """Catches `qwq convert gptq` and `make quantize` fitted to different amounts of text."""
    assert signature(gptq_command).parameters["tokens"].default == DEFAULT_N_TOKENS
    assert len(GptqSettings().damps) == 3


def test_json_and_quiet(small: Path, tmp_path: Path) -> None:
    """Catches talk on either stream that a program reading the result would trip over."""
    out = tmp_path / "out"
    run = gptq(small, "-o", out, "--tokens", 300, "--bits", 3, "--group-size", 64, "--json", "-q")
    assert run.stderr == ""
    document = json.loads(run.stdout)
    assert document["path"] == str(out)
    assert document["n_calibration_tokens"] == 300
    assert 0 < document["n_held_out"] < 300
    assert len(document["damp"]) == 7
    config = json.loads((out / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"]) == (3, 64)


def test_what_libraries_say_as_they_load_is_left_out(small: Path, tmp_path: Path) -> None:
    """Catches warnings of packages that transformers imports, which show once in a process."""
    program = [sys.executable, "-c", "from qwq_local.cli import main; main()"]
    command = ["convert", "gptq", f"{small}", "-o", f"{tmp_path / 'out'}", "--tokens", "300", "-q"]
    run = subprocess.run([*program, *command], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (f"{tmp_path / 'out'}\n", "")


def test_damping_that_had_to_rise_is_said(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a Hessian that is not positive definite and passes in silence.

    The inputs' own is singular, more columns than tokens; rounding as coarse as some devices' is
    put in by hand, and takes so much from it that no damping short of 1 does.
    """

    def coarsely(hessian: torch.Tensor, inputs: torch.Tensor, n_seen: int) -> int:
        n_total = accumulate_hessian(hessian, inputs, n_seen)
        hessian.diagonal().sub_(0.47 * hessian.diagonal().mean())
        return n_total

    monkeypatch.setattr(gptq_export, "accumulate_hessian", coarsely)
    run = gptq(small, "-o", tmp_path / "out", "--tokens", 300, "--json")
    shown = " ".join(run.stderr.split())
    raised = json.loads(run.stdout)["raised_damp"]
    assert len(raised) == 7
    for linear, damp in raised.items():
        assert damp == 1
        assert f"{linear}: its Hessian needed damping 1; more tokens may help" in shown


def test_every_option_reaches_the_folder(small: Path, tmp_path: Path) -> None:
    """Catches an option that is taken and forgotten."""
    out = tmp_path / "out"
    options = ("--group-size", -1, "--asymmetric", "--order", "activations", "--format-version", 2)
    gptq(small, "-o", out, "--tokens", 300, *options, "--device", "cpu", "-q")
    config = json.loads((out / "quantize_config.json").read_text())
    assert (config["group_size"], config["sym"], config["desc_act"]) == (-1, False, True)
    assert config["checkpoint_format"] == "gptq_v2"


def test_a_dry_run_writes_nothing(small: Path, tmp_path: Path) -> None:
    """Catches a dry run that works, and one that shows another size than is written."""
    out = tmp_path / "out"
    assert "about" in gptq(small, "-o", out, "--dry-run").stdout
    document = json.loads(gptq(small, "-o", out, "--dry-run", "--json").stdout)
    assert not out.exists()
    gptq(small, "-o", out, "--tokens", 300)
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert document["nbytes"] < written < document["nbytes"] + 10_000


def test_mistakes_are_errors_before_work(small: Path, tmp_path: Path) -> None:
    """Catches a mistake found only after hours."""
    with pytest.raises(UsageError, match="bits: 5"):
        gptq(small, "-o", tmp_path / "out", "--bits", 5)
    with pytest.raises(QwqError, match=r"nowhere\.jsonl: no such file"):
        gptq(small, "-o", tmp_path / "out", "--text", tmp_path / "nowhere.jsonl")
    with pytest.raises(QwqError, match=r"is a folder, not text; give a file of text"):
        gptq(small, "-o", tmp_path / "out", "--text", tmp_path)
    with pytest.raises(OutputExistsError, match="--force"):
        gptq(small, "-o", small)


HESSIAN = 64 * (27648 * (27648 + 2048) + 3 * 5120 * (5120 + 2048))
"""Operations for a token: half of each matrix, and of the squares on its diagonal all."""


def test_the_estimate_of_qwq_32b() -> None:
    """Catches sizes mixed up, a pass or a matrix forgotten: the same sums, written out.

    And more than 12 GiB for what `qwq convert gptq` does unless told otherwise.
    """
    model = parse_config(QWQ_32B, "QwQ-32B")
    estimate = estimate_gptq(model, GptqSettings(), 16_384)
    forward = 2 * 16_384 * 31.0e9
    hessians = 16_384 * HESSIAN
    # Three dampings on 1,024 rows of each linear, then all rows; k and v have no more.
    factors = 64 * (4 * 27648**3 + (4 + 4 + 5) * 5120**3) / 3
    sampled = 64 * 3 * 1024 * (6 * 5120**2 + 27648**2)
    updates = 64 * (5120**2 * (5120 + 5120 + 2 * 27648) + 27648**2 * 5120)
    sweep = 64 * 3 * (5120**2 * (5120 + 2048 + 5120 + 2 * 27648) + 27648**2 * 5120)
    judging = 64 * 4 * 2 * 2048 * 1024 * (6 * 5120 + 27648)
    counted = forward + hessians + factors + sampled + updates + sweep + judging
    assert estimate.n_matrix == pytest.approx(counted, rel=0.02)
    assert 2 * 4 * 27648**2 < estimate.peak_nbytes < 12 << 30
    assert 4 * 480e6 < estimate.host_nbytes < 16 << 30


def test_the_estimate_of_calibrating_qwq_32b() -> None:
    """Catches Hessians of all tokens, a pass forgotten, and more than 8 GiB for 128 x 2048."""
    model = parse_config(QWQ_32B, "QwQ-32B")
    plain = estimate_calibration(model, n_tokens=262_144, n_fitted=0, n_held_out=0, n_sampled=0)
    assert plain.n_matrix == pytest.approx(2 * 262_144 * 31.2e9, rel=0.02)
    whole = estimate_calibration(
        model, n_tokens=262_144, n_fitted=14_336, n_held_out=2048, n_sampled=4096
    )
    hessians = 14_336 * HESSIAN
    back_and_forth = 2 * 4 * 4096 * 31.2e9
    assert whole.n_matrix - plain.n_matrix == pytest.approx(hessians + back_and_forth, rel=0.02)
    assert whole.peak_nbytes - plain.peak_nbytes > 4 * (27648**2 + 3 * 5120**2)
    assert whole.peak_nbytes < 8 << 30


def test_the_estimate_of_rounding_qwq_32b() -> None:
    """Catches a damping, a sweep, a type or the held-out inputs forgotten: the sums in full."""
    model = parse_config(QWQ_32B, "QwQ-32B")
    estimate = estimate_rounding(model, n_types=2, n_dampings=3, n_sweeps=4, n_held_out=2048)
    factors = 64 * 3 * (27648**3 + 3 * 5120**3) / 3
    updates = 64 * 6 * (5120**2 * (5120 + 2048 + 5120 + 2 * 27648) + 27648**2 * 5120)
    sweeps = 2 * (1 + 4) * 2 * updates / 6
    judging = 10 * 2 * 2048 * 31.2e9
    assert estimate.n_matrix == pytest.approx(factors + updates + sweeps + judging, rel=0.02)
    assert 2 * 4 * 27648**2 < estimate.peak_nbytes < 12 << 30
