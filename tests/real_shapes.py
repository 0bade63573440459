"""A checkpoint with QwQ-32B's tensor shapes and vocabulary, a few layers and random weights.

python -m tests.real_shapes FOLDER [N_LAYERS]   (3.1 GB, and 1 GB a layer)
"""

import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.qwen2 import parse_config, tensor_specs
from convert.safetensors_writer import OutputTensor, write_index, write_shard
from tests.synthetic import GENERATION_CONFIG, write_tokenizer

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 40960,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
N_MERGES = 151_643 - 256
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad") for end in ("start", "end")),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>"),
    *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
    *("<|repo_name|>", "<|file_sep|>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
"""QwQ-32B's, from id 151643 on."""

Weights = npt.NDArray[np.uint16]
"""bfloat16, as its bits."""

_N_DRAWN = 1 << 22
"""Random weights that are drawn; every tensor begins elsewhere in them."""


def write_real_shapes(folder: Path, *, n_layers: int = 2, seed: int = 0) -> Path:
    """Write config, tokenizer and shards; weights are normal with QwQ's typical deviation, 0.02."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"num_hidden_layers": n_layers}
    generation = GENERATION_CONFIG | {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "eos_token_id": [151645, 151643],
    }
    for name, table in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(table, indent=2), encoding="utf-8")
    write_tokenizer(folder, n_merges=N_MERGES, added=ADDED_TOKENS)
    tensors = [
        OutputTensor(spec.name, "BF16", spec.shape, 2 * prod(spec.shape))
        for spec in tensor_specs(parse_config(config, "real shapes"))
    ]
    half = len(tensors) // 2
    shards = {
        "model-00001-of-00002.safetensors": tensors[:half],
        "model-00002-of-00002.safetensors": tensors[half:],
    }
    for number, (name, members) in enumerate(shards.items()):
        write_shard(folder / name, members, _weights(members, seed + number))
    write_index(folder, shards)
    return folder


def _weights(tensors: list[OutputTensor], seed: int) -> Iterator[tuple[str, Weights]]:
    """Each tensor in pieces, as bfloat16; the weights of norms lie around 1."""
    random = np.random.default_rng(seed)
    normal = random.normal(size=_N_DRAWN).astype(np.float32)
    drawn = {mean: _bfloat16(mean + 0.02 * normal) for mean in (0.0, 1.0)}
    for tensor in tensors:
        source = drawn[1.0 if tensor.name.endswith("norm.weight") else 0.0]
        n_left = prod(tensor.shape)
        while n_left:
            start = int(random.integers(0, _N_DRAWN))
            piece = source[start : start + n_left]
            yield tensor.name, piece
            n_left -= len(piece)


def _bfloat16(values: npt.NDArray[np.float32]) -> Weights:
    bits: Weights = (values.view(np.uint32) >> 16).astype("<u2")
    return bits


if __name__ == "__main__":
    write_real_shapes(Path(sys.argv[1]), n_layers=int(sys.argv[2]) if len(sys.argv) > 2 else 2)
