"""Recipes: which quant type each tensor gets, llama.cpp's own mixes as tables.

Source: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type), whose choices for qwen2 these equal.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gguf import LlamaFileType

from convert.encode import NEEDS_IMPORTANCE, QuantType, block_size
from convert.errors import QwqError, UsageError
from convert.imatrix import Imatrix, count_unusable
from convert.qwen2 import Qwen2Config, TensorSpec, tensor_specs


@dataclass(frozen=True, slots=True)
class Choice:
    """A tensor's quant type, and in words where it is not the one the recipe wants."""

    quant_type: QuantType
    note: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """What a rule may look at.

    layer: of the tensor; as in llama.cpp, layers whose tensor of this role an override takes are
    not counted.
    """

    layer: int
    model: Qwen2Config
    has_imatrix: bool


def always(_place: Place) -> bool:
    return True


def first_2(place: Place) -> bool:
    return place.layer < 2


def first_4(place: Place) -> bool:
    return place.layer < 4


def first_16th(place: Place) -> bool:
    return place.layer < place.model.n_layers // 16


def first_8th(place: Place) -> bool:
    return place.layer < place.model.n_layers // 8


def first_8th_with_imatrix(place: Place) -> bool:
    return first_8th(place) and place.has_imatrix


def first_8th_without_imatrix(place: Place) -> bool:
    return first_8th(place) and not place.has_imatrix


def without_imatrix(place: Place) -> bool:
    return not place.has_imatrix


def middle(place: Place) -> bool:
    """All layers but the first and the last eighth."""
    n_layers = place.model.n_layers
    return n_layers // 8 <= place.layer < 7 * n_layers // 8


