"""Where the codes of a quant type's block lie: read and replace them, scales untouched.

A code is the number that a weight becomes between its block's scales; it counts from the lowest
value up. What a code is worth is never computed here: libggml's decoder says it.
Source: ggml's ggml-common.h and ggml-quants.c, the structs block_* and dequantize_row_*.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from convert.decode import decode_rows
from convert.encode import ByteArray, Float32Array, QuantType, block_size

Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Field:
    """n_bits bits of every code: column -> (byte in the block, lowest bit in that byte)."""

    n_bits: int
    place: Callable[[int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """The fields of a code from its lowest bits up.

    flipped: bits that are stored inverted. lowest: the least code that the encoder uses.
    is_affine: a code's value is offset + step * code, both of its own few columns.
    """

    fields: tuple[Field, ...]
    flipped: int = 0
    lowest: int = 0
    is_affine: bool = True

    @property
    def n_bits(self) -> int:
        return sum(field.n_bits for field in self.fields)

    @property
    def highest(self) -> int:
        return (1 << self.n_bits) - 1


def _nibbles(start: int, group: int) -> Field:
    """Groups of columns, the first half of each in the low bits, the second in the high ones."""
    half = group // 2
    return Field(4, lambda k: (start + k // group * half + k % half, k % group // half * 4))


def _pairs(start: int) -> Field:
    """Two bits of 128 columns in 32 bytes, quarter by quarter."""
    return Field(2, lambda k: (start + k // 128 * 32 + k % 32, k % 128 // 32 * 2))


def _single(start: int) -> Field:
    """One bit of 256 columns in 32 bytes, eighth by eighth."""
    return Field(1, lambda k: (start + k % 32, k // 32))


LAYOUTS = {
    QuantType.Q8_0: CodeLayout((Field(8, lambda k: (2 + k, 0)),), flipped=0x80, lowest=1),
    QuantType.Q4_0: CodeLayout((_nibbles(2, 32),)),
    QuantType.Q6_K: CodeLayout((_nibbles(0, 128), _pairs(128))),
    QuantType.Q5_K: CodeLayout((_nibbles(48, 64), _single(16))),
    QuantType.Q4_K: CodeLayout((_nibbles(16, 64),)),
    QuantType.Q3_K: CodeLayout((_pairs(32), _single(0))),
    QuantType.Q2_K: CodeLayout((_pairs(16),)),
    QuantType.IQ4_XS: CodeLayout((_nibbles(8, 32),), is_affine=False),
}


def read_codes(blocks: ByteArray, quant_type: QuantType) -> Codes:
    """The codes of blocks of one column range: (n_rows, block_nbytes) to (n_rows, block_size)."""
    bits = np.unpackbits(blocks, axis=1, bitorder="little")[:, _positions(quant_type)]
    weights = (1 << np.arange(LAYOUTS[quant_type].n_bits)).astype(np.uint8)
    codes: Codes = (bits * weights).sum(axis=2, dtype=np.uint8)
    return codes ^ np.uint8(LAYOUTS[quant_type].flipped)


def replace_codes(blocks: ByteArray, codes: Codes, quant_type: QuantType) -> ByteArray:
    """The same blocks with other codes."""
    layout = LAYOUTS[quant_type]
    bits = np.unpackbits(blocks, axis=1, bitorder="little")
    stored = codes ^ np.uint8(layout.flipped)
    bits[:, _positions(quant_type)] = stored[:, :, None] >> np.arange(layout.n_bits) & 1
    return np.packbits(bits, axis=1, bitorder="little")


def code_values(blocks: ByteArray, codes: range, quant_type: QuantType) -> Float32Array:
    """What each of some codes is worth in each column, (n_codes, n_rows, block_size)."""
    shape = (len(blocks), block_size(quant_type))
    values = [
        decode_rows(
            replace_codes(blocks, np.full(shape, code, dtype=np.uint8), quant_type),
            quant_type,
            shape[1],
        )
        for code in codes
    ]
    return np.stack(values)


@cache
def _positions(quant_type: QuantType) -> npt.NDArray[np.int64]:
    """Every code bit's place among the block's bits, (block_size, n_bits)."""
    table = []
    for column in range(block_size(quant_type)):
        row: list[int] = []
        for field in LAYOUTS[quant_type].fields:
            byte, bit = field.place(column)
            row += range(8 * byte + bit, 8 * byte + bit + field.n_bits)
        table.append(row)
    return np.array(table, dtype=np.int64)
