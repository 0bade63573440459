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
    codes = np.zeros((len(blocks), block_size(quant_type)), dtype=np.uint8)
    for move in _moves(quant_type):
        codes[:, move.columns] |= (blocks[:, move.places] >> move.shift & move.mask) << move.lowest
    return codes ^ np.uint8(LAYOUTS[quant_type].flipped)


def replace_codes(blocks: ByteArray, codes: Codes, quant_type: QuantType) -> ByteArray:
    """The same blocks with other codes."""
    stored = codes ^ np.uint8(LAYOUTS[quant_type].flipped)
    replaced = blocks.copy()
    for move in _moves(quant_type):
        kept = replaced[:, move.places] & ~(move.mask << move.shift)
        part = stored[:, move.columns] >> move.lowest & move.mask
        replaced[:, move.places] = kept | part << move.shift
    return replaced


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


@dataclass(frozen=True, slots=True)
class _Move:
    """Bits of some columns' codes that lie at the same place of as many different bytes.

    lowest: of the bits, in a code. shift: of the same bit, in a byte.
    """

    lowest: np.uint8
    mask: np.uint8
    shift: np.uint8
    columns: npt.NDArray[np.intp]
    places: npt.NDArray[np.intp]


@cache
def _moves(quant_type: QuantType) -> tuple[_Move, ...]:
    """All bits of all codes of a block."""
    moves = []
    lowest = 0
    for field in LAYOUTS[quant_type].fields:
        places, shifts = np.array([field.place(k) for k in range(block_size(quant_type))]).T
        mask = np.uint8((1 << field.n_bits) - 1)
        for shift in np.unique(shifts):
            (columns,) = np.nonzero(shifts == shift)
            moves.append(_Move(np.uint8(lowest), mask, np.uint8(shift), columns, places[columns]))
        lowest += field.n_bits
    return tuple(moves)
