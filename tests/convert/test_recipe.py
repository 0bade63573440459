"""QwQ-32B's recipes without its weights: types and exact sizes from its config alone."""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import prod

import numpy as np
import pytest

from convert.encode import QuantType
from convert.errors import QwqError, UsageError
from convert.gguf_cli import SIZES
from convert.imatrix import Imatrix
from convert.plan import TensorPlan, plan_tensors
from convert.qwen2 import parse_config, tensor_specs
from convert.recipe import RECIPES, Override, find_recipe

QWQ_32B = parse_config(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_position_embeddings": 131072,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "QwQ-32B",
)
UNIFORM = Imatrix(
    {
        spec.gguf_name: np.ones(spec.shape[-1], dtype=np.float32)
        for spec in tensor_specs(QWQ_32B)
        if len(spec.shape) > 1
    },
    {},
    1,
    512,
    (),
    "",
)
"""Importance that is the same everywhere."""
HEADER_NBYTES = 6e6
"""About: 152,064 tokens and their types, 151,387 merges, 771 tensors."""


@pytest.mark.parametrize(
    ("recipe_name", "imatrix", "expected_gb"),
    [
        ("BF16", None, 65.536),
        ("Q8_0", None, 34.821),
        ("Q6_K", None, 26.886),
        ("Q5_K_M", None, 23.262),
        ("Q4_K_M", None, 19.851),
        ("Q4_K_M", UNIFORM, 19.851),
        ("Q4_K_S", None, 18.784),
        ("IQ4_XS", UNIFORM, 17.693),
        ("IQ4_XS", None, 17.870),
        ("Q3_K_M", None, 15.935),
        ("Q2_K", None, 12.313),
    ],
)
def test_file_sizes_of_qwq_32b(
    recipe_name: str, imatrix: Imatrix | None, expected_gb: float
) -> None:
    """The published files' sizes to the megabyte: catches a wrong rule in any of 771 tensors."""
    last = plan_tensors(QWQ_32B, RECIPES[recipe_name], imatrix=imatrix)[-1]
    data_nbytes = last.offset + last.nbytes
    assert (data_nbytes + HEADER_NBYTES) / 1e9 == pytest.approx(expected_gb, abs=0.001)


def test_the_bits_that_the_help_gives() -> None:
    """Every type stands in --help with its bits for QwQ-32B, and apart what needs an imatrix."""
    plain, with_imatrix = SIZES.split("with --imatrix alone: ")
    told = dict(re.findall(r"(\w+) (\d+\.\d)", SIZES))
    for name, recipe in RECIPES.items():
        tensors = plan_tensors(QWQ_32B, recipe, imatrix=UNIFORM)
        n_weights = sum(prod(tensor.shape) for tensor in tensors)
        bits = 8 * sum(tensor.nbytes for tensor in tensors) / n_weights
        assert name in ("F32", "F16", "BF16") or told[name] == f"{bits:.1f}"
        try:
            plan_tensors(QWQ_32B, recipe)
            assert f"{name}," in plain or f"{name} " in plain
        except UsageError:
            assert f"{name} " in with_imatrix


def types_of(recipe_name: str, role: str) -> list[str]:
    """The types of one role's tensors, by layer."""
    return [
        tensor.quant_type.name
        for tensor in plan_tensors(QWQ_32B, RECIPES[recipe_name])
        if tensor.gguf_name.endswith(f"{role}.weight")
    ]


def test_the_mix_of_q4_k_m() -> None:
    """The first and last eight layers and every third between have more bits; counted by hand."""
    down = types_of("Q4_K_M", "ffn_down")
    richer = [layer for layer, name in enumerate(down) if name == "Q6_K"]
    assert richer == [*range(8), *range(10, 56, 3), *range(56, 64)]
    assert types_of("Q4_K_M", "attn_v") == down
    assert set(types_of("Q4_K_M", "attn_k")) == {"Q4_K"}
    assert types_of("Q4_K_M", "output") == ["Q4_K"] * 64 + ["Q6_K"]  # attn_output, then output


