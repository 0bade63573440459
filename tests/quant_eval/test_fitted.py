"""`qwq quantize --fit`: from a checkpoint to a checked file that fits, in one command."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.calibrate import CalibrationSettings
from convert.calibration import PlainText
from convert.errors import OutputExistsError, QwqError, UsageError
from convert.gguf_header import read_header
from quant_eval import fitted
from quant_eval.cli import quantize_app


@pytest.mark.slow
def test_one_command_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that is larger than was asked for, and a calibration that is made twice.

    Or is taken for one of other text or settings.
    """
    settings = CalibrationSettings(n_tokens=1200, sensitivities=True, n_sensitivity_tokens=600)
    monkeypatch.setattr(fitted, "SETTINGS", settings)
    arguments = ("--fit", "547MB", "--context", "512", "--no-eval", "-o", str(tmp_path))
    run = CliRunner().invoke(quantize_app, [*arguments], catch_exceptions=False)
    path = tmp_path / "nano-qwq-fit-547MB-512-f16.gguf"
    assert run.stdout.split() == [str(path)]
    assert "stock mix that fits" in run.stderr
    tensors = read_header(path).tensors.values()
    assert sum(tensor.nbytes for tensor in tensors) < 547e6 - 536.8e6 - 6e6
    assert len({tensor.quant_type for tensor in tensors}) > 3
    made = (tmp_path / "calibration" / "sensitivities.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputExistsError, match="--force"):
        CliRunner().invoke(quantize_app, [*arguments], catch_exceptions=False)
    assert (tmp_path / "calibration" / "sensitivities.safetensors").stat().st_mtime_ns == made
    for name, other in (
        ("SETTINGS", replace(settings, n_tokens=900)),
        ("SETTINGS", replace(settings, n_sensitivity_tokens=300)),
        ("calibration_passages", lambda _: [PlainText("Other text. " * 4000)]),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(fitted, name, other)
            with pytest.raises(QwqError, match=r"1,200 tokens of set .+ would be taken now"):
                CliRunner().invoke(quantize_app, [*arguments, "--force"], catch_exceptions=False)
    with pytest.raises(UsageError, match="leave --type and --dry-run"):
        CliRunner().invoke(quantize_app, ["--fit", "1GB", "--dry-run"], catch_exceptions=False)
