"""QwQ-32B's recipes without its weights: types and exact sizes from its config alone."""

from collections import Counter
from itertools import pairwise

import pytest

from convert.encode import QuantType
from convert.errors import UsageError
from convert.plan import TensorPlan, plan_tensors
from convert.qwen2 import parse_config
from convert.recipe import RECIPES, find_recipe

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
HEADER_NBYTES = 6e6
"""About: 152,064 tokens and their types, 151,387 merges, 771 tensors."""


@pytest.mark.parametrize(
    ("recipe_name", "expected_gb"),
    [
        ("BF16", 65.536),
        ("Q8_0", 34.821),
        ("Q6_K", 26.886),
        ("Q5_K_M", 23.262),
        ("Q4_K_M", 19.851),
        ("Q4_K_S", 18.784),
        ("Q3_K_M", 15.935),
        ("Q2_K", 12.313),
    ],
)
def test_file_sizes_of_qwq_32b(recipe_name: str, expected_gb: float) -> None:
    """The published files' sizes to the megabyte: catches a wrong rule in any of 771 tensors."""
    last = plan_tensors(QWQ_32B, RECIPES[recipe_name])[-1]
    data_nbytes = last.offset + last.nbytes
    assert (data_nbytes + HEADER_NBYTES) / 1e9 == pytest.approx(expected_gb, abs=0.001)


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
        tensors = plan_tensors(QWQ_32B, recipe)
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
