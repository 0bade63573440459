"""Recipes: which quant type each tensor gets, llama.cpp's own mixes as tables.

Source: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type), whose choices for qwen2 these equal.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gguf import LlamaFileType

from convert.encode import QuantType, block_size
from convert.errors import UsageError
from convert.qwen2 import Qwen2Config, TensorSpec


@dataclass(frozen=True, slots=True)
class Choice:
    """A tensor's quant type, and in words where it is not the one the recipe wants."""

    quant_type: QuantType
    note: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of this role, in the layers `when` picks, get this type.

    role: the tensor's GGUF name without layer and ".weight".
    when: (layer_index, model) -> bool.
    """

    role: str
    quant_type: QuantType
    when: Callable[[int, Qwen2Config], bool]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The first rule that fits a matrix decides; `default` where none does."""

    name: str
    file_type: LlamaFileType
    default: QuantType
    rules: tuple[Rule, ...] = ()


def _always(_layer: int, _model: Qwen2Config) -> bool:
    return True


def _first_two(layer: int, _model: Qwen2Config) -> bool:
    return layer < 2


def _first_four(layer: int, _model: Qwen2Config) -> bool:
    return layer < 4


def _first_16th(layer: int, model: Qwen2Config) -> bool:
    return layer < model.n_layers // 16


def _first_8th(layer: int, model: Qwen2Config) -> bool:
    return layer < model.n_layers // 8


def _more_bits(layer: int, model: Qwen2Config) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    n_layers = model.n_layers
    n_first = n_layers // 8
    return layer < n_first or layer >= 7 * n_layers // 8 or (layer - n_first) % 3 == 2


def _shared_heads(_layer: int, model: Qwen2Config) -> bool:
    """At least four query heads share a key head, so that k and v are small and matter more."""
    return model.n_heads // model.n_kv_heads >= 4


_Q = QuantType
_F = LlamaFileType

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("F32", _F.ALL_F32, _Q.F32),
        Recipe("F16", _F.MOSTLY_F16, _Q.F16),
        Recipe("BF16", _F.MOSTLY_BF16, _Q.BF16),
        Recipe("Q8_0", _F.MOSTLY_Q8_0, _Q.Q8_0),
        Recipe("Q6_K", _F.MOSTLY_Q6_K, _Q.Q6_K),
        Recipe(
            "Q5_K_M",
            _F.MOSTLY_Q5_K_M,
            _Q.Q5_K,
            (
                Rule("attn_v", _Q.Q6_K, _more_bits),
                Rule("ffn_down", _Q.Q6_K, _more_bits),
            ),
        ),
        Recipe(
            "Q4_K_M",
            _F.MOSTLY_Q4_K_M,
            _Q.Q4_K,
            (
                Rule("attn_v", _Q.Q6_K, _more_bits),
                Rule("ffn_down", _Q.Q6_K, _more_bits),
            ),
        ),
        Recipe(
            "Q4_K_S",
            _F.MOSTLY_Q4_K_S,
            _Q.Q4_K,
            (
                Rule("attn_v", _Q.Q5_K, _first_four),
                Rule("ffn_down", _Q.Q5_K, _first_8th),
            ),
        ),
        Recipe(
            "Q3_K_M",
            _F.MOSTLY_Q3_K_M,
            _Q.Q3_K,
            (
                Rule("attn_v", _Q.Q5_K, _first_two),
                Rule("attn_v", _Q.Q4_K, _always),
                Rule("ffn_down", _Q.Q5_K, _first_16th),
                Rule("ffn_down", _Q.Q4_K, _always),
                Rule("attn_output", _Q.Q4_K, _always),
            ),
        ),
        Recipe(
            "Q2_K",
            _F.MOSTLY_Q2_K,
            _Q.Q2_K,
            (
                Rule("attn_v", _Q.Q4_K, _shared_heads),
                Rule("attn_v", _Q.Q3_K, _always),
                Rule("ffn_down", _Q.Q3_K, _always),
                Rule("attn_output", _Q.Q3_K, _always),
            ),
        ),
    )
}

_UNQUANTIZED = frozenset({_Q.F32, _Q.F16, _Q.BF16})

_FALLBACK = {
    _Q.Q2_K: _Q.Q4_0,
    _Q.Q3_K: _Q.Q4_0,
    _Q.Q4_K: _Q.Q5_0,
    _Q.Q5_K: _Q.Q5_1,
    _Q.Q6_K: _Q.Q8_0,
    _Q.Q8_0: _Q.F16,
}
"""What takes over where a row does not divide into the type's blocks; F16 where that fails too."""

_N_LAYERS_OF_72B = 80


def find_recipe(name: str) -> Recipe:
    """The recipe of this name in any case; raises UsageError with the names that exist."""
    recipe = RECIPES.get(name.upper())
    if recipe is None:
        known = ", ".join(RECIPES)
        raise UsageError(f"--type {name}: no such type; give one of {known}")
    return recipe


def choose_type(recipe: Recipe, spec: TensorSpec, model: Qwen2Config) -> Choice:
    """The quant type of one tensor; vectors stay F32 in every recipe."""
    if len(spec.shape) == 1:
        return Choice(QuantType.F32)
    if recipe.default in _UNQUANTIZED:
        return Choice(recipe.default)
    return _fitting(_wanted_type(recipe, spec, model), spec.shape[-1])


def _wanted_type(recipe: Recipe, spec: TensorSpec, model: Qwen2Config) -> QuantType:
    role = spec.gguf_name.removesuffix(".weight").rpartition(".")[2]
    if role == "output" or (role == "token_embd" and model.tied_embeddings):
        return QuantType.Q8_0 if recipe.default == QuantType.Q8_0 else QuantType.Q6_K
    if spec.layer_index is None:
        return recipe.default
    chosen = recipe.default
    for rule in recipe.rules:
        if rule.role == role and rule.when(spec.layer_index, model):
            chosen = rule.quant_type
            break
    if role == "attn_v" and model.n_layers == _N_LAYERS_OF_72B:
        return QuantType.Q5_K if chosen in (QuantType.Q3_K, QuantType.Q4_K) else chosen
    return chosen


def _fitting(wanted: QuantType, n_per_row: int) -> Choice:
    if n_per_row % block_size(wanted) == 0:
        return Choice(wanted)
    fallback = _FALLBACK[wanted]
    if n_per_row % block_size(fallback):
        fallback = QuantType.F16
    note = f"rows of {n_per_row} do not divide into {wanted.name}'s blocks of {block_size(wanted)}"
    return Choice(fallback, note)