def test_vectors_stay_f32_in_every_recipe() -> None:
    """Norms and biases are never quantized; matrices always get what the recipe says."""
    for recipe in RECIPES.values():
        tensors = plan_tensors(QWQ_32B, recipe, imatrix=UNIFORM)
        assert len(tensors) == 771
        vectors = [tensor for tensor in tensors if len(tensor.shape) == 1]
        assert Counter(t.quant_type for t in vectors) == {QuantType.F32: 64 * 5 + 1}


def test_tensors_lie_one_after_another() -> None:
    """Offsets are aligned and leave no hole wider than the padding."""

    def end(tensor: TensorPlan) -> int:
        return tensor.offset + tensor.nbytes

    tensors = plan_tensors(QWQ_32B, RECIPES["Q3_K_M"])
    for before, after in pairwise(tensors):
        assert after.offset % 32 == 0
        assert 0 <= after.offset - end(before) < 32


def test_an_unknown_type_names_the_known() -> None:
    """A wrong --type is a usage error that lists what there is; case does not matter."""
    assert find_recipe("q4_k_m") is RECIPES["Q4_K_M"]
    with pytest.raises(UsageError, match="--type Q4_K_XL: no such type; give one of F32, F16"):
        find_recipe("Q4_K_XL")


def without(*names: str) -> Imatrix:
    importance = {name: values for name, values in UNIFORM.importance.items() if name not in names}
    return Imatrix(importance, {}, 1, 512, (), "")


def test_what_needs_importance_is_refused_without() -> None:
    """A very low type is refused where its tensor has no importance; the embeddings need none."""
    with pytest.raises(UsageError, match=r"--type IQ2_XXS: blk\.0\.attn_q\.weight as IQ2_XXS is"):
        plan_tensors(QWQ_32B, RECIPES["IQ2_XXS"])
    with pytest.raises(UsageError, match=r"ffn_up\.weight: the imatrix has no entry for it"):
        plan_tensors(QWQ_32B, RECIPES["IQ2_XXS"], imatrix=without("blk.9.ffn_up.weight"))
    plan_tensors(QWQ_32B, RECIPES["IQ2_XXS"], imatrix=without("token_embd.weight", "output.weight"))
    plan_tensors(QWQ_32B, RECIPES["Q4_K_M"], imatrix=without("blk.9.ffn_up.weight"))
    coarse_embeddings = replace(RECIPES["Q4_K_M"], token_embedding_type=QuantType.IQ2_XXS)
    with pytest.raises(UsageError, match=r"--type Q4_K_M: token_embd\.weight as IQ2_XXS is"):
        plan_tensors(QWQ_32B, coarse_embeddings)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_importance_that_is_no_number_is_refused(value: float) -> None:
    """NaN, infinite or negative importance would spoil the blocks: refused by the tensor's name."""
    name = "blk.63.ffn_down.weight"
    spoilt = np.ones(27648, dtype=np.float32)
    spoilt[[5, 7]] = value
    imatrix = Imatrix({**UNIFORM.importance, name: spoilt}, {}, 1, 512, (), "")
    with pytest.raises(QwqError, match=rf"{name}: the imatrix holds 2 of 27,648 columns that are"):
        plan_tensors(QWQ_32B, RECIPES["Q4_K_M"], imatrix=imatrix)


def test_an_override_that_names_nothing_is_refused() -> None:
    """A pattern with a slip in it is an error, not a file without the override."""
    recipe = replace(RECIPES["Q4_K_M"], overrides=(Override("fnn_down", QuantType.Q8_0),))
    with pytest.raises(UsageError, match="fnn_down=Q8_0: is found in none of the 450 matrices'"):
        plan_tensors(QWQ_32B, recipe)


def test_a_fallback_stands_in_the_plan() -> None:
    """Rows that do not divide get another type, and the plan says which and why."""
    settings = {"hidden_size": 288, "intermediate_size": 544, "head_dim": 32}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 4096,
        "num_attention_heads": 9,
        "num_hidden_layers": 1,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "vocab_size": 320,
    }
    model = parse_config(config | settings, "odd")
    notes = {t.gguf_name: t.note for t in plan_tensors(model, RECIPES["Q4_K_S"]) if t.note}
    assert notes["blk.0.ffn_up.weight"] == "rows of 288 do not divide into Q4_K's blocks of 256"
    assert not any(t.note for t in plan_tensors(QWQ_32B, RECIPES["Q4_K_S"]))
