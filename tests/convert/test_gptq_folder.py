"""GPTQ folders read back, and `qwq verify` on them: what is sound, and each way not to be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.gptq import GptqSettings, dequantize, quantize_matrix
from convert.gptq_export import export_gptq
from convert.gptq_folder import check_gptq, open_gptq
from convert.gptq_format import packed_arrays
from convert.passages import SMALL_VOCABULARY, built_in_passages
from convert.verify_cli import app
from tests import gptq_cases
from tests.synthetic import write_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, object] = {"num_hidden_layers": 1}
    return write_checkpoint(tmp_path_factory.mktemp("folder") / "source", config=config)


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    out = source.parent / "gptq"
    with Checkpoint.open(source) as checkpoint:
        export_gptq(
            checkpoint,
            out,
            settings=GptqSettings(clip_steps=0),
            calibration=built_in_passages(SMALL_VOCABULARY - 1),
            n_tokens=600,
        )
    return out


@pytest.mark.parametrize(
    "settings",
    [
        GptqSettings(bits=2, group_size=32),
        GptqSettings(bits=3, group_size=-1, symmetric=False, version=2),
        GptqSettings(bits=4, order="activations", symmetric=False),
        GptqSettings(bits=8, order="groups"),
    ],
)
def test_weights_are_what_was_solved(settings: GptqSettings, tmp_path: Path) -> None:
    """Catches bits, zeros or groups read otherwise than they are written."""
    from safetensors.numpy import save_file

    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=rng)
    inputs = torch.randn(512, 256, generator=rng)
    solution = quantize_matrix(weight, inputs.T @ inputs, settings)
    save_file(dict(packed_arrays("x.weight", solution, settings)), tmp_path / "x.safetensors")
    config = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[settings.version],
    }
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    opened = open_gptq(tmp_path)
    assert opened.linears == ["x.weight"]
    np.testing.assert_array_equal(opened.weight("x.weight"), dequantize(solution).numpy())


@pytest.mark.parametrize("name", gptq_cases.CASES)
def test_weights_are_what_llama_cpp_reads(name: str, tmp_path: Path) -> None:
    """Catches packing, zeros or groups that only our own reader and writer agree on."""
    opened = open_gptq(gptq_cases.write_case(name, tmp_path))
    found = {linear: gptq_cases.digest(opened.weight(linear)) for linear in opened.linears}
    assert found == json.loads(gptq_cases.GOLDEN.read_text(encoding="utf-8"))[name]


def test_a_sound_folder(source: Path, folder: Path) -> None:
    """Catches limits that honest quantization does not keep."""
    with Checkpoint.open(source) as checkpoint:
        checks = list(check_gptq(open_gptq(folder), checkpoint))
    assert len(checks) == 7
    assert not any(check.problem for check in checks)
    run = CliRunner().invoke(app, [str(folder), "--source", str(source)], catch_exceptions=False)
    assert "sound, 7 matrices of 4 bits" in run.stdout
    run = CliRunner().invoke(app, [str(folder), "--json"], catch_exceptions=False)
    assert json.loads(run.stdout) == {"sound": True, "bits": 4, "relative_errors": {}}


def _other_version(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    path.write_text(json.dumps(config))


def _change(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = next(folder.glob("model-00002-*"))
        tensors = load_file(path)
        name = NAME.replace("weight", part)
        tensors[name] = change(tensors[name])
        save_file(tensors, path)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_version, "other version's zeros"),
        (_change("qweight", lambda words: words.flip(0).contiguous()), r"up_proj.*keep within"),
        (_change("scales", lambda scales: scales * float("nan")), r"up_proj.*a scale is NaN"),
        (_change("g_idx", lambda groups: groups + 7), r"up_proj.*g_idx"),
        (_change("qzeros", lambda zeros: zeros[:, :-1].contiguous()), "do not fit together"),
        (lambda folder: next(folder.glob("model-00002-*")).unlink(), "which no shard holds"),
        (lambda folder: (folder / "config.json").write_text("{}"), None),
    ],
)
def test_damage_is_named(
    source: Path,
    folder: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str | None,
) -> None:
    """Catches a fault that passes; without config.json quantize_config.json still says it all."""
    shutil.copytree(folder, tmp_path / "gptq")
    damage(tmp_path / "gptq")
    arguments = [str(tmp_path / "gptq"), "--source", str(source)]
    if message is None:
        assert not CliRunner().invoke(app, arguments).exit_code
        return
    with pytest.raises(QwqError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_folders_that_are_none(source: Path, tmp_path: Path) -> None:
    """Catches an unquantized checkpoint, or an empty folder, called sound."""
    with pytest.raises(QwqError, match="no GPTQ config"):
        open_gptq(source)
    with pytest.raises(QwqError, match="no GPTQ config"):
        open_gptq(tmp_path)
    config = {"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    with pytest.raises(QwqError, match="marlin"):
        open_gptq(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(QwqError, match="no qweight"):
        open_gptq(tmp_path)
