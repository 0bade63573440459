"""Recipes from TOML files and options: what they mean, and what is wrong with a bad one."""

from dataclasses import replace
from pathlib import Path

import pytest

from convert.encode import QuantType
from convert.errors import UsageError
from convert.qwen2 import parse_config
from convert.recipe import RECIPES, Override, choose_types
from convert.recipe_file import TENSOR_TYPES, load_recipe, recipe_text, with_overrides
from tests.synthetic import CONFIG

MODEL = parse_config(CONFIG, "synthetic")
CAREFUL = r"""
name = "careful-2.5"
base = "q4_k_m"
token_embedding_type = "Q8_0"
output_type = "q6_k"

[[tensors]]
pattern = 'blk\.(0|1)\.ffn_down'
type = "Q6_K"

[[tensors]]
pattern = "ffn_down"
type = "iq4_xs"
"""


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    return str(tmp_path / "recipe.toml")


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    """A base, types by pattern in their order, embeddings and output; names in any case."""
    assert load_recipe(write(tmp_path, CAREFUL)) == replace(
        RECIPES["Q4_K_M"],
        name="careful-2.5",
        token_embedding_type=QuantType.Q8_0,
        output_type=QuantType.Q6_K,
        overrides=(
            Override(r"blk\.(0|1)\.ffn_down", QuantType.Q6_K),
            Override("ffn_down", QuantType.IQ4_XS),
        ),
    )
    assert load_recipe("q4_k_m") is RECIPES["Q4_K_M"]


def test_what_is_said_of_a_recipe_holds_for_it_alone(tmp_path: Path) -> None:
    """Catches a prediction that outlives the types that it was made for, or is lost on the way."""
    recipe = load_recipe(write(tmp_path, 'name = "x"\nbase = "Q4_K_M"\nabout = "0.1 nats"\n'))
    assert recipe.about == "0.1 nats"
    assert load_recipe(write(tmp_path, recipe_text(recipe))) == recipe
    assert with_overrides(recipe) == recipe
    assert with_overrides(recipe, output_type="Q8_0").about == ""


def test_the_example_is_a_recipe() -> None:
    """What the documentation points to can be used as it is."""
    recipe = load_recipe(str(Path(__file__).parents[2] / "examples/recipe.toml"))
    types = {spec.gguf_name: choice.quant_type.name for spec, choice in choose_types(recipe, MODEL)}
    assert recipe.name == "careful"
    assert types["token_embd.weight"] == "Q6_K"
    assert types["output.weight"] == types["blk.1.ffn_down.weight"] == "Q8_0"
    assert types["blk.2.attn_v.weight"] == types["blk.3.attn_k.weight"] == "Q6_K"
    assert types["blk.3.ffn_up.weight"] == "Q4_K"


@pytest.mark.parametrize("name", ["IQ2_M", "own"])
def test_a_recipe_as_text_reads_back(tmp_path: Path, name: str) -> None:
    """The text that a file keeps makes the same recipe again, odd patterns included."""
    recipe = RECIPES["IQ2_M"]
    if name == "own":
        overrides = (Override('a"b\\.\t[é]', QuantType.Q8_0), Override(".", QuantType.F16))
        recipe = replace(recipe, name="own", output_type=QuantType.BF16, overrides=overrides)
    assert load_recipe(write(tmp_path, recipe_text(recipe))) == recipe


def test_options_go_before_the_file(tmp_path: Path) -> None:
    """What the command line says wins, and what it does not say stays."""
    recipe = with_overrides(
        load_recipe(write(tmp_path, CAREFUL)),
        tensor_types=["attn_v=Q8_0", "a=b=Q5_K"],
        output_type="BF16",
    )
    assert recipe.overrides[:2] == (
        Override("attn_v", QuantType.Q8_0),
        Override("a=b", QuantType.Q5_K),
    )
    assert len(recipe.overrides) == 4
    assert recipe.output_type == QuantType.BF16
    assert recipe.token_embedding_type == QuantType.Q8_0
    assert with_overrides(RECIPES["Q2_K"]) == RECIPES["Q2_K"]


def test_every_type_of_a_mix_may_be_asked_for() -> None:
    """Twenty types, those of all mixes together."""
    assert len(TENSOR_TYPES) == 20
    for name, quant_type in TENSOR_TYPES.items():
        assert with_overrides(RECIPES["F16"], output_type=name).output_type == quant_type


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = ", "is no TOML"),
        ('base = "Q4_K_M"', "name is None"),
        ('name = "x"', "base is None"),
        ('name = "../x"\nbase = "Q4_K_M"', "the name '../x' names no file"),
        ('name = "x"\nbase = "Q4_K"', "the base 'Q4_K' is no type; give one of F32"),
        ('name = "x"\nbase = "Q4_K_M"\nembeddings = "Q8_0"', "the unknown key 'embeddings'"),
        ('name = "x"\nbase = "Q4_K_M"\noutput_type = "Q4_K_M"', "Q4_K_M is no type of a tensor"),
        ('name = "x"\nbase = "Q4_K_M"\ntensors = "Q8_0"', "tensors is not a list"),
        ('name = "x"\nbase = "Q4_K_M"\n[[tensors]]\npattern = "a"', "needs a pattern and a type"),
        (
            'name = "x"\nbase = "Q4_K_M"\n[[tensors]]\npattern = "("\ntype = "Q8_0"',
            r"\(: is no regular expression",
        ),
        (
            'name = "x"\nbase = "Q4_K_M"\n[[tensors]]\npattern = "a"\ntype = "Q9"',
            "a: Q9 is no type of a tensor; give one of F32, F16",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, problem: str) -> None:
    """Each mistake is named with the file, and nothing is ignored in silence."""
    with pytest.raises(UsageError, match=rf"recipe\.toml.*{problem}"):
        load_recipe(write(tmp_path, text))


def test_bad_options(tmp_path: Path) -> None:
    """Options are checked as files are, and named."""
    with pytest.raises(UsageError, match="--tensor-type Q8_0: is not of the form PATTERN=TYPE"):
        with_overrides(RECIPES["Q4_K_M"], tensor_types=["Q8_0"])
    with pytest.raises(UsageError, match="--output-type: Q4 is no type of a tensor"):
        with_overrides(RECIPES["Q4_K_M"], output_type="Q4")
    with pytest.raises(UsageError, match=r"none\.toml: cannot be read"):
        load_recipe(str(tmp_path / "none.toml"))
