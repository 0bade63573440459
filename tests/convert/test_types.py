"""Every type of llama.cpp's, with an imatrix and without: its choice of types, its very bytes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.encode import Float32Array, QuantType
from convert.errors import UsageError
from convert.gguf_export import export_planned
from convert.gguf_header import read_header
from convert.imatrix import Imatrix
from convert.plan import plan_file
from convert.qwen2 import Qwen2Config, parse_config, tensor_specs
from convert.recipe import RECIPES, Override, Recipe, choose_types
from tests.oracles.llama_quantizer import (
    quantize_with_llama_cpp,
    stored_tensors,
    types_by_llama_cpp,
)
from tests.synthetic import CONFIG, write_checkpoint

NANO = Path(__file__).parents[2] / "quant_eval/nano/checkpoint"
NEED_IMATRIX = {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"}
SLOW_ON_NANO = {name for name in RECIPES if name.startswith("IQ")}
MODELS: dict[str, Mapping[str, object]] = {
    "QwQ-32B": {
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 32,
    },
    "72B": {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    "72B with unshared heads": {"num_hidden_layers": 80, "num_key_value_heads": 4},
    "20 layers, unshared heads": {"num_hidden_layers": 20, "num_key_value_heads": 8},
    "7 layers": {"num_hidden_layers": 7},
    "tied embeddings": {"num_hidden_layers": 24, "tie_word_embeddings": True},
    "rows of 288 and 544": {
        "num_hidden_layers": 9,
        "hidden_size": 288,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 544,
    },
    "rows of 1000": {
        "num_hidden_layers": 9,
        "hidden_size": 1000,
        "num_attention_heads": 10,
        "intermediate_size": 544,
    },
}
OVERRIDES: dict[str, Recipe] = {
    "a role": replace(RECIPES["Q4_K_M"], overrides=(Override("ffn_down", QuantType.Q8_0),)),
    "some layers, first match": replace(
        RECIPES["Q4_K_M"],
        overrides=(
            Override(r"blk\.(0|5|6)\.ffn_down", QuantType.Q3_K),
            Override(r"blk\.[0-9]\.(ffn_down|attn_v)", QuantType.IQ4_XS),
        ),
    ),
    "embeddings and output": replace(
        RECIPES["Q3_K_M"],
        token_embedding_type=QuantType.Q8_0,
        output_type=QuantType.Q5_K,
        overrides=(Override("token_embd|output", QuantType.Q4_K),),
    ),
    "the output by its own option": replace(RECIPES["Q2_K"], output_type=QuantType.Q4_K),
    "embeddings of an unquantized file": replace(
        RECIPES["BF16"], token_embedding_type=QuantType.Q8_0
    ),
    "what needs no imatrix any more": replace(
        RECIPES["IQ3_XXS"], overrides=(Override("attn_[qko]|ffn_(up|gate)", QuantType.Q4_K),)
    ),
    "no mix is left": replace(RECIPES["IQ2_XXS"], overrides=(Override(".", QuantType.Q4_K),)),
}


def config_of(model_name: str) -> Qwen2Config:
    return parse_config(CONFIG | dict(MODELS[model_name]), model_name)


def random_importance(model: Qwen2Config) -> dict[str, Float32Array]:
    """Squared activations of very different size for all matrices but the embeddings."""
    rng = np.random.default_rng(7)
    return {
        spec.gguf_name: np.exp(rng.normal(0, 2, spec.shape[-1])).astype(np.float32)
        for spec in tensor_specs(model)
        if len(spec.shape) > 1 and spec.gguf_name != "token_embd.weight"
    }


def imatrix_of(importance: Mapping[str, Float32Array]) -> Imatrix:
    return Imatrix(importance, dict.fromkeys(importance, 1), 1, 512, (), "")


@pytest.fixture(scope="module")
def empty_file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A BF16 file by model's name whose weights are a hole, since a dry run reads no weights."""

    @cache
    def make(model_name: str) -> Path:
        model = config_of(model_name)
        path = tmp_path_factory.mktemp("hole") / "bf16.gguf"
        writer = gguf.GGUFWriter(path, "qwen2")
        writer.add_block_count(model.n_layers)
        writer.add_context_length(model.context_length)
        writer.add_embedding_length(model.hidden_size)
        writer.add_feed_forward_length(model.intermediate_size)
        writer.add_head_count(model.n_heads)
        writer.add_head_count_kv(model.n_kv_heads)
        writer.add_layer_norm_rms_eps(model.rms_norm_eps)
        for spec in tensor_specs(model):
            stored = QuantType.F32 if len(spec.shape) == 1 else QuantType.BF16
            nbytes = prod(spec.shape) * gguf.GGML_QUANT_SIZES[stored][1]
            writer.add_tensor_info(
                spec.gguf_name, spec.shape, np.dtype(np.float32), nbytes, raw_dtype=stored
            )
        writer.open_output_file()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with path.open("ab") as file:
            file.truncate(file.tell() + sum(4 * prod(spec.shape) for spec in tensor_specs(model)))
        return path

    return make


