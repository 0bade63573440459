"""Bytes and bits per weight from headers, for each kind of model, and damaged headers."""

import json
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.gguf_export import export_gguf, export_planned
from convert.gptq import GptqSettings
from convert.gptq_export import plan_gptq
from convert.plan import plan_file
from convert.recipe import find_recipe
from quant_eval.sizes import model_size
from tests.synthetic import write_checkpoint


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    entries, offset = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(offset))


def test_gguf_equals_its_plan(tmp_path: Path) -> None:
    """Catches a size that leaves out the embeddings or counts the header as weights."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    for name in ("BF16", "Q4_K_M"):
        with Checkpoint.open(folder) as checkpoint:
            made = export_gguf(checkpoint, name, tmp_path / f"{name}.gguf")
        size = model_size(made.path)
        assert size.nbytes == made.path.stat().st_size == made.nbytes
        assert size.n_weights == made.n_weights
        assert size.bits_per_weight == pytest.approx(made.bits_per_weight)


def test_a_split_model_is_all_its_parts(tmp_path: Path) -> None:
    """Catches the size of the first part taken for the model's."""
    folder = write_checkpoint(tmp_path / "checkpoint", config={"num_hidden_layers": 1})
    with Checkpoint.open(folder) as checkpoint:
        recipe = find_recipe("Q8_0")
        plans = [
            plan_file(checkpoint, recipe, tmp_path / "whole.gguf"),
            plan_file(checkpoint, recipe, tmp_path / "split.gguf", split_nbytes=300_000),
        ]
        whole, split = export_planned(checkpoint, plans, threads=1)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 1
    size = model_size(parts[0])
    assert size.nbytes == sum(part.stat().st_size for part in parts)
    assert size.n_weights == whole.n_weights == split.n_weights
    assert size.bits_per_weight == pytest.approx(model_size(whole.path).bits_per_weight)


def test_a_checkpoint_has_16_bits(tmp_path: Path) -> None:
    """Catches a folder whose tokenizer counts as weights."""
    assert model_size(write_checkpoint(tmp_path / "checkpoint")).bits_per_weight == 16.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weights_count_as_what_they_stand_for(tmp_path: Path, bits: int) -> None:
    """Catches int32 words counted as weights, and scales counted as weights of their own."""
    n_in, n_out, group = 256, 64, 128
    config = {"quantization_config": {"bits": bits}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    n_groups = n_in // group
    sizes = {
        "x.qweight": ("I32", [n_in * bits // 32, n_out], n_in * n_out * bits // 8),
        "x.qzeros": ("I32", [n_groups, n_out * bits // 32], n_groups * n_out * bits // 8),
        "x.scales": ("F16", [n_groups, n_out], n_groups * n_out * 2),
        "x.g_idx": ("I32", [n_in], n_in * 4),
        "norm.weight": ("BF16", [100], 200),
    }
    write_safetensors(tmp_path / "model.safetensors", sizes)
    size = model_size(tmp_path)
    assert size.n_weights == n_in * n_out + 100
    assert size.tensor_nbytes == sum(nbytes for _, _, nbytes in sizes.values())


def test_a_gptq_plan_agrees(tmp_path: Path) -> None:
    """Catches two counts of the same weights that differ."""
    with Checkpoint.open(write_checkpoint(tmp_path / "checkpoint")) as checkpoint:
        planned = plan_gptq(checkpoint, GptqSettings(bits=4))
    folder = tmp_path / "gptq"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    write_safetensors(
        folder / "model.safetensors",
        {t.name: (t.dtype, list(t.shape), t.nbytes) for t in planned.tensors},
    )
    assert model_size(folder).bits_per_weight == pytest.approx(planned.bits_per_weight)


def test_damaged_models_are_errors(tmp_path: Path) -> None:
    """Catches a crash, or a size of nothing, where there is no whole model."""
    with pytest.raises(QwqError, match="does not exist"):
        model_size(tmp_path / "none")
    with pytest.raises(QwqError, match=r"no config\.json"):
        model_size(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(QwqError, match="holds no weights"):
        model_size(tmp_path)
    shard = tmp_path / "model.safetensors"
    for data in (b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]"):
        shard.write_bytes(data)
        with pytest.raises(QwqError, match=r"model\.safetensors"):
            model_size(tmp_path)
    write_safetensors(shard, {"x.qweight": ("I32", [4, 4], 64)})
    with pytest.raises(QwqError, match="says no bits"):
        model_size(tmp_path)
