"""`qwq convert gguf --rounding gptq`: what reaches the file, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import convert
from convert.calibrate import open_calibration
from convert.calibrate_cli import app as calibrate_app
from convert.checkpoint import Checkpoint
from convert.cli import app
from convert.encode import QuantType, encode_rows
from convert.errors import QwqError, UsageError
from convert.gguf_header import read_header
from convert.imatrix import read_imatrix
from convert.rounding import GptqRounding
from tests.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, object] = {"num_hidden_layers": 1}
    return write_checkpoint(tmp_path_factory.mktemp("rounding") / "model", config=config)


@pytest.fixture(scope="module")
def calibration(source: Path) -> Path:
    folder = source.parent / "calibration"
    text = Path(convert.__file__).parent / "data" / "calibration.jsonl"
    arguments = ("-o", folder, "--text", text, "--tokens", 3000, "--hessian-tokens", 2500)
    CliRunner().invoke(
        calibrate_app,
        [*map(str, (source, *arguments)), "--hessians", "--device", "cpu", "-q"],
        catch_exceptions=False,
    )
    return folder


def gguf(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["gguf", *map(str, arguments)], catch_exceptions=False)


def test_every_output_holds_the_rounded_rows(
    source: Path, calibration: Path, tmp_path: Path
) -> None:
    """Catches rows at another place, and matrices that fell back to plain encoding in silence."""
    options = ("--rounding", "gptq", "--calibration", calibration, "--device", "cpu")
    types = ("--type", "Q4_K_M", "--type", "Q2_K")
    run = gguf(source, "-o", tmp_path, *types, *options, "--threads", "2")
    assert "rounded with their Hessians" in run.stderr
    assert "GPTQ rounding: about" in run.stderr
    imatrix = read_imatrix(calibration / "imatrix.gguf")
    with Checkpoint.open(source) as checkpoint:
        opened = open_calibration(calibration, checkpoint)
        for name in ("model-Q4_K_M.gguf", "model-Q2_K.gguf"):
            header = read_header(tmp_path / name)
            assert "gptq" in str(header.metadata["qwq.rounding"])
            assert opened.calibration_sha256 in str(header.metadata["qwq.rounding"])
            stored = (tmp_path / name).read_bytes()
            for linear, gguf_name in (
                ("self_attn.v_proj", "attn_v"),
                ("mlp.gate_proj", "ffn_gate"),
                ("mlp.down_proj", "ffn_down"),
            ):
                full_name = f"model.layers.0.{linear}.weight"
                weight = checkpoint.read(full_name)
                tensor = header.tensors[f"blk.0.{gguf_name}.weight"]
                rounding = GptqRounding(
                    checkpoint, opened, {full_name: frozenset({tensor.quant_type})}
                )
                expected = rounding.rows(full_name, tensor.quant_type, 0, len(weight))
                assert expected is not None
                found = stored[tensor.offset : tensor.offset + tensor.nbytes]
                assert found == expected.tobytes(), (name, linear)
                plain = encode_rows(
                    weight,
                    tensor.quant_type,
                    importance=imatrix.importance[tensor.name],
                )
                assert found != plain.tobytes()
            embeddings = header.tensors["token_embd.weight"]
            assert embeddings.quant_type in (QuantType.Q4_K, QuantType.Q2_K)


def test_a_calibration_is_an_imatrix_too(source: Path, calibration: Path, tmp_path: Path) -> None:
    """Catches --calibration that is taken and forgotten: the same bytes as with --imatrix."""
    given = ("--imatrix", calibration / "imatrix.gguf"), ("--calibration", calibration)
    for name, option in zip(("a.gguf", "b.gguf"), given, strict=True):
        gguf(source, "-o", tmp_path / name, "--type", "IQ4_XS", *option)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_what_cannot_be_meant_is_refused(source: Path, calibration: Path, tmp_path: Path) -> None:
    """Catches plain rounding where GPTQ's was asked for, and one imatrix given for another."""
    out = ("-o", tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="needs Hessians"):
        gguf(source, *out, "--rounding", "gptq")
    with pytest.raises(UsageError, match="neither nearest nor gptq"):
        gguf(source, *out, "--rounding", "up")
    with pytest.raises(UsageError, match="brings its own"):
        gguf(source, *out, "--calibration", calibration, "--imatrix", tmp_path / "y")
    other = write_checkpoint(tmp_path / "other", config={"num_hidden_layers": 1}, seed=5)
    with pytest.raises(QwqError, match="calibrate this checkpoint"):
        gguf(other, *out, "--calibration", calibration, "--rounding", "gptq")
    assert not (tmp_path / "x.gguf").exists()


def test_interrupted_rounding_continues_to_the_same_bytes(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows of two different roundings in one matrix."""
    options = ("--rounding", "gptq", "--calibration", calibration, "--type", "Q3_K_M")
    gguf(source, "-o", tmp_path / "whole.gguf", *options)
    rows = GptqRounding.rows

    def stopping(
        rounding: GptqRounding, name: str, quant_type: QuantType, start: int, stop: int
    ) -> np.ndarray | None:  # type: ignore[type-arg]
        if "up_proj" in name:
            raise KeyboardInterrupt
        return rows(rounding, name, quant_type, start, stop)

    monkeypatch.setattr(GptqRounding, "rows", stopping)
    run = CliRunner().invoke(
        app, ["gguf", str(source), "-o", str(tmp_path / "x.gguf"), *map(str, options)]
    )
    assert run.exit_code == 130
    monkeypatch.setattr(GptqRounding, "rows", rows)
    gguf(source, "-o", tmp_path / "x.gguf", *options)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
