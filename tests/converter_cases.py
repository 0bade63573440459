"""Checkpoints of every kind that changes what llama.cpp's converter says of a model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.gguf_header import MetadataValue, read_header
from tests.synthetic import GENERATION_CONFIG, write_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "converter_metadata.json"
"""What llama.cpp's converter writes for each case; made by tests/golden/make.py."""

ONE_LAYER = {"num_hidden_layers": 1, "max_window_layers": 1}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CARD = """---
license: apache-2.0
license_link: https://huggingface.co/Qwen/QWQ-32B/blob/main/LICENSE
language:
- en
pipeline_tag: text-generation
base_model: Qwen/Qwen2.5-32B
tags:
- chat
library_name: transformers
---
# QwQ-32B
"""

Edit = Callable[[Path], None]


def config_of(**changes: object) -> Edit:
    return edit_json("config.json", changes)


def edit_json(file_name: str, changes: dict[str, object]) -> Edit:
    """Set keys of a JSON file; None takes them out."""

    def edit(folder: Path) -> None:
        table = json.loads((folder / file_name).read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in table.items() if value is not None}
        (folder / file_name).write_text(json.dumps(kept, indent=2), encoding="utf-8")

    return edit


def _write(file_name: str, text: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / file_name).write_text(text, encoding="utf-8")

    return edit


def _template_in_a_file(folder: Path) -> None:
    edit_json("tokenizer_config.json", {"chat_template": None})(folder)
    _write("chat_template.jinja", "of a file: {{ messages }}<think>")(folder)


def _nothing(_folder: Path) -> None:
    pass


CASES: dict[str, tuple[str, Edit]] = {
    "plain": ("random", _nothing),
    "named and sized": ("QwQ-32B", _nothing),
    "model card": ("QwQ-32B", _write("README.md", CARD)),
    "YaRN": ("random", config_of(rope_scaling=YARN)),
    "YaRN with its parameters": (
        "random",
        config_of(rope_scaling=YARN | {"attention_factor": 1.2, "beta_fast": 16.0, "beta_slow": 2}),
    ),
    "YaRN in rope_parameters": (
        "random",
        config_of(
            rope_theta=None,
            rope_parameters={
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 32768,
            },
        ),
    ),
    "default rope_parameters": (
        "random",
        config_of(rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    ),
    "linear scaling": ("random", config_of(rope_scaling={"type": "linear", "factor": 2.0})),
    "head size given": ("random", config_of(head_dim=32)),
    "tied embeddings": ("random", config_of(tie_word_embeddings=True)),
    "template in a file": ("random", _template_in_a_file),
    "template that opens no thought": (
        "random",
        edit_json("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
    ),
    "bos asked for": (
        "random",
        edit_json("tokenizer_config.json", {"bos_token": "<|endoftext|>", "add_bos_token": True}),
    ),
    "other sampling": (
        "random",
        edit_json(
            "generation_config.json",
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        ),
    ),
    "no sampling": (
        "random",
        edit_json("generation_config.json", dict.fromkeys(GENERATION_CONFIG)),
    ),
    "no generation config": ("random", lambda folder: (folder / "generation_config.json").unlink()),
}


def write_case(name: str, root: Path) -> Path:
    """Write the checkpoint of a case below root; only its last folder's name is in the file."""
    folder_name, edit = CASES[name]
    config = ONE_LAYER | {"tie_word_embeddings": name == "tied embeddings"}
    folder = write_checkpoint(root / folder_name, config=config)
    edit(folder)
    return folder


def comparable(metadata: dict[str, MetadataValue]) -> dict[str, object]:
    """As JSON keeps it: long arrays as their SHA-256, float32 as they print."""
    return {key: _comparable(value) for key, value in metadata.items()}


def _comparable(value: MetadataValue) -> object:
    if isinstance(value, list | np.ndarray):
        items = value.tolist() if isinstance(value, np.ndarray) else value
        text = json.dumps(items, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return items if len(items) <= 16 else f"{len(items)} items, SHA-256 {digest}"
    return float(f"{value:.7g}") if isinstance(value, float) else value


def metadata_of(path: Path) -> dict[str, object]:
    return comparable(read_header(path).metadata)
