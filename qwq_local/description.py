"""What a model's files say about running it: template, sampling, stop tokens, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import CheckpointError, GgufError, QwqError
from qwq_local.sampling import Sampling, sampling_of_generation_config, sampling_of_gguf

if TYPE_CHECKING:
    from convert.gguf_header import GgufHeader

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Description:
    """What QwQ needs of a model beside an engine.

    template: jinja2 source. template_variables: the special tokens that templates may name.
    stop_ids: the ids that end a reply according to the files.
    """

    name: str
    template: str
    template_variables: Mapping[str, str]
    sampling: Sampling
    stop_ids: frozenset[int]


def describe_gguf(path: Path, header: GgufHeader) -> Description:
    """Raises GgufError where the file has no chat template or tokens."""
    metadata = header.metadata
    template = metadata.get("tokenizer.chat_template")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(template, str) or not isinstance(tokens, list):
        missing = "chat template" if isinstance(tokens, list) else "tokenizer"
        raise GgufError(f"{path}: it has no {missing}; convert the checkpoint again")
    ids = {
        name: token_id
        for name in _TOKEN_NAMES
        if isinstance(token_id := metadata.get(_gguf_token_key(name)), int)
        and 0 <= token_id < len(tokens)
    }
    return Description(
        name=str(metadata.get("general.name", path.stem)),
        template=template,
        template_variables={name: tokens[token_id] for name, token_id in ids.items()},
        sampling=_sampling(path, sampling_of_gguf, metadata),
        stop_ids=frozenset({ids["eos_token"]} if "eos_token" in ids else ()),
    )


def describe_folder(path: Path) -> Description:
    """Of a checkpoint's folder, quantized or not. Raises CheckpointError for a missing file."""
    tokenizer = read_json(path / "tokenizer_config.json")
    generation = read_json(path / "generation_config.json", optional=True)
    config = read_json(path / "config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    stop_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token_id) is int for token_id in stop_ids):
        raise CheckpointError(
            f"{path}: eos_token_id is {str(eos)[:40]!r}, no token's id; fetch "
            "generation_config.json and config.json again"
        )
    return Description(
        name=path.resolve().name,
        template=_template_of_folder(path, tokenizer),
        template_variables={
            name: text
            for name in _TOKEN_NAMES
            if (text := _token_text(tokenizer.get(name))) is not None
        },
        sampling=_sampling(path, sampling_of_generation_config, generation),
        stop_ids=frozenset(stop_ids),
    )


def _sampling(
    path: Path, read: Callable[[Mapping[str, Any]], Sampling], table: Mapping[str, Any]
) -> Sampling:
    try:
        return read(table)
    except QwqError as error:
        raise QwqError(f"{path}: among its defaults of sampling {error}") from error


def is_gptq(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a GPTQ folder."""
    match config.get("quantization_config"):
        case {"quant_method": "gptq"}:
            return True
    return False


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds; {} where an optional one is missing."""
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; fetch the file again")
    return value


def _template_of_folder(path: Path, tokenizer: Mapping[str, Any]) -> str:
    """The template has its own file, or stands in tokenizer_config.json, alone or in a list."""
    if (own_file := path / "chat_template.jinja").exists():
        try:
            return own_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{own_file}: cannot be read ({error}); fetch the file again"
            ) from error
    template = tokenizer.get("chat_template")
    if isinstance(template, list):
        template = next(
            (
                entry.get("template")
                for entry in template
                if isinstance(entry, dict) and entry.get("name") == "default"
            ),
            None,
        )
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path}: it has no chat template, neither in chat_template.jinja nor in "
            "tokenizer_config.json; fetch these files from the original"
        )
    return template


def _token_text(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _gguf_token_key(name: str) -> str:
    key = {"pad_token": "padding", "unk_token": "unknown"}.get(name, name.removesuffix("_token"))
    return f"tokenizer.ggml.{key}_token_id"
