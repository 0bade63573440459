"""Encoders: exact where the type is exact, independent of how the work is cut, loud when unfit."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from gguf import dequantize

from convert.encode import NEEDS_IMPORTANCE, Float32Array, QuantType, encode_rows, row_nbytes

RELATIVE_RMS_ERROR = {
    QuantType.F32: 0.0,
    QuantType.F16: 3e-4,
    QuantType.BF16: 3e-3,
    QuantType.Q8_0: 0.01,
    QuantType.Q6_K: 0.03,
    QuantType.Q5_K: 0.05,
    QuantType.Q5_1: 0.06,
    QuantType.Q5_0: 0.06,
    QuantType.Q4_K: 0.09,
    QuantType.Q4_1: 0.10,
    QuantType.IQ4_XS: 0.09,
    QuantType.IQ4_NL: 0.09,
    QuantType.Q4_0: 0.11,
    QuantType.Q3_K: 0.18,
    QuantType.IQ3_S: 0.18,
    QuantType.IQ3_XXS: 0.24,
    QuantType.Q2_K: 0.36,
    QuantType.IQ2_S: 0.32,
    QuantType.IQ2_XS: 0.36,
    QuantType.IQ2_XXS: 0.40,
}
"""Upper bounds for Gaussian weights; a third of each bounds from below."""
SLOW_TYPES = {t for t in RELATIVE_RMS_ERROR if t.name.startswith("IQ")}
FAST_TYPES = [t for t in RELATIVE_RMS_ERROR if t not in SLOW_TYPES]


def gaussian(n_rows: int, n_in: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).normal(0.0, 0.02, (n_rows, n_in)).astype(np.float32)


@pytest.mark.parametrize("quant_type", RELATIVE_RMS_ERROR, ids=lambda t: t.name)
def test_error_is_what_the_type_can_do(quant_type: QuantType) -> None:
    """Decoded by the gguf package, each type is as near as its bits allow, and no nearer."""
    rows = gaussian(16, 1024)
    importance = np.ones(1024, dtype=np.float32) if quant_type in NEEDS_IMPORTANCE else None
    blocks = encode_rows(rows, quant_type, importance=importance)
    assert blocks.shape == (16, row_nbytes(quant_type, 1024))
    data = blocks.view(np.float32) if quant_type == QuantType.F32 else blocks
    decoded = dequantize(data, quant_type)
    error = np.sqrt(np.mean((decoded - rows) ** 2)) / np.sqrt(np.mean(rows**2))
    assert error <= RELATIVE_RMS_ERROR[quant_type]
    assert error >= RELATIVE_RMS_ERROR[quant_type] / 3


@pytest.mark.parametrize("quant_type", FAST_TYPES, ids=lambda t: t.name)
def test_rows_are_independent(quant_type: QuantType) -> None:
    """Cut in any way and on any number of threads, with importance or without: the same bytes."""
    rows = gaussian(600, 512)
    for importance in (None, np.random.default_rng(1).random(512, dtype=np.float32)):
        whole = encode_rows(rows, quant_type, importance=importance)
        parts = [encode_rows(rows[i : i + 7], quant_type, importance=importance) for i in (0, 7)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[:14])
        encode_part = partial(encode_rows, quant_type=quant_type, importance=importance)
        with ThreadPoolExecutor(3) as pool:
            threaded = list(pool.map(encode_part, np.array_split(rows, 5)))
        np.testing.assert_array_equal(np.concatenate(threaded), whole)


def test_bf16_returns_its_own_bits() -> None:
    """All finite bfloat16 values, subnormals included, come back bit for bit."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    rows = (bits << 16).view(np.float32).reshape(2, -1)
    encoded = encode_rows(rows, QuantType.BF16).view(np.uint16).reshape(-1)
    np.testing.assert_array_equal(encoded, bits)


def test_f16_rounds_as_ieee() -> None:
    """F16 equals numpy's conversion, which rounds to nearest even."""
    rows = gaussian(8, 256)
    np.testing.assert_array_equal(
        encode_rows(rows, QuantType.F16).view(np.float16), rows.astype(np.float16)
    )


@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.Q8_0, QuantType.Q4_K])
def test_too_large(quant_type: QuantType) -> None:
    """What a 16-bit float cannot hold is an error, not infinity in the file."""
    rows = gaussian(4, 256)
    rows[3, 255] = 1e10
    with pytest.raises(OverflowError, match=quant_type.name):
        encode_rows(rows, quant_type)


def test_rows_that_are_not_contiguous() -> None:
    """A transposed view is encoded as its values stand, not as its memory lies."""
    rows = gaussian(256, 256)
    np.testing.assert_array_equal(
        encode_rows(rows.T, QuantType.Q4_K), encode_rows(rows.T.copy(), QuantType.Q4_K)
    )
