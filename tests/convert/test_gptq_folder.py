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
from convert.gptq_check import check_gptq
from convert.gptq_export import export_gptq
from convert.gptq_folder import open_gptq
from convert.gptq_format import packed_arrays
from convert.passages import SMALL_VOCABULARY, built_in_passages
from convert.verify_cli import app
from tests import gptq_cases
from tests.synthetic import write_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"
ATTENTION = "model.layers.0.self_attn"


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
            settings=GptqSettings(other_damps=(), clip_steps=0),
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
    assert sum(check.bits == 4 for check in checks) == 7
    assert sum(check.bits is None for check in checks) == 8
    assert not any(check.problem for check in checks)
    assert "sound, 7 matrices of 4 bits; 8 other tensors" in verified(folder, source)
    run = CliRunner().invoke(app, [str(folder), "--json"], catch_exceptions=False)
    assert json.loads(run.stdout) == {"sound": True, "bits": 4, "relative_errors": {}}


def verified(folder: Path, source: Path) -> str:
    """What `qwq verify` says of a folder that is sound, notes first."""
    run = CliRunner().invoke(app, [str(folder), "--source", str(source)], catch_exceptions=False)
    assert run.exit_code == 0
    return run.stderr + run.stdout


def _config(**changes: object) -> Callable[[Path], None]:
    """Changes to the quantization_config."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))

    return edit


def _edit(
    shard: int, change: Callable[[dict[str, torch.Tensor]], object]
) -> Callable[[Path], None]:
    """A change to the tensors of a shard, which the index follows."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = next(folder.glob(f"model-{shard:05}-*"))
        tensors = load_file(path)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for name in tensors:
            del index["weight_map"][name]
        change(tensors)
        index["weight_map"] |= dict.fromkeys(tensors, path.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file(tensors, path)

    return edit


def _change(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """A change to one part of a matrix."""
    name = NAME.replace("weight", part)
    return _edit(2, lambda tensors: tensors.update({name: change(tensors[name])}))


def _without_a_linear(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[NAME.replace("weight", part)]


def _with_a_flipped_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"].view(torch.int16)[300, 7] ^= 1


def _with_an_infinity(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][1, 2] = torch.inf


def _with_a_stranger(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.ones(4)


def _only_quantize_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def _other_base(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 1000000.0', '"rope_theta": 10000.0'))


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"</think>"', '"</thought>"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_config(checkpoint_format="gptq_v2"), "other version's zeros"),
        (_change("qweight", lambda words: words.flip(0).contiguous()), r"up_proj.*keep within"),
        (_change("scales", lambda scales: scales * float("nan")), r"up_proj.*a scale is NaN"),
        (_change("g_idx", lambda groups: groups + 7), r"up_proj.*g_idx"),
        (_change("qzeros", lambda zeros: zeros[:, :-1].contiguous()), r"up_proj\.qzeros has shape"),
        (lambda folder: next(folder.glob("model-00002-*")).unlink(), "which no shard holds"),
        (_edit(2, _without_a_linear), r"up_proj\.weight is missing, of shape"),
        (
            _both(_only_quantize_config, _edit(2, _without_a_linear)),
            r"up_proj\.weight is missing, packed and unpacked; give",
        ),
        (
            _edit(1, lambda tensors: tensors["model.embed_tokens.weight"].zero_()),
            r"embed_tokens\.weight differs from its source in 81,920 of 81,920 numbers",
        ),
        (_edit(1, _with_a_flipped_bit), r"embed_tokens\.weight differs from .* in 1 of 81,920"),
        (
            _edit(2, lambda tensors: tensors[f"{ATTENTION}.q_proj.bias"].mul_(1.01)),
            r"q_proj\.bias differs from its source in \d+ of 256 numbers, and is not quantized",
        ),
        (_edit(3, _with_an_infinity), r"lm_head\.weight differs from its source in 1 of"),
        (
            _edit(3, lambda tensors: tensors.pop("model.norm.weight")),
            r"model\.norm\.weight is miss",
        ),
        (_edit(3, _with_a_stranger), r"layers\.1\.mlp\.up_proj\.bias has no source"),
        (_config(checkpoint_format="marlin"), r"config\.json: its format is 'marlin' in 'int32'"),
        (_config(quant_method="awq"), "is quantized by 'awq', not gptq"),
        (_other_base, r"config.json: rope_theta is 10000\.0 and 1000000\.0 by the checkpoint"),
        (_other_tokenizer, r"tokenizer\.ggml\.tokens differs from the checkpoint's in 1 of"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: the file is miss"),
    ],
)
def test_damage_is_named(
    source: Path, folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """Catches a fault that passes, in a matrix or in anything else of the folder."""
    shutil.copytree(folder, tmp_path / "gptq")
    damage(tmp_path / "gptq")
    with pytest.raises(QwqError, match=message):
        verified(tmp_path / "gptq", source)


def _in_float16(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            tensors[name] = tensor.half()


def _scales_in_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name] = tensors[name].bfloat16()


def _with_empty_biases(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.qweight")]:
        n_out = tensors[name].shape[1]
        tensors.setdefault(name.replace("qweight", "bias"), torch.zeros(n_out))


def _one_file(folder: Path) -> None:
    """As AutoGPTQ names it."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "gptq_model-4bit-128g.safetensors")


def _other_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("assistant", "helper"))


OTHER_TOOLS = {
    "no config.json": _only_quantize_config,
    "format null": _config(checkpoint_format=None, format=None),
    "float16": _both(*(_edit(shard, _in_float16) for shard in (1, 2, 3))),
    "bfloat16 scales": _edit(2, _scales_in_bfloat16),
    "empty biases": _edit(2, _with_empty_biases),
    "one file": _one_file,
    "another template": _other_template,
}


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_what_other_tools_make_is_sound(
    source: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    """Catches a folder refused, or a bare TypeError, for what its format leaves open."""
    shutil.copytree(folder, tmp_path / "gptq")
    OTHER_TOOLS[name](tmp_path / "gptq")
    said = verified(tmp_path / "gptq", source)
    assert ("note: tokenizer.chat_template" in said) == (name == "another template")


def test_matrices_of_other_bits(source: Path, folder: Path, tmp_path: Path) -> None:
    """Catches GPTQModel's `dynamic` left unread: bits, and how near they come, are a matrix's own.

    A matrix that `dynamic` leaves out is stored as it was.
    """
    out = shutil.copytree(folder, tmp_path / "gptq")
    settings = GptqSettings(bits=8, group_size=-1, clip_steps=0)
    with Checkpoint.open(source) as checkpoint:
        weight = torch.from_numpy(checkpoint.read(NAME))
        kept = torch.from_numpy(checkpoint.read(f"{ATTENTION}.o_proj.weight"))
    solution = quantize_matrix(weight, torch.eye(weight.shape[1]), settings)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name, values in packed_arrays(NAME, solution, settings):
            tensors[name] = torch.from_numpy(values)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{ATTENTION}.o_proj.{part}"]
        tensors[f"{ATTENTION}.o_proj.weight"] = kept.bfloat16()

    _edit(2, mix)(out)
    with pytest.raises(QwqError, match=r"up_proj\.qweight has shape"):
        open_gptq(out)
    _config(dynamic={r"+:.*up_proj": {"bits": 8, "group_size": -1}, r"-:.*o_proj": {}})(out)
    assert "sound, 6 matrices of 4 and 8 bits; 9 other tensors" in verified(out, source)
    np.testing.assert_array_equal(open_gptq(out).weight(NAME), dequantize(solution).numpy())
    _edit(2, lambda tensors: tensors[NAME.replace("weight", "scales")].mul_(1.05))(out)
    with pytest.raises(QwqError, match=r"up_proj.*differs .* and 8 bits keep within 2\.0%"):
        verified(out, source)


def test_tied_embeddings_may_be_stored_twice(tmp_path: Path) -> None:
    """Catches a head that is not the embeddings, or is refused where it is."""
    tied = {"num_hidden_layers": 1, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "source", config=tied)
    out = tmp_path / "gptq"
    with Checkpoint.open(source) as checkpoint:
        export_gptq(
            checkpoint,
            out,
            settings=GptqSettings(other_damps=(), clip_steps=0, n_sweeps=0),
            calibration=built_in_passages(SMALL_VOCABULARY - 1),
            n_tokens=300,
        )
        head = torch.from_numpy(checkpoint.read("model.embed_tokens.weight")).bfloat16()
    assert "7 other tensors" in verified(out, source)
    _edit(3, lambda tensors: tensors.update({"lm_head.weight": head}))(out)
    assert "8 other tensors" in verified(out, source)
    _edit(3, lambda tensors: tensors["lm_head.weight"].mul_(2))(out)
    with pytest.raises(QwqError, match=r"lm_head\.weight differs"):
        verified(out, source)


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
