"""What a GPTQ folder says of a model otherwise than its checkpoint: what no weight shows."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.gptq_folder import open_gptq
from convert.metadata_parity import config_differences, tokenizer_differences
from qwq_local.description import describe_folder, read_json

WITHOUT_EFFECT = frozenset({"_from_model_config", "eos_token_id", "transformers_version"})
"""Keys of generation_config.json that are not compared; the ends of a reply are, by their ids."""


def folder_differences(folder: Path, source: Checkpoint) -> Iterator[str]:
    """In words: sizes, rope, tokenizer, template, ends of a reply, defaults of sampling.

    Raises QwqError where a file of the folder is missing or cannot be read.
    """
    differences = tokenizer_differences(folder, source)
    if (model := open_gptq(folder).model) is not None:
        differences += config_differences(model, source.model)
    yield from (f"{one.key} {one.words}" for one in differences)
    here, there = describe_folder(folder), describe_folder(source.path)
    yield from _differences("stop ids", {"": sorted(here.stop_ids)}, {"": sorted(there.stop_ids)})
    yield from _differences("token", here.template_variables, there.template_variables)
    yield from _differences(
        "generation_config.json:", _generation(folder), _generation(source.path)
    )


def _generation(folder: Path) -> dict[str, Any]:
    table = read_json(folder / "generation_config.json", optional=True)
    return {key: value for key, value in table.items() if key not in WITHOUT_EFFECT}


def _differences(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            name = f"{what} {key}".rstrip()
            yield f"{name} is {here.get(key)} and {there.get(key)} by the checkpoint"
