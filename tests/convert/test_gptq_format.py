"""Packing against the format's first definition and against GPTQModel's reading of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.errors import CheckpointError
from convert.gptq import GptqSettings
from convert.gptq_format import Codes, pack, packed_arrays, packed_tensors, unpack
from convert.qwen2 import TensorSpec


def random_codes(bits: int, shape: tuple[int, int], seed: int = 0) -> Codes:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint8)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1 << 30))
@settings(max_examples=50, deadline=None)
def test_unpack_undoes_pack(bits: int, n_rows: int, n_packs: int, seed: int) -> None:
    """Catches bits lost where a code crosses two words."""
    codes = random_codes(bits, (n_rows, 32 * n_packs), seed)
    words = pack(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (n_rows, n_packs * bits)
    np.testing.assert_array_equal(unpack(words, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_codes_from_the_lowest_bits_up(bits: int) -> None:
    """Catches another order inside the word; AutoGPTQ ors code j in at bit j * bits."""
    codes = random_codes(bits, (3, 64))
    n = 32 // bits
    expected = np.zeros((3, 64 // n), dtype=np.uint32)
    for j in range(64):
        expected[:, j // n] |= codes[:, j].astype(np.uint32) << np.uint32(j % n * bits)
    np.testing.assert_array_equal(pack(codes, bits).view(np.uint32), expected)


def test_three_bits_cross_words_as_autogptq_has_them() -> None:
    """Catches padding each word to ten codes: codes 10 and 21 of 32 are split over two words."""
    codes = random_codes(3, (1, 32))
    c = codes[0].astype(np.uint64)
    first = sum(int(c[j]) << 3 * j for j in range(10)) | (int(c[10]) & 3) << 30
    second = int(c[10]) >> 2 | sum(int(c[11 + j]) << 3 * j + 1 for j in range(10))
    second |= (int(c[21]) & 1) << 31
    third = int(c[21]) >> 1 | sum(int(c[22 + j]) << 3 * j + 2 for j in range(10))
    assert pack(codes, 3).view(np.uint32)[0].tolist() == [first, second, third]


def test_symmetric_zeros_are_stored_minus_one() -> None:
    """Catches version 2's zeros in a file that says version 1, an error of one step a weight."""
    arrays = dict(
        packed_arrays(
            "x.weight",
            random_codes(4, (64, 256)),
            np.ones((64, 2), dtype=np.float16),
            GptqSettings(),
        )
    )
    assert set(arrays["x.qzeros"].view(np.uint32).ravel()) == {0x77777777}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_arrays_are_as_planned(bits: int, group_size: int) -> None:
    """Catches a plan that promises other shapes, types or sizes than are written."""
    config = GptqSettings(bits=bits, group_size=group_size)
    spec = TensorSpec("x.weight", "x", (64, 256), 0)
    scales = np.ones((64, 256 // group_size), dtype=np.float16)
    arrays = list(packed_arrays("x.weight", random_codes(bits, (64, 256)), scales, config))
    planned = list(packed_tensors(spec, config))
    assert [tensor.name for tensor in planned] == [name for name, _ in arrays]
    for tensor, (_, array) in zip(planned, arrays, strict=True):
        assert array.shape == tensor.shape
        assert array.nbytes == tensor.nbytes
        assert array.dtype == {"I32": np.int32, "F16": np.float16}[tensor.dtype]
        assert array.flags.c_contiguous


@pytest.mark.parametrize("shape", [(64, 192), (48, 256)])
def test_sizes_that_do_not_divide_are_errors(shape: tuple[int, int]) -> None:
    """Catches a group cut short, or outputs lost at the end of a word."""
    with pytest.raises(CheckpointError, match=r"x\.weight: .*; choose"):
        list(packed_tensors(TensorSpec("x.weight", "x", shape, 0), GptqSettings()))
