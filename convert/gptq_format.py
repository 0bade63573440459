"""GPTQ's file format: codes packed into int32; version 1 stores zeros minus one, 2 as they are.

Readers: AutoGPTQ (which defined it), GPTQModel, transformers, vLLM.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from convert.errors import CheckpointError
from convert.gptq import GptqSettings, GptqSolution
from convert.qwen2 import TensorSpec
from convert.safetensors_writer import OutputTensor

CODES_PER_PACK = 32  # any number of bits then fills whole int32 words

Codes = npt.NDArray[np.uint8]
Packed = npt.NDArray[np.int32]


def packed_tensors(spec: TensorSpec, settings: GptqSettings) -> Iterator[OutputTensor]:
    """The four tensors that stand for one linear's weight, in the order in which they are written.

    Raises CheckpointError where the linear's sizes do not fit the format.
    """
    n_out, n_in = spec.shape
    group_size = settings.columns_per_group(n_in)
    if n_in % group_size or n_in % CODES_PER_PACK or n_out % CODES_PER_PACK:
        raise CheckpointError(
            f"{spec.name}: of shape {list(spec.shape)}, its inputs do not divide by the group size "
            f"{group_size} or its sizes by {CODES_PER_PACK}; choose a smaller group size"
        )
    n_groups, bits = n_in // group_size, settings.bits
    base = spec.name.removesuffix(".weight")
    for suffix, dtype, shape, item_nbytes in (
        ("qweight", "I32", (n_in * bits // 32, n_out), 4),
        ("qzeros", "I32", (n_groups, n_out * bits // 32), 4),
        ("scales", "F16", (n_groups, n_out), 2),
        ("g_idx", "I32", (n_in,), 4),
    ):
        nbytes = item_nbytes * int(np.prod(shape, dtype=np.int64))
        yield OutputTensor(f"{base}.{suffix}", dtype, shape, nbytes)


def packed_arrays(
    name: str, solution: GptqSolution, settings: GptqSettings
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The contents of packed_tensors()."""
    base = name.removesuffix(".weight")
    codes, scales, zeros, group_of = (
        tensor.cpu().numpy()
        for tensor in (solution.codes, solution.scales, solution.zeros, solution.group_of)
    )
    stored_zeros = zeros.T - np.uint8(settings.version == 1)  # (n_groups, n_out)
    yield f"{base}.qweight", np.ascontiguousarray(pack(codes, settings.bits).T)
    yield f"{base}.qzeros", pack(np.ascontiguousarray(stored_zeros), settings.bits)
    yield f"{base}.scales", np.ascontiguousarray(scales.T)
    yield f"{base}.g_idx", group_of.astype("<i4")


def pack(codes: Codes, bits: int) -> Packed:
    """Pack each row of codes, (n_rows, n), as one little-endian stream of bits in int32 words.

    n must divide by 32. Returns (n_rows, n * bits / 32).
    """
    n_rows, n = codes.shape
    assert n % CODES_PER_PACK == 0, n
    packed = np.empty((n_rows, n * bits // 8), dtype=np.uint8)
    for row in range(n_rows):  # one row at a time: spread out, the bits take eight times the room
        spread = codes[row, :, None] >> np.arange(bits, dtype=np.uint8) & 1  # (n, bits)
        packed[row] = np.packbits(spread, bitorder="little")
    words: Packed = packed.view("<i4")
    return words


def unpack(words: Packed, bits: int) -> Codes:
    """Undo pack(): (n_rows, n_words) int32 to (n_rows, 32 n_words / bits) codes."""
    n_rows, n_words = words.shape
    stream = np.unpackbits(
        np.ascontiguousarray(words).astype("<i4").view(np.uint8), axis=1, bitorder="little"
    )
    spread = stream.reshape(n_rows, n_words * 32 // bits, bits)
    codes: Codes = (spread << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    return codes


def quantization_config(settings: GptqSettings, meta: dict[str, Any]) -> dict[str, Any]:
    """What config.json and quantize_config.json say of the format; both spellings of its name."""
    checkpoint_format = "gptq" if settings.version == 1 else "gptq_v2"
    return {
        "bits": settings.bits,
        "checkpoint_format": checkpoint_format,
        "damp_percent": settings.damp,
        "desc_act": settings.order == "activations",
        "format": checkpoint_format,
        "group_size": settings.group_size,
        "lm_head": False,
        "meta": meta,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "static_groups": False,
        "sym": settings.symmetric,
        "true_sequential": True,
    }