def more_bits(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return not middle(place) or (place.layer - place.model.n_layers // 8) % 3 == 2


def shared_heads(place: Place) -> bool:
    """At least four query heads share a key head, so that k and v are small and matter more."""
    return place.model.n_heads // place.model.n_kv_heads >= 4


def size_72b(place: Place) -> bool:
    """llama.cpp knows the 72B model by its number of layers."""
    return place.model.n_layers == 80


def size_72b_shared_heads(place: Place) -> bool:
    return size_72b(place) and shared_heads(place)


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of this role, where `when` says so, get this type.

    role: the tensor's GGUF name without layer and ".weight".
    """

    role: str
    quant_type: QuantType
    when: Callable[[Place], bool] = always


@dataclass(frozen=True, slots=True)
class Override:
    """Tensors in whose GGUF name the regular expression `pattern` is found get this type."""

    pattern: str
    quant_type: QuantType


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which type each matrix gets: the one asked for, else that of the first rule, else `default`.

    token_embedding_type, output_type, overrides: what the user asks for, in this order.
    needs_importance: types that this mix allows only with importance, beside those that always
    need it.
    about: in words, what was predicted of it; it decides nothing.
    """

    name: str
    file_type: LlamaFileType
    default: QuantType
    rules: tuple[Rule, ...] = ()
    needs_importance: frozenset[QuantType] = frozenset()
    token_embedding_type: QuantType | None = None
    output_type: QuantType | None = None
    overrides: tuple[Override, ...] = ()
    about: str = ""


F32, F16, BF16 = QuantType.F32, QuantType.F16, QuantType.BF16
Q8_0, Q6_K, Q5_K, Q4_K = QuantType.Q8_0, QuantType.Q6_K, QuantType.Q5_K, QuantType.Q4_K
Q3_K, Q2_K = QuantType.Q3_K, QuantType.Q2_K
Q5_0, Q5_1, Q4_0, Q4_1 = QuantType.Q5_0, QuantType.Q5_1, QuantType.Q4_0, QuantType.Q4_1
IQ4_XS, IQ4_NL = QuantType.IQ4_XS, QuantType.IQ4_NL
IQ3_S, IQ3_XXS = QuantType.IQ3_S, QuantType.IQ3_XXS
IQ2_S, IQ2_XS, IQ2_XXS = QuantType.IQ2_S, QuantType.IQ2_XS, QuantType.IQ2_XXS

_T = LlamaFileType

_MORE_BITS = (
    Rule("attn_v", Q6_K, more_bits),
    Rule("ffn_down", Q6_K, more_bits),
)
_IQ4 = (
    Rule("attn_v", Q5_K, shared_heads),
    Rule("ffn_down", Q5_K, first_8th_without_imatrix),
)
_IQ2_SMALL = (
    Rule("attn_v", Q4_K, shared_heads),
    Rule("attn_v", Q2_K),
    Rule("ffn_down", Q2_K, first_8th),
    Rule("token_embd", Q2_K),
    Rule("output", Q5_K),
)
_IQ2_LARGE = (
    Rule("attn_v", Q4_K, shared_heads),
    Rule("attn_v", IQ3_S),
    Rule("ffn_down", IQ3_S, first_8th),
    Rule("attn_output", IQ3_S),
    Rule("token_embd", IQ3_S),
    Rule("output", Q5_K),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("F32", _T.ALL_F32, F32),
        Recipe("F16", _T.MOSTLY_F16, F16),
        Recipe("BF16", _T.MOSTLY_BF16, BF16),
        Recipe("Q8_0", _T.MOSTLY_Q8_0, Q8_0),
        Recipe("Q6_K", _T.MOSTLY_Q6_K, Q6_K),
        Recipe("Q5_K_M", _T.MOSTLY_Q5_K_M, Q5_K, _MORE_BITS),
        Recipe("Q5_K_S", _T.MOSTLY_Q5_K_S, Q5_K),
        Recipe("Q5_1", _T.MOSTLY_Q5_1, Q5_1),
        Recipe(
            "Q5_0",
            _T.MOSTLY_Q5_0,
            Q5_0,
            (Rule("ffn_down", Q5_1, first_8th_with_imatrix),),
        ),
        Recipe(
            "Q4_K_M",
            _T.MOSTLY_Q4_K_M,
            Q4_K,
            (
                *_MORE_BITS,
                Rule("attn_v", Q5_K, size_72b),
            ),
        ),
        Recipe(
            "Q4_K_S",
            _T.MOSTLY_Q4_K_S,
            Q4_K,
            (
                Rule("attn_v", Q5_K, first_4),
                Rule("attn_v", Q5_K, size_72b),
                Rule("ffn_down", Q5_K, first_8th),
            ),
        ),
        Recipe("Q4_1", _T.MOSTLY_Q4_1, Q4_1),
        Recipe(
            "Q4_0",
            _T.MOSTLY_Q4_0,
            Q4_0,
            (Rule("ffn_down", Q4_1, first_8th_with_imatrix),),
        ),
        Recipe("IQ4_NL", _T.MOSTLY_IQ4_NL, IQ4_NL, _IQ4),
        Recipe("IQ4_XS", _T.MOSTLY_IQ4_XS, IQ4_XS, _IQ4),
        Recipe(
            "Q3_K_L",
            _T.MOSTLY_Q3_K_L,
            Q3_K,
            (
                Rule("attn_v", Q5_K),
                Rule("ffn_down", Q5_K),
                Rule("attn_output", Q5_K),
            ),
        ),
        Recipe(
            "Q3_K_M",
            _T.MOSTLY_Q3_K_M,
            Q3_K,
            (
                Rule("attn_v", Q5_K, first_2),
                Rule("attn_v", Q5_K, size_72b),
                Rule("attn_v", Q4_K),
                Rule("ffn_down", Q5_K, first_16th),
                Rule("ffn_down", Q4_K),
                Rule("attn_output", Q4_K),
            ),
        ),
        Recipe("Q3_K_S", _T.MOSTLY_Q3_K_S, Q3_K, (Rule("attn_v", Q5_K, size_72b),)),
        Recipe(
            "IQ3_M",
            _T.MOSTLY_IQ3_M,
            IQ3_S,
            (
                Rule("attn_v", Q5_K, size_72b),
                Rule("attn_v", Q4_K),
                Rule("ffn_down", Q4_K, first_8th),
                Rule("attn_output", Q4_K),
            ),
        ),
        Recipe(
            "IQ3_S",
            _T.MOSTLY_IQ3_S,
            IQ3_S,
            (
                Rule("attn_v", Q5_K, size_72b_shared_heads),
                Rule("attn_v", Q4_K, shared_heads),
            ),
        ),
        Recipe(
            "IQ3_XS",
            _T.MOSTLY_IQ3_XS,
            IQ3_S,
            (
                Rule("attn_q", IQ3_XXS),
                Rule("attn_k", IQ3_XXS),
                Rule("attn_v", Q5_K, size_72b_shared_heads),
                Rule("attn_v", Q4_K, shared_heads),
                Rule("ffn_gate", IQ3_XXS, middle),
                Rule("ffn_up", IQ3_XXS, middle),
            ),
        ),
        Recipe(
            "IQ3_XXS",
            _T.MOSTLY_IQ3_XXS,
            IQ3_XXS,
            (
                Rule("attn_q", IQ2_S),
                Rule("attn_k", IQ2_S),
                Rule("attn_v", Q5_K, size_72b_shared_heads),
                Rule("attn_v", Q4_K, shared_heads),
                Rule("attn_v", IQ3_S, without_imatrix),
                Rule("attn_output", IQ3_S),
                Rule("ffn_down", Q4_K, first_8th_without_imatrix),
                Rule("ffn_down", Q3_K, without_imatrix),
                Rule("token_embd", IQ3_S),
                Rule("output", Q5_K),
            ),
        ),
        Recipe(
            "Q2_K",
            _T.MOSTLY_Q2_K,
            Q2_K,
            (
                Rule("attn_v", Q5_K, size_72b),
                Rule("attn_v", Q4_K, shared_heads),
                Rule("attn_v", Q3_K),
                Rule("ffn_down", Q3_K),
                Rule("attn_output", Q3_K),
            ),
        ),
        Recipe(
            "Q2_K_S",
            _T.MOSTLY_Q2_K_S,
            Q2_K,
            (
                Rule("attn_v", Q5_K, size_72b_shared_heads),
                Rule("attn_v", Q4_K, shared_heads),
                Rule("ffn_down", Q4_K, first_8th),
            ),
            needs_importance=frozenset({Q2_K}),
        ),
        Recipe("IQ2_M", _T.MOSTLY_IQ2_M, IQ2_S, _IQ2_LARGE),
        Recipe("IQ2_S", _T.MOSTLY_IQ2_S, IQ2_XS, _IQ2_LARGE),
        Recipe("IQ2_XS", _T.MOSTLY_IQ2_XS, IQ2_XS, _IQ2_SMALL),
        Recipe("IQ2_XXS", _T.MOSTLY_IQ2_XXS, IQ2_XXS, _IQ2_SMALL),
    )
}

_GARBAGE_WITHOUT_IMPORTANCE = frozenset({IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS})
"""Types that llama.cpp refuses for a layer's matrix without importance."""

_FALLBACK = {
    Q2_K: Q4_0,
    Q3_K: Q4_0,
    Q4_K: Q5_0,
    Q5_K: Q5_1,
    Q6_K: Q8_0,
    IQ4_XS: IQ4_NL,
    IQ3_S: IQ4_NL,
    IQ3_XXS: IQ4_NL,
    IQ2_S: IQ4_NL,
    IQ2_XS: IQ4_NL,
    IQ2_XXS: IQ4_NL,
}
"""What takes over where a row does not divide into the type's blocks; F16 where that fails too."""

_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"


def find_recipe(name: str) -> Recipe:
    """The recipe of this name in any case; raises UsageError with the names that exist."""
    recipe = RECIPES.get(name.upper())
    if recipe is None:
        known = ", ".join(RECIPES)
        raise UsageError(f"--type {name}: no such type; give one of {known}")
    return recipe


def choose_types(
    recipe: Recipe, model: Qwen2Config, *, imatrix: Imatrix | None = None
) -> Iterator[tuple[TensorSpec, Choice]]:
    """Every tensor of the model with its type; vectors stay F32 in every recipe.

    Raises UsageError for an override that names no matrix and for a type that is useless without
    importance, QwqError for importance of another width or that is NaN, infinite or negative.
    """
    _check_overrides(recipe, model)
    n_by_rule: Counter[str] = Counter()
    for spec in tensor_specs(model):
        if len(spec.shape) == 1:
            yield spec, Choice(F32)
            continue
        quant_type = _asked_type(recipe, spec.gguf_name, model)
        if quant_type is None:
            role = spec.gguf_name.removesuffix(".weight").rpartition(".")[2]
            place = Place(n_by_rule[role], model, imatrix is not None)
            quant_type = _rule_type(recipe, role, place)
            n_by_rule[role] += 1
        choice = _fitting(quant_type, spec.shape[-1])
        _check_importance(recipe, spec, choice.quant_type, imatrix)
        yield spec, choice


def _asked_type(recipe: Recipe, gguf_name: str, model: Qwen2Config) -> QuantType | None:
    """The type that the user asked for, if for this tensor one was.

    Patterns hold for unquantized mixes too, where llama.cpp ignores them.
    """
    if gguf_name == _EMBEDDINGS and recipe.token_embedding_type is not None:
        return recipe.token_embedding_type
    if gguf_name == _OUTPUT and recipe.output_type is not None:
        return recipe.output_type
    for override in recipe.overrides:
        if re.search(override.pattern, gguf_name):
            return override.quant_type
    if gguf_name == _EMBEDDINGS and model.tied_embeddings:
        return recipe.output_type
    return None


def _rule_type(recipe: Recipe, role: str, place: Place) -> QuantType:
    if recipe.default in (F32, F16, BF16):
        return recipe.default
    if role == "token_embd" and place.model.tied_embeddings:
        role = "output"
    if role == "output" and place.model.hidden_size % block_size(recipe.default):
        return Q8_0
    for rule in recipe.rules:
        if rule.role == role and rule.when(place):
            return rule.quant_type
    if role == "output" and recipe.default != Q8_0:
        return Q6_K
    return recipe.default


def _fitting(wanted: QuantType, n_per_row: int) -> Choice:
    if n_per_row % block_size(wanted) == 0:
        return Choice(wanted)
    fallback = _FALLBACK.get(wanted, F16)
    if n_per_row % block_size(fallback):
        fallback = F16
    note = f"rows of {n_per_row} do not divide into {wanted.name}'s blocks of {block_size(wanted)}"
    return Choice(fallback, note)


def _check_overrides(recipe: Recipe, model: Qwen2Config) -> None:
    names = [spec.gguf_name for spec in tensor_specs(model) if len(spec.shape) > 1]
    for override in recipe.overrides:
        if not any(re.search(override.pattern, name) for name in names):
            raise UsageError(
                f"{override.pattern}={override.quant_type.name}: is found in none of the "
                f"{len(names)} matrices' names; look at them with --dry-run"
            )


def _check_importance(
    recipe: Recipe, spec: TensorSpec, quant_type: QuantType, imatrix: Imatrix | None
) -> None:
    if imatrix is not None:
        importance = imatrix.importance_of(spec.gguf_name, spec.shape[-1])
        if importance is not None:
            n_unusable = count_unusable(importance)
            if n_unusable:
                raise QwqError(
                    f"{spec.gguf_name}: the imatrix holds {n_unusable:,} of {len(importance):,} "
                    "columns that are NaN, infinite or negative; make it again"
                )
            return
    needing = NEEDS_IMPORTANCE
    if spec.layer_index is not None:
        needing |= _GARBAGE_WITHOUT_IMPORTANCE | recipe.needs_importance
    if quant_type not in needing:
        return
    if imatrix is None:
        raise UsageError(
            f"--type {recipe.name}: {spec.gguf_name} as {quant_type.name} is useless without the "
            "importance of its columns; give --imatrix FILE, or another type"
        )
    raise UsageError(
        f"{spec.gguf_name}: the imatrix has no entry for it and {quant_type.name} is useless "
        "without; give the imatrix of this model, or another type"
    )
