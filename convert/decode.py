"""Blocks of a quant type -> rows of float32, by libggml's own decoders."""

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np

from convert.encode import ByteArray, Float32Array, QuantType, row_nbytes
from convert.libggml import libggml

_NUMBERS = {
    QuantType.F32: "<f4",
    QuantType.F16: "<f2",
    QuantType.F64: "<f8",
    QuantType.I8: "<i1",
    QuantType.I16: "<i2",
    QuantType.I32: "<i4",
    QuantType.I64: "<i8",
}
_SCRATCH = frozenset({QuantType.Q8_1, QuantType.Q8_K})
"""What llama.cpp computes with; no file has them and the library does not decode them."""


def can_decode(quant_type: QuantType) -> bool:
    return quant_type not in _SCRATCH


def decode_rows(blocks: ByteArray, quant_type: QuantType, n_in: int) -> Float32Array:
    """Decode rows just as llama.cpp does; several threads may call it.

    blocks: (n_rows, row_nbytes) uint8. n_in: weights of a row. Returns (n_rows, n_in) float32,
    with NaN or infinities where a block's scale holds them.
    """
    n_rows = len(blocks)
    assert blocks.shape == (n_rows, row_nbytes(quant_type, n_in)), (blocks.shape, quant_type, n_in)
    blocks = np.ascontiguousarray(blocks)
    if quant_type in _NUMBERS:
        with np.errstate(over="ignore", invalid="ignore"):
            numbers: Float32Array = blocks.view(_NUMBERS[quant_type]).astype(np.float32)
        return numbers
    if quant_type == QuantType.BF16:
        widened = np.left_shift(blocks.view("<u2"), 16, dtype=np.uint32)
        return cast("Float32Array", widened.view(np.float32))
    rows = np.empty((n_rows, n_in), dtype=np.float32)
    _decoder(quant_type)(blocks.ctypes.data, rows.ctypes.data, rows.size)
    return rows


@cache
def _decoder(quant_type: QuantType) -> Callable[[int, int, int], None]:
    assert can_decode(quant_type), quant_type
    traits = libggml().ggml_get_type_traits(int(quant_type)).contents
    decoder: Callable[[int, int, int], None] = traits.to_float
    return decoder
