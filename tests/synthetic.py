"""Small random Qwen2 checkpoints, written in a moment, for tests that need shapes and no sense."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convert.calibration import Conversation
from convert.gptq import GptqSettings
from convert.gptq_format import packed_tensors, quantization_config
from convert.qwen2 import parse_config, tensor_specs
from convert.safetensors_writer import OutputTensor, write_shard

Array = npt.NDArray[np.float32]

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 259,
    "eos_token_id": 261,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 320,
}
GENERATION_CONFIG = {
    "bos_token_id": 259,
    "do_sample": True,
    "eos_token_id": [261, 259],
    "pad_token_id": 259,
    "repetition_penalty": 1.0,
    "temperature": 0.6,
    "top_k": 40,
    "top_p": 0.95,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def write_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, object] | None = None,
    dtype: str = "BF16",
    n_shards: int = 1,
    seed: int = 0,
    edit: Callable[[dict[str, Array]], None] | None = None,
) -> Path:
    """Write config, weights and tokenizer; `config` overrides CONFIG, `edit` changes tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = CONFIG | dict(config or {})
    model = parse_config(settings, "synthetic")
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for spec in tensor_specs(model):
        values = rng.normal(0.0, 0.05, spec.shape)
        if spec.name.endswith("norm.weight"):
            values += 1.0
        tensors[spec.name] = values.astype(np.float32)
    if edit is not None:
        edit(tensors)
    _dump(folder / "config.json", settings)
    _dump(folder / "generation_config.json", GENERATION_CONFIG)
    write_tokenizer(folder)
    names = list(tensors)
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::n_shards]}
        write_safetensors(folder / shard, part, dtype)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    _dump(folder / "model.safetensors.index.json", index)
    return folder


def write_gptq(
    folder: Path, *, config: Mapping[str, object] | None = None, bits: int = 4, seed: int = 0
) -> Path:
    """Write a GPTQ folder of random codes, groups of 32; `config` overrides CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    model = parse_config(CONFIG | dict(config or {}), "synthetic")
    settings = GptqSettings(bits=bits, group_size=32)
    rng = np.random.default_rng(seed)
    tensors: list[OutputTensor] = []
    for spec in tensor_specs(model):
        if spec.name.endswith("proj.weight"):
            tensors += packed_tensors(spec, settings)
        else:
            tensors.append(OutputTensor(spec.name, "F16", spec.shape, 2 * prod(spec.shape)))
    quantization = quantization_config(settings, {"quantizer": ["synthetic"]})
    table = CONFIG | dict(config or {}) | {"quantization_config": quantization}
    _dump(folder / "config.json", table)
    _dump(folder / "generation_config.json", GENERATION_CONFIG)
    write_tokenizer(folder)
    arrays = ((tensor.name, _random_part(tensor, rng)) for tensor in tensors)
    write_shard(folder / "model.safetensors", tensors, arrays)
    return folder


def _random_part(tensor: OutputTensor, rng: np.random.Generator) -> npt.NDArray[Any]:
    if tensor.name.endswith("g_idx"):
        return (np.arange(tensor.shape[0]) // 32).astype("<i4")
    if tensor.dtype == "I32":
        return rng.integers(-(1 << 31), 1 << 31, tensor.shape).astype("<i4")
    mean = 1.0 if tensor.name.endswith("norm.weight") else 0.0
    scale = 0.001 if tensor.name.endswith("scales") else 0.05
    return rng.normal(mean, scale, tensor.shape).astype("<f2")


def write_safetensors(path: Path, tensors: dict[str, Array], dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    offset = 0
    for name, values in tensors.items():
        data = _to_bytes(values, dtype)
        offsets = [offset, offset + len(data)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def write_tokenizer(
    folder: Path,
    *,
    n_merges: int = 3,
    added: Sequence[str] = (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS),
) -> None:
    """A byte-level BPE of 256 bytes, three merges or more and QwQ's kinds of added tokens."""
    alphabet = _byte_alphabet()
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    pairs = (pair for pair in product(alphabet, alphabet) if pair != merges[0])
    triples = ((a + b, c) for a, b, c in product(alphabet, repeat=3))
    merges += islice(chain(pairs, triples), n_merges - len(merges))
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    added_ids = {token: len(vocab) + i for i, token in enumerate(added)}
    added_tokens = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token.startswith("<|"),
        }
        for token, token_id in added_ids.items()
    ]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        "post_processor": byte_level | {"use_regex": False},
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    _dump(folder / "tokenizer.json", tokenizer)
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: token[key] for key in token if key != "id"}
            for token in added_tokens
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _dump(folder / "tokenizer_config.json", tokenizer_config)


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, by byte value."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(stand_ins)) for b in range(256)]


def _to_bytes(values: Array, dtype: str) -> bytes:
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    assert dtype == "BF16"
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def sums(n: int) -> list[Conversation]:
    """Conversations to calibrate on, of several lengths."""
    return [
        Conversation(
            kind="sum",
            messages=({"role": "user", "content": f"What is {7 * i} + {i * i}? The sum, then."},),
            reasoning=f"Line up {7 * i} and {i * i}; the ones first, then the tens. " * (1 + i % 3),
            answer=f"It is {7 * i + i * i}.",
        )
        for i in range(n)
    ]
