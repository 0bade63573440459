"""`qwq convert gguf --rounding gptq`: what reaches the file, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from typer.testing import CliRunner, Result

import convert
from convert import rounding
from convert.calibrate import open_calibration
from convert.calibrate_cli import app as calibrate_app
from convert.checkpoint import Checkpoint
from convert.cli import app
from convert.encode import Float32Array, QuantType, encode_rows
from convert.errors import QwqError, UsageError
from convert.gguf_export import export_gguf
from convert.gguf_header import read_header
from convert.imatrix import read_imatrix
from convert.recipe import RECIPES
from convert.rounding import GptqRounding
from tests.oracles.llama_quantizer import quantize_with_llama_cpp, stored_tensors
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
    shown = " ".join(run.stderr.split())
    n_fitted = json.loads((calibration / "calibration.json").read_text())["n_fitted"]
    assert f"Hessians of {n_fitted:,} tokens, {n_fitted / 512:.1f} for each of up to 512" in shown
    assert "overfit" not in shown
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
                rounded = GptqRounding(
                    checkpoint, opened, {full_name: frozenset({tensor.quant_type})}
                )
                expected = rounded.rows(full_name, tensor.quant_type, 0, len(weight))
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


def test_too_few_tokens_for_rounding_are_said(source: Path, tmp_path: Path) -> None:
    """Catches codes fitted to fewer inputs than there are columns, and no word of it."""
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": f"{i} times {i} is {i * i}. "}) for i in range(11, 27))
    text.write_text("\n".join(lines))
    few = ("-o", str(tmp_path / "few"), "--text", str(text), "--hessians", "--device", "cpu", "-q")
    CliRunner().invoke(calibrate_app, (str(source), *few), catch_exceptions=False)
    options = ("--type", "Q2_K", "--rounding", "gptq", "--calibration", tmp_path / "few")
    run = gguf(source, "-o", tmp_path / "few.gguf", *options)
    n_fitted = json.loads((tmp_path / "few" / "calibration.json").read_text())["n_fitted"]
    assert 0 < n_fitted < 512
    shown = " ".join(run.stderr.split())
    assert f"Hessians of {n_fitted} tokens, {n_fitted / 512:.1f} for each of up to 512" in shown
    assert shown.count(f"{n_fitted} tokens for 512 columns are") == 2  # before work and after
    planned = gguf(source, "-o", tmp_path / "few.gguf", *options, "--dry-run")
    assert f"{n_fitted} tokens for 512 columns are" in " ".join(planned.stdout.split())
    planned = gguf(source, "-o", tmp_path / "few.gguf", *options, "--dry-run", "--json")
    of_rounding = json.loads(planned.stdout)["rounding"]
    assert f"{n_fitted} tokens for 512 columns are" in of_rounding["warning"]
    assert of_rounding["tokens_per_column"] == pytest.approx(n_fitted / 512, abs=0.005)
    assert of_rounding["memory_nbytes"] > 4 * 512 * 512


def test_the_best_damping_is_kept_and_refined(
    source: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the last encoding in place of the best, and a best one that is left as it was."""
    name, quant_type = "model.layers.0.mlp.down_proj.weight", QuantType.Q2_K
    with Checkpoint.open(source) as checkpoint:
        opened = open_calibration(calibration, checkpoint)

        def error(damps: tuple[float, ...], n_sweeps: int) -> float:
            monkeypatch.setattr(rounding, "DAMPS", damps)
            monkeypatch.setattr(rounding, "N_SWEEPS", n_sweeps)
            rounded = GptqRounding(checkpoint, opened, {name: frozenset({quant_type})})
            rounded.rows(name, quant_type, 0, 1)
            choice = rounded.choice(name, quant_type)
            assert choice is not None
            return choice.relative_error

        alone = [error((damp,), 0) for damp in (0.1, 1e4)]
        best = min(*alone, 1.0)
        assert alone[0] < 1
        assert error((0.1, 1e4), 0) == pytest.approx(best)
        assert error((1e4, 0.1), 0) == pytest.approx(best)
        assert error((0.1,), 3) < 0.99 * alone[0]


def test_a_calibration_is_an_imatrix_too(source: Path, calibration: Path, tmp_path: Path) -> None:
    """Catches --calibration that is taken and forgotten: the same bytes as with --imatrix."""
    given = ("--imatrix", calibration / "imatrix.gguf"), ("--calibration", calibration)
    for name, option in zip(("a.gguf", "b.gguf"), given, strict=True):
        gguf(source, "-o", tmp_path / name, "--type", "IQ4_XS", *option)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_llama_cpp_makes_the_same_bytes_of_the_imatrix(
    source: Path, calibration: Path, tmp_path: Path
) -> None:
    """Both formats, read here by the gguf package and by hand, as llama.cpp's own programs do.

    libllama's quantizer is given importance in memory: its programs read the files. Catches sums
    written for means, a name that llama.cpp has another tensor by, and a count off by a factor.
    """
    with Checkpoint.open(source) as checkpoint:
        export_gguf(checkpoint, "BF16", tmp_path / "bf16.gguf")
    files = {"imatrix.gguf": read_modern, "imatrix.dat": read_legacy}
    for name, read in files.items():
        importance = read(calibration / name)
        assert len(importance) == 7
        for recipe in ("Q2_K_S", "Q4_K_M"):
            theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
            assert quantize_with_llama_cpp(
                tmp_path / "bf16.gguf", RECIPES[recipe], theirs, importance=importance
            )
            options = ("--type", recipe, "--imatrix", calibration / name, "--force")
            gguf(source, "-o", ours, *options)
            assert stored_tensors(ours) == stored_tensors(theirs), (name, recipe)


def read_modern(path: Path) -> dict[str, Float32Array]:
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): np.asarray(values / tensors[f"{name[:-8]}.counts"])
        for name, values in tensors.items()
        if name.endswith(".in_sum2")
    }


def read_legacy(path: Path) -> dict[str, Float32Array]:
    data, at = path.read_bytes(), 4
    importance: dict[str, Float32Array] = {}
    for _ in range(int.from_bytes(data[:4], "little")):
        length = int.from_bytes(data[at : at + 4], "little")
        name, at = data[at + 4 : at + 4 + length].decode(), at + 4 + length
        n_calls, n = np.frombuffer(data[at : at + 8], dtype="<i4").tolist()
        sums = np.frombuffer(data[at + 8 : at + 8 + 4 * n], dtype="<f4").astype(np.float32)
        importance[name], at = sums / np.float32(n_calls), at + 8 + 4 * n
    return importance


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
