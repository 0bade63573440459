"""Numbers inside blocks, judged by libggml's encoders and decoders."""

import numpy as np
import pytest

from convert.code_layout import (
    LAYOUTS,
    Packed,
    code_values,
    read_unit,
    replace_unit,
    scale_values,
    unit_values,
)
from convert.decode import decode_rows
from convert.encode import ByteArray, QuantType, block_size, encode_rows

TYPES = sorted(LAYOUTS)


def blocks_of(quant_type: QuantType, n_rows: int = 40) -> ByteArray:
    n = block_size(quant_type)
    rows = np.random.default_rng(0).normal(0.01, 0.05, (n_rows, n)).astype(np.float32)
    return encode_rows(rows, quant_type)


def packed_of(quant_type: QuantType) -> tuple[Packed, ...]:
    layout = LAYOUTS[quant_type]
    return (layout.codes, *layout.scales)


@pytest.mark.parametrize("quant_type", TYPES)
def test_codes_say_what_the_decoder_says(quant_type: QuantType) -> None:
    """Catches a bit read from another place: every weight is the value of its own code."""
    blocks = blocks_of(quant_type)
    packed = LAYOUTS[quant_type].codes
    codes = packed.read(blocks)
    values = code_values(blocks, range(packed.highest + 1), quant_type)
    decoded = decode_rows(blocks, quant_type, block_size(quant_type))
    np.testing.assert_array_equal(
        np.take_along_axis(values, codes[None].astype(np.int64), axis=0)[0], decoded
    )


@pytest.mark.parametrize("quant_type", TYPES)
def test_replacing_touches_nothing_else(quant_type: QuantType) -> None:
    """Catches scales overwritten by codes, codes by scales, and numbers in another's place."""
    blocks = blocks_of(quant_type)
    every = packed_of(quant_type)
    for packed in every:
        numbers = packed.read(blocks)
        np.testing.assert_array_equal(packed.replace(blocks, numbers), blocks)
        other = np.random.default_rng(1).integers(packed.lowest, packed.highest + 1, numbers.shape)
        replaced = packed.replace(blocks, other.astype(np.uint8))
        np.testing.assert_array_equal(packed.read(replaced), other)
        np.testing.assert_array_equal(packed.replace(replaced, numbers), blocks)
        for beside in every:
            if beside is not packed:
                np.testing.assert_array_equal(beside.read(replaced), beside.read(blocks))
        for offset in LAYOUTS[quant_type].units:
            np.testing.assert_array_equal(read_unit(replaced, offset), read_unit(blocks, offset))


@pytest.mark.parametrize("quant_type", TYPES)
def test_numbers_and_units_are_the_whole_block(quant_type: QuantType) -> None:
    """Catches a field forgotten: with all of them set anew, nothing of the old block is left."""
    blocks, others = blocks_of(quant_type), blocks_of(quant_type)[::-1]
    copied = blocks
    for packed in packed_of(quant_type):
        copied = packed.replace(copied, packed.read(others))
    for offset in LAYOUTS[quant_type].units:
        copied = replace_unit(copied, offset, read_unit(others, offset))
    np.testing.assert_array_equal(copied, others)


@pytest.mark.parametrize("quant_type", TYPES)
def test_scales_and_units_make_up_the_values(quant_type: QuantType) -> None:
    """Catches a scale of other columns, and one that counts from another number."""
    blocks = blocks_of(quant_type)
    expected = decode_rows(blocks, quant_type, block_size(quant_type))
    units = sum(
        read_unit(blocks, offset).astype(np.float32)[:, None] * values
        for offset, values in unit_values(blocks, quant_type)
    )
    np.testing.assert_allclose(units, expected, rtol=1e-5, atol=1e-6)
    if LAYOUTS[quant_type].scales:
        scales = sum(
            (packed.read(blocks).astype(np.float32) - packed.worthless).repeat(
                values.shape[1] // packed.n, axis=1
            )
            * values
            for packed, values in scale_values(blocks, quant_type)
        )
        np.testing.assert_allclose(scales, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quant_type", TYPES)
def test_values_rise_evenly_where_the_layout_says_so(quant_type: QuantType) -> None:
    """Catches codes out of order: a step more is always the same step."""
    layout = LAYOUTS[quant_type]
    values = code_values(blocks_of(quant_type), range(layout.codes.highest + 1), quant_type)
    steps = np.diff(values.astype(np.float64), axis=0)
    size = np.abs(values).max(axis=0)
    if layout.is_affine:
        assert (np.abs(steps - steps[:1]) <= 2e-6 * size).all()
    else:
        assert ((steps > 0).all(axis=0) | (steps < 0).all(axis=0) | (size == 0)).all()


@pytest.mark.parametrize("quant_type", TYPES)
def test_the_encoder_uses_the_numbers_that_the_layout_allows(quant_type: QuantType) -> None:
    """Catches a range that is a step too wide or too narrow."""
    blocks = blocks_of(quant_type, 400)
    codes = LAYOUTS[quant_type].codes
    assert codes.read(blocks).min() == codes.lowest
    for packed in packed_of(quant_type):
        assert packed.read(blocks).max() == packed.highest
