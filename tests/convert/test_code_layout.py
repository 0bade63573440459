"""Codes inside blocks, judged by libggml's encoders and decoders."""

import numpy as np
import pytest

from convert.code_layout import LAYOUTS, code_values, read_codes, replace_codes
from convert.decode import decode_rows
from convert.encode import QuantType, block_size, encode_rows

TYPES = sorted(LAYOUTS)


def blocks_of(quant_type: QuantType, n_rows: int = 40) -> np.ndarray:  # type: ignore[type-arg]
    n = block_size(quant_type)
    rows = np.random.default_rng(0).normal(0.01, 0.05, (n_rows, n)).astype(np.float32)
    return encode_rows(rows, quant_type)


@pytest.mark.parametrize("quant_type", TYPES)
def test_codes_say_what_the_decoder_says(quant_type: QuantType) -> None:
    """Catches a bit read from another place: every weight is the value of its own code."""
    blocks = blocks_of(quant_type)
    codes = read_codes(blocks, quant_type)
    values = code_values(blocks, range(LAYOUTS[quant_type].highest + 1), quant_type)
    decoded = decode_rows(blocks, quant_type, block_size(quant_type))
    np.testing.assert_array_equal(
        np.take_along_axis(values, codes[None].astype(np.int64), axis=0)[0], decoded
    )


@pytest.mark.parametrize("quant_type", TYPES)
def test_replacing_touches_codes_alone(quant_type: QuantType) -> None:
    """Catches scales overwritten, and codes that land in another column."""
    blocks = blocks_of(quant_type)
    codes = read_codes(blocks, quant_type)
    np.testing.assert_array_equal(replace_codes(blocks, codes, quant_type), blocks)
    layout = LAYOUTS[quant_type]
    other = np.random.default_rng(1).integers(layout.lowest, layout.highest + 1, codes.shape)
    replaced = replace_codes(blocks, other.astype(np.uint8), quant_type)
    np.testing.assert_array_equal(read_codes(replaced, quant_type), other)
    np.testing.assert_array_equal(replace_codes(replaced, codes, quant_type), blocks)


@pytest.mark.parametrize("quant_type", TYPES)
def test_values_rise_evenly_where_the_layout_says_so(quant_type: QuantType) -> None:
    """Catches codes out of order: a step more is always the same step."""
    layout = LAYOUTS[quant_type]
    values = code_values(blocks_of(quant_type), range(layout.highest + 1), quant_type)
    steps = np.diff(values.astype(np.float64), axis=0)
    size = np.abs(values).max(axis=0)
    if layout.is_affine:
        assert (np.abs(steps - steps[:1]) <= 2e-6 * size).all()
    else:
        assert ((steps > 0).all(axis=0) | (steps < 0).all(axis=0) | (size == 0)).all()


@pytest.mark.parametrize("quant_type", TYPES)
def test_the_encoder_uses_the_codes_that_the_layout_allows(quant_type: QuantType) -> None:
    """Catches a range that is a step too wide or too narrow."""
    codes = read_codes(blocks_of(quant_type, 400), quant_type)
    assert codes.min() == LAYOUTS[quant_type].lowest
    assert codes.max() == LAYOUTS[quant_type].highest
