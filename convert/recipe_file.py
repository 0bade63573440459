"""Recipes of one's own: a mix with overrides, from a TOML file or from options, and back to text.

examples/recipe.toml shows all that a file may hold.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.encode import QuantType
from convert.errors import UsageError
from convert.recipe import RECIPES, Override, Recipe, find_recipe

TENSOR_TYPES = {
    quant_type.name: quant_type
    for quant_type in sorted(
        {recipe.default for recipe in RECIPES.values()}
        | {rule.quant_type for recipe in RECIPES.values() for rule in recipe.rules}
    )
}
"""Types that a single tensor may be given."""

_KEYS = {"name", "base", "about", "token_embedding_type", "output_type", "tensors"}
_NAME = re.compile(r"\w[\w.+-]*")


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by its name, or from a file whose name ends in .toml; raises UsageError."""
    if not name_or_path.lower().endswith(".toml"):
        return find_recipe(name_or_path)
    path = Path(name_or_path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UsageError(f"{path}: is no TOML ({error}); see examples/recipe.toml") from error
    return _parse_recipe(table, str(path))


def with_overrides(
    recipe: Recipe,
    *,
    tensor_types: Sequence[str] = (),
    token_embedding_type: str | None = None,
    output_type: str | None = None,
) -> Recipe:
    """A recipe with what the options say; they go before what it holds already.

    tensor_types: PATTERN=TYPE each, the first that is found in a tensor's name decides.
    Raises UsageError.
    """
    overrides: list[Override] = []
    for text in tensor_types:
        pattern, _, type_name = text.rpartition("=")
        if not pattern:
            raise UsageError(f"--tensor-type {text}: is not of the form PATTERN=TYPE")
        overrides.append(_override(pattern, type_name, "--tensor-type"))
    embedding, output = recipe.token_embedding_type, recipe.output_type
    if token_embedding_type is not None:
        embedding = _tensor_type(token_embedding_type, "--token-embedding-type")
    if output_type is not None:
        output = _tensor_type(output_type, "--output-type")
    changed = replace(
        recipe,
        token_embedding_type=embedding,
        output_type=output,
        overrides=(*overrides, *recipe.overrides),
    )
    return recipe if changed == recipe else replace(changed, about="")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML that load_recipe reads back to the same."""
    base = next(base for base in RECIPES.values() if base.file_type == recipe.file_type)
    lines = [f"name = {json.dumps(recipe.name)}", f"base = {json.dumps(base.name)}"]
    if recipe.about:
        lines.append(f"about = {json.dumps(recipe.about)}")
    if recipe.token_embedding_type is not None:
        lines.append(f'token_embedding_type = "{recipe.token_embedding_type.name}"')
    if recipe.output_type is not None:
        lines.append(f'output_type = "{recipe.output_type.name}"')
    for override in recipe.overrides:
        pattern = json.dumps(override.pattern)
        lines += ["", "[[tensors]]", f"pattern = {pattern}", f'type = "{override.quant_type.name}"']
    return "\n".join(lines) + "\n"


def _parse_recipe(table: Mapping[str, Any], source: str) -> Recipe:
    unknown = table.keys() - _KEYS
    if unknown:
        raise UsageError(
            f"{source}: has the unknown key {min(unknown)!r}; known are {', '.join(sorted(_KEYS))}"
        )
    name, base = _text(table, "name", source), _text(table, "base", source)
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{source}: the name {name!r} names no file; use letters, digits, dots and dashes"
        )
    if base.upper() not in RECIPES:
        known = ", ".join(RECIPES)
        raise UsageError(f"{source}: the base {base!r} is no type; give one of {known}")
    entries = table.get("tensors", [])
    if not isinstance(entries, list):
        raise UsageError(f"{source}: tensors is not a list; write [[tensors]] before each")
    overrides: list[Override] = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"pattern", "type"}:
            raise UsageError(f"{source}: each of [[tensors]] needs a pattern and a type alone")
        pattern, type_name = _text(entry, "pattern", source), _text(entry, "type", source)
        overrides.append(_override(pattern, type_name, source))
    return replace(
        RECIPES[base.upper()],
        name=name,
        token_embedding_type=_optional_type(table, "token_embedding_type", source),
        output_type=_optional_type(table, "output_type", source),
        overrides=tuple(overrides),
        about=_text(table, "about", source) if "about" in table else "",
    )


def _text(table: Mapping[str, Any], key: str, source: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f'{source}: {key} is {value!r}; write {key} = "..."')
    return value


def _optional_type(table: Mapping[str, Any], key: str, source: str) -> QuantType | None:
    return _tensor_type(_text(table, key, source), f"{source}: {key}") if key in table else None


def _override(pattern: str, type_name: str, source: str) -> Override:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"{source} {pattern}: is no regular expression ({error}); escape dots with \\."
        ) from error
    return Override(pattern, _tensor_type(type_name, f"{source} {pattern}"))


def _tensor_type(name: str, source: str) -> QuantType:
    quant_type = TENSOR_TYPES.get(name.upper())
    if quant_type is None:
        known = ", ".join(TENSOR_TYPES)
        raise UsageError(f"{source}: {name} is no type of a tensor; give one of {known}")
    return quant_type
