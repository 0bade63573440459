"""What a GGUF file says of a model, key by key against its checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import gguf
import numpy as np

from convert.checkpoint import Checkpoint
from convert.gguf_header import MetadataValue
from convert.gguf_parts import GgufModel
from convert.inspection import shown_value
from convert.plan import described
from convert.qwen2 import Qwen2Config
from convert.tokenizer_metadata import add_tokenizer

_GRAVE = (
    "general.architecture",
    "qwen2.block_count",
    "qwen2.embedding_length",
    "qwen2.feed_forward_length",
    "qwen2.attention.",
    "qwen2.rope.",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.eos_token_id",
)
"""Beginnings of the keys that decide what the model computes, reads and where it ends."""
_GRAVE_IF_SAID = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
"""Where these are missing, readers put nothing around a text."""
_WORTH_A_NOTE = ("qwen2.", "tokenizer.", "general.sampling.")
_NO_SCALING = ("qwen2.rope.scaling.type", "none")
_NOTES_OF_CONFIG = ("context_length", "bos_token_id", "eos_token_ids", "pad_token_id")
"""Fields of a folder's config.json that do not decide what the model computes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A key that differs; `grave` where the file cannot work as the checkpoint does."""

    key: str
    words: str
    grave: bool


def metadata_differences(model: GgufModel, source: Checkpoint) -> list[Difference]:
    """Sizes, rope, tokenizer, template and sampling: what differs, the grave ones first.

    A key that stands only in the file counts where it changes rope; names, licences and tags do
    not count. Raises CheckpointError for a source whose tokenizer cannot be read.
    """
    return _differences(model.metadata, _metadata(described(source)))


def tokenizer_differences(folder: Path, source: Checkpoint) -> list[Difference]:
    """The same of a folder's tokenizer and template, by the keys that they would be in GGUF.

    Raises CheckpointError for a tokenizer of either that cannot be read.
    """
    found, expected = gguf.GGUFWriter(None, "qwen2"), gguf.GGUFWriter(None, "qwen2")
    add_tokenizer(found, folder, source.model.vocab_size)
    add_tokenizer(expected, source.path, source.model.vocab_size)
    return _differences(_metadata(found), _metadata(expected))


def _metadata(writer: gguf.GGUFWriter) -> dict[str, MetadataValue]:
    (found,) = writer.kv_data
    return {key: field.value for key, field in found.items()}


def _differences(
    metadata: Mapping[str, MetadataValue], expected: Mapping[str, MetadataValue]
) -> list[Difference]:
    only_here = [
        key
        for key, value in metadata.items()
        if key not in expected and ".rope.scaling." in key and (key, value) != _NO_SCALING
    ]
    differences = []
    for key in [*expected, *only_here]:
        found = metadata.get(key)
        words = _difference(found, expected.get(key))
        if words and key.startswith(_WORTH_A_NOTE + _GRAVE):
            grave = key.startswith(_GRAVE) or (found is not None and key in _GRAVE_IF_SAID)
            differences.append(Difference(key, words, grave))
    return sorted(differences, key=lambda one: not one.grave)


def config_differences(found: Qwen2Config, expected: Qwen2Config) -> list[Difference]:
    """The same of a folder's config.json."""
    differences = [
        Difference(
            f"config.json: {one.name}",
            f"is {getattr(found, one.name)} and {getattr(expected, one.name)} by the checkpoint",
            one.name not in _NOTES_OF_CONFIG,
        )
        for one in fields(Qwen2Config)
        if getattr(found, one.name) != getattr(expected, one.name)
    ]
    return sorted(differences, key=lambda one: not one.grave)


def _difference(found: MetadataValue | None, expected: MetadataValue | None) -> str:
    if found is None or expected is None:
        if expected is not None:
            return f"is missing, and {shown_value(expected)} by the checkpoint"
        return "" if found is None else f"is {shown_value(found)}, and missing by the checkpoint"
    if isinstance(found, list | np.ndarray) and isinstance(expected, list | np.ndarray):
        return _difference_of_lists(_plain(found), _plain(expected))
    if isinstance(found, float) and isinstance(expected, int | float):
        same = np.float32(found) == np.float32(expected)
    else:
        same = bool(found == expected)
    if same:
        return ""
    if isinstance(found, str) and isinstance(expected, str) and len(found) + len(expected) > 80:
        where = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
            min(len(found), len(expected)),
        )
        here, there = found[where : where + 20], expected[where : where + 20]
        return (
            f"differs from the checkpoint's from character {where:,} on "
            f"({shown_value(here)!r} and {shown_value(there)!r})"
        )
    return f"is {shown_value(found)} and {shown_value(expected)} by the checkpoint"


def _difference_of_lists(found: Sequence[object], expected: Sequence[object]) -> str:
    if len(found) != len(expected):
        return f"has {len(found):,} entries and the checkpoint's {len(expected):,}"
    differing = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    if not differing:
        return ""
    first = differing[0]
    return (
        f"differs from the checkpoint's in {len(differing):,} of {len(found):,} entries, first in "
        f"{first}: {shown_value(str(found[first]))} and {shown_value(str(expected[first]))}"
    )


def _plain(values: MetadataValue) -> list[object]:
    items = values.tolist() if isinstance(values, np.ndarray) else list(values)  # type: ignore[arg-type]
    return [item.decode() if isinstance(item, bytes) else item for item in items]