def our_types(recipe: Recipe, model: Qwen2Config, imatrix: Imatrix | None) -> dict[str, str]:
    return {
        spec.gguf_name: choice.quant_type.name
        for spec, choice in choose_types(recipe, model, imatrix=imatrix)
    }


def differing(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, tuple[str, str | None]]:
    assert ours.keys() == theirs.keys()
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


@pytest.mark.parametrize("model_name", MODELS)
def test_every_tensor_has_llama_cpps_type(
    empty_file_of: Callable[[str], Path], model_name: str
) -> None:
    """All 28 types, with and without an imatrix: for QwQ-32B's layers that is 771 tensors each.

    Catches a wrong rule, a wrong layer of a rule, a wrong fallback, a wrong refusal.
    """
    model = config_of(model_name)
    path = empty_file_of(model_name)
    importance = random_importance(model)
    if model_name == "QwQ-32B":
        assert len(read_header(path).tensors) == 771
    for recipe in RECIPES.values():
        ours = our_types(recipe, model, imatrix_of(importance))
        theirs = types_by_llama_cpp(path, recipe, importance=importance)
        assert not differing(ours, theirs), f"{recipe.name} with an imatrix"
        if recipe.name in NEED_IMATRIX and model.hidden_size % 256 == 0:
            with pytest.raises(UsageError, match=f"--type {recipe.name}: .+ give --imatrix"):
                our_types(recipe, model, None)
            continue
        differences = differing(our_types(recipe, model, None), types_by_llama_cpp(path, recipe))
        assert not differences, f"{recipe.name} without an imatrix"


@pytest.mark.parametrize("model_name", ["QwQ-32B", "20 layers, unshared heads", "tied embeddings"])
@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides_are_llama_cpps(
    empty_file_of: Callable[[str], Path], model_name: str, case: str
) -> None:
    """Patterns, embeddings and output take the same tensors, and leave the same to the mix."""
    model = config_of(model_name)
    ours = our_types(OVERRIDES[case], model, None)
    theirs = types_by_llama_cpp(empty_file_of(model_name), OVERRIDES[case])
    assert not differing(ours, theirs)


