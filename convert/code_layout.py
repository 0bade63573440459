"""Where the numbers of a quant type's block lie: its codes, and the scales that they count in.

A code is what a weight becomes between its block's scales; it counts from the lowest value up. A
scale is a whole number, one for some columns each, and what it counts in is a float16 number of the
block. What any of them is worth is never computed here: libggml's decoder says it.
Source: ggml's ggml-common.h and ggml-quants.c, the structs block_* and dequantize_row_*.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from convert.decode import decode_rows
from convert.encode import ByteArray, Float32Array, QuantType, block_size

Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Field:
    """n_bits bits of every number: its index -> (byte in the block, lowest bit in that byte)."""

    n_bits: int
    place: Callable[[int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Packed:
    """n whole numbers of a block, each in the same fields, from their lowest bits up.

    flipped: bits that are stored inverted. lowest: the least number that the encoder uses.
    worthless: the number that stands for 0.
    """

    n: int
    fields: tuple[Field, ...]
    flipped: int = 0
    lowest: int = 0
    worthless: int = 0

    @property
    def highest(self) -> int:
        return (1 << sum(field.n_bits for field in self.fields)) - 1

    def read(self, blocks: ByteArray) -> Codes:
        """Of blocks of one column range, (n_rows, block_nbytes): (n_rows, n)."""
        numbers = np.zeros((len(blocks), self.n), dtype=np.uint8)
        for move in _moves(self):
            bits = blocks[:, move.places] >> move.shift & move.mask
            numbers[:, move.indices] |= bits << move.lowest
        return numbers ^ np.uint8(self.flipped)

    def replace(self, blocks: ByteArray, numbers: Codes) -> ByteArray:
        """The same blocks with other numbers."""
        stored = numbers ^ np.uint8(self.flipped)
        replaced = blocks.copy()
        for move in _moves(self):
            kept = replaced[:, move.places] & ~(move.mask << move.shift)
            part = stored[:, move.indices] >> move.lowest & move.mask
            replaced[:, move.places] = kept | part << move.shift
        return replaced

    def fill(self, blocks: ByteArray, number: int) -> ByteArray:
        """The same blocks with one number throughout."""
        return self.replace(blocks, np.full((len(blocks), self.n), number, dtype=np.uint8))


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A block's numbers.

    scales: of the codes, then of the minimums where there are any. units: where the float16 numbers
    lie that scales, or the codes themselves, count in. is_affine: a code's value is
    offset + step * code, both of its own few columns.
    """

    codes: Packed
    units: tuple[int, ...]
    scales: tuple[Packed, ...] = ()
    is_affine: bool = True


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


