"""What llama.cpp takes for granted of a GGUF file, and dies of where it is not so."""

import math
from pathlib import Path

from convert.encode import QuantType
from convert.errors import GgufError
from convert.gguf_header import GgufHeader

ARCHITECTURE = "qwen2"
_LARGEST_SIZES = {
    "context_length": 1 << 24,
    "block_count": 512,
    "embedding_length": 1 << 20,
    "attention.head_count": 1 << 16,
    "attention.head_count_kv": 1 << 16,
}
_POSITIVE = {"attention.layer_norm_rms_epsilon": 1.0, "rope.freq_base": 1e12}
_TOKENIZER_MODEL = "gpt2"  # GGUF's name of byte-level BPE
_NO_WEIGHTS = (QuantType.I8, QuantType.I16, QuantType.I32, QuantType.I64, QuantType.F64)


def check_model(path: Path, header: GgufHeader) -> dict[str, int]:
    """The numbers that the size of a context follows from, by their names.

    Raises GgufError for another architecture, and for sizes, constants, tokens and types with
    which llama.cpp would end the process.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise GgufError(
            f"{path}: its architecture is {_short(architecture)} and QwQ's is {ARCHITECTURE!r}; "
            "give a file made from QwQ or another Qwen2 model"
        )
    sizes = {}
    for name, largest in _LARGEST_SIZES.items():
        value = metadata.get(f"{ARCHITECTURE}.{name}")
        if not isinstance(value, int) or not 1 <= value <= largest:
            raise GgufError(
                f"{path}: {ARCHITECTURE}.{name} is {_short(value)} and must be 1 to {largest:,}; "
                "make the file again"
            )
        sizes[name] = value
    for name, limit in _POSITIVE.items():
        number = metadata.get(f"{ARCHITECTURE}.{name}", limit)
        if not isinstance(number, float) or not math.isfinite(number) or not 0 < number <= limit:
            raise GgufError(
                f"{path}: {ARCHITECTURE}.{name} is {_short(number)} and must be above 0 and at "
                f"most {limit:g}; make the file again"
            )
    _check_tokens(path, header)
    for tensor in header.tensors.values():
        if tensor.quant_type in _NO_WEIGHTS:
            raise GgufError(
                f"{path}: {tensor.name} is stored as {tensor.quant_type.name}, which is no type of "
                "weights; make the file again"
            )
    return sizes


def _check_tokens(path: Path, header: GgufHeader) -> None:
    """Tokens differ from each other, also for who reads each up to its first zero byte."""
    model = header.metadata.get("tokenizer.ggml.model")
    if model != _TOKENIZER_MODEL:
        raise GgufError(
            f"{path}: tokenizer.ggml.model is {_short(model)} and QwQ's is {_TOKENIZER_MODEL!r}; "
            "convert the checkpoint again"
        )
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise GgufError(f"{path}: it has no tokenizer; convert the checkpoint again")
    n_different = len(set(tokens))
    if n_different < len(tokens) or any("\0" in token for token in tokens):
        raise GgufError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens):,} tokens, {n_different:,} different "
            "ones, or a zero byte in one; make the file again"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