ONE_LAYER = {"num_hidden_layers": 1, "max_window_layers": 1}
SOURCES: dict[str, Mapping[str, object]] = {
    "one layer": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
    },
    "rows of 288 and 544": {**MODELS["rows of 288 and 544"], "vocab_size": 321},
    "rows of 1000": {**MODELS["rows of 1000"], "vocab_size": 321},
    "tied embeddings": {"tie_word_embeddings": True},
}
CASES = [
    *((source, name) for source in ("one layer", "nano") for name in RECIPES),
    *(
        (source, name)
        for source, names in {
            "rows of 288 and 544": ("Q8_0", "Q6_K", "Q5_K_S", "Q4_K_S", "Q3_K_S", "IQ3_S", "IQ2_M"),
            "rows of 1000": ("F16", "Q4_K_M", "Q4_0"),
            "tied embeddings": ("Q8_0", "Q4_K_M"),
        }.items()
        for name in names
    ),
]


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A checkpoint by name and its BF16 file."""

    @cache
    def make(name: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("source")
        folder = NANO
        if name != "nano":
            config = {**SOURCES[name], **ONE_LAYER}
            folder = write_checkpoint(root / "checkpoint", config=config)
        export(folder, RECIPES["BF16"], root / "bf16.gguf", None)
        return folder, root / "bf16.gguf"

    return make


def export(folder: Path, recipe: Recipe, path: Path, imatrix: Imatrix | None) -> None:
    with Checkpoint.open(folder) as checkpoint:
        export_planned(checkpoint, [plan_file(checkpoint, recipe, path, imatrix=imatrix)])


def same_file(ours: Path, theirs: Path) -> bool:
    """All tensors and all metadata but ours of the file's origin, which libllama does not know.

    llama-quantize adds what it says of the imatrix itself.
    """
    our_metadata, their_metadata = read_header(ours).metadata, read_header(theirs).metadata
    of_origin = ("qwq.", "quantize.imatrix.")
    keys = {key for key in our_metadata | their_metadata if not key.startswith(of_origin)}
    return stored_tensors(ours) == stored_tensors(theirs) and all(
        np.array_equal(our_metadata[key], their_metadata[key]) for key in keys
    )


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize(
    ("source", "recipe_name"),
    [
        pytest.param(
            *case, marks=pytest.mark.slow if case[0] == "nano" and case[1] in SLOW_ON_NANO else ()
        )
        for case in CASES
    ],
)
def test_every_byte_is_llama_cpps(
    tmp_path: Path,
    source_of: Callable[[str], tuple[Path, Path]],
    source: str,
    recipe_name: str,
    with_imatrix: bool,
) -> None:
    """Types, shapes, bytes and metadata are equal; and where llama.cpp refuses, so do we.

    Catches a wrong row cut, a wrong encoder call, importance of another tensor.
    """
    folder, bf16_path = source_of(source)
    recipe = RECIPES[recipe_name]
    importance = None
    if with_imatrix:
        with Checkpoint.open(folder) as checkpoint:
            importance = random_importance(checkpoint.model)
    imatrix = None if importance is None else imatrix_of(importance)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    if not quantize_with_llama_cpp(bf16_path, recipe, theirs, importance=importance):
        assert recipe_name in NEED_IMATRIX
        assert not with_imatrix
        with pytest.raises(UsageError, match="give --imatrix"):
            export(folder, recipe, ours, imatrix)
        return
    export(folder, recipe, ours, imatrix)
    assert same_file(ours, theirs)


def test_an_imatrix_with_gaps_is_used_as_llama_cpp_uses_it(
    tmp_path: Path, source_of: Callable[[str], tuple[Path, Path]]
) -> None:
    """Tensors without an entry are rounded without; so are embeddings of another width."""
    folder, bf16_path = source_of("one layer")
    with Checkpoint.open(folder) as checkpoint:
        importance = random_importance(checkpoint.model)
    del importance["blk.0.ffn_up.weight"]
    importance["token_embd.weight"] = np.ones(320, dtype=np.float32)
    importance["blk.0.attn_q.weight"][:64] = 0
    recipe = RECIPES["Q4_K_M"]
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert quantize_with_llama_cpp(bf16_path, recipe, theirs, importance=importance)
    export(folder, recipe, ours, imatrix_of(importance))
    assert same_file(ours, theirs)


def test_overridden_bytes_are_llama_cpps(
    tmp_path: Path, source_of: Callable[[str], tuple[Path, Path]]
) -> None:
    """Overridden tensors are encoded as what they were given."""
    folder, bf16_path = source_of("one layer")
    recipe = OVERRIDES["embeddings and output"]
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert quantize_with_llama_cpp(bf16_path, recipe, theirs)
    export(folder, recipe, ours, None)
    assert same_file(ours, theirs)