_EIGHT_SCALES = (
    Packed(
        8,
        (
            Field(4, lambda j: (4 + j + j // 4 * 4, 0)),
            Field(2, lambda j: (4 + j % 4, 4 + j // 4 * 2)),
        ),
    ),
    Packed(
        8,
        (
            Field(4, lambda j: (8 + j, j // 4 * 4)),
            Field(2, lambda j: (8 + j % 4, 4 + j // 4 * 2)),
        ),
    ),
)
"""Q4_K's and Q5_K's, of 32 columns each: six bits, the last four's are in two pieces."""

LAYOUTS = {
    QuantType.Q8_0: BlockLayout(
        Packed(32, (Field(8, lambda k: (2 + k, 0)),), flipped=0x80, lowest=1), units=(0,)
    ),
    QuantType.Q4_0: BlockLayout(Packed(32, (_nibbles(2, 32),)), units=(0,)),
    QuantType.Q6_K: BlockLayout(
        Packed(256, (_nibbles(0, 128), _pairs(128))),
        units=(208,),
        scales=(Packed(16, (Field(8, lambda j: (192 + j, 0)),), flipped=0x80, worthless=128),),
    ),
    QuantType.Q5_K: BlockLayout(
        Packed(256, (_nibbles(48, 64), _single(16))), units=(0, 2), scales=_EIGHT_SCALES
    ),
    QuantType.Q4_K: BlockLayout(
        Packed(256, (_nibbles(16, 64),)), units=(0, 2), scales=_EIGHT_SCALES
    ),
    QuantType.Q3_K: BlockLayout(
        Packed(256, (_pairs(32), _single(0))),
        units=(108,),
        scales=(
            Packed(
                16,
                (
                    Field(4, lambda j: (96 + j % 8, j // 8 * 4)),
                    Field(2, lambda j: (104 + j % 4, j // 4 * 2)),
                ),
                worthless=32,
            ),
        ),
    ),
    QuantType.Q2_K: BlockLayout(
        Packed(256, (_pairs(16),)),
        units=(80, 82),
        scales=(
            Packed(16, (Field(4, lambda j: (j, 0)),)),
            Packed(16, (Field(4, lambda j: (j, 4)),)),
        ),
    ),
    QuantType.IQ4_XS: BlockLayout(
        Packed(256, (_nibbles(8, 32),)),
        units=(0,),
        scales=(
            Packed(
                8,
                (
                    Field(4, lambda j: (4 + j // 2, j % 2 * 4)),
                    Field(2, lambda j: (2 + j // 4, j % 4 * 2)),
                ),
                worthless=32,
            ),
        ),
        is_affine=False,
    ),
}


def code_values(blocks: ByteArray, codes: range, quant_type: QuantType) -> Float32Array:
    """What each of some codes is worth in each column, (n_codes, n_rows, block_size)."""
    layout = LAYOUTS[quant_type]
    return np.stack([_decoded(layout.codes.fill(blocks, code), quant_type) for code in codes])


def scale_values(blocks: ByteArray, quant_type: QuantType) -> Iterator[tuple[Packed, Float32Array]]:
    """Of each kind of scale, what one more of it adds to each column, (n_rows, block_size)."""
    layout = LAYOUTS[quant_type]
    nothing = blocks
    for packed in layout.scales:
        nothing = packed.fill(nothing, packed.worthless)
    for packed in layout.scales:
        one_more = packed.fill(nothing, packed.worthless + 1)
        yield packed, _decoded(one_more, quant_type)


def unit_values(blocks: ByteArray, quant_type: QuantType) -> Iterator[tuple[int, Float32Array]]:
    """Of each unit, where it lies and what each column holds of it, (n_rows, block_size)."""
    units = LAYOUTS[quant_type].units
    for offset in units:
        alone = blocks
        for other in units:
            alone = replace_unit(alone, other, np.full(len(blocks), other == offset, np.float16))
        yield offset, _decoded(alone, quant_type)


def read_unit(blocks: ByteArray, offset: int) -> npt.NDArray[np.float16]:
    """The float16 number at a place of each block, (n_rows,)."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")[:, 0]


def replace_unit(blocks: ByteArray, offset: int, units: npt.NDArray[np.float16]) -> ByteArray:
    """The same blocks with other float16 numbers at a place."""
    replaced = blocks.copy()
    replaced[:, offset : offset + 2] = units.astype("<f2")[:, None].view(np.uint8)
    return replaced


def _decoded(blocks: ByteArray, quant_type: QuantType) -> Float32Array:
    return decode_rows(blocks, quant_type, block_size(quant_type))


@dataclass(frozen=True, slots=True)
class _Move:
    """Bits of some numbers that lie at the same place of as many different bytes.

    lowest: of the bits, in a number. shift: of the same bit, in a byte.
    """

    lowest: np.uint8
    mask: np.uint8
    shift: np.uint8
    indices: npt.NDArray[np.intp]
    places: npt.NDArray[np.intp]


@cache
def _moves(packed: Packed) -> tuple[_Move, ...]:
    """All bits of all numbers of a block."""
    moves = []
    lowest = 0
    for field in packed.fields:
        places, shifts = np.array([field.place(k) for k in range(packed.n)]).T
        mask = np.uint8((1 << field.n_bits) - 1)
        for shift in np.unique(shifts):
            (indices,) = np.nonzero(shifts == shift)
            moves.append(_Move(np.uint8(lowest), mask, np.uint8(shift), indices, places[indices]))
        lowest += field.n_bits
    return tuple(moves)
