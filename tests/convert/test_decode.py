"""Blocks decode as llama.cpp decodes them."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, dequantize

from convert.decode import can_decode, decode_rows
from convert.encode import QuantType, encode_rows, row_nbytes

DECODABLE = sorted({*filter(can_decode, GGML_QUANT_SIZES)} - {QuantType.Q1_0})
"""The package itself does not decode Q1_0."""


@pytest.mark.parametrize("quant_type", DECODABLE, ids=lambda quant_type: quant_type.name)
def test_equals_the_gguf_package(quant_type: QuantType) -> None:
    """Random bytes of every type that files can hold, NaN and infinities among them.

    Catches a wrong view of the library's table of types, a wrong row length, a lost row.
    """
    random = np.random.default_rng(quant_type)
    n_in = 512
    shape = (5, row_nbytes(quant_type, n_in))
    blocks = random.integers(0, 256, shape, dtype=np.uint8)
    ours = decode_rows(blocks, quant_type, n_in)
    assert ours.shape == (5, n_in)
    assert ours.dtype == np.float32
    if quant_type.name[0] in "FI" and quant_type.name[1:] in ("8", "16", "32", "64"):
        dtype = {"F": f"<f{shape[1] // n_in}", "I": f"<i{shape[1] // n_in}"}[quant_type.name[0]]
        with np.errstate(over="ignore", invalid="ignore"):
            theirs = blocks.view(dtype).astype(np.float32)
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            theirs = dequantize(blocks, quant_type)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_part_of_the_rows() -> None:
    """Rows that do not lie side by side in memory, and none at all."""
    rows = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    blocks = encode_rows(rows, QuantType.Q6_K)
    whole = decode_rows(blocks, QuantType.Q6_K, 256)
    np.testing.assert_array_equal(decode_rows(blocks[::2], QuantType.Q6_K, 256), whole[::2])
    assert decode_rows(blocks[:0], QuantType.Q6_K, 256).shape == (0, 256)
