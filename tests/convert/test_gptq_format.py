"""Packing against the format's first definition and against GPTQModel's reading of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.errors import CheckpointError
from convert.gptq import GptqSettings, GptqSolution
from convert.gptq_format import (
    Codes,
    pack,
    packed_arrays,
    packed_tensors,
    quantization_config,
    unpack,
)
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


def solution(bits: int, n_groups: int, *, zero: int | None = None) -> GptqSolution:
    """A matrix of (64, 256) codes."""
    zeros = torch.full((64, n_groups), 1 << bits - 1 if zero is None else zero, dtype=torch.uint8)
    return GptqSolution(
        torch.from_numpy(random_codes(bits, (64, 256))),
        torch.ones(64, n_groups, dtype=torch.float16),
        zeros,
        torch.arange(256) // (256 // n_groups),
        0.05,
    )


@pytest.mark.parametrize(("version", "word"), [(1, 0x77777777), (2, 0x88888888)])
def test_symmetric_zeros(version: int, word: int) -> None:
    """Catches the other version's zeros, an error of one step a weight."""
    settings = GptqSettings(version=version)
    arrays = dict(packed_arrays("x.weight", solution(4, 2), settings))
    assert set(arrays["x.qzeros"].view(np.uint32).ravel()) == {word}
    name = quantization_config(settings, {})["checkpoint_format"]
    assert name == {1: "gptq", 2: "gptq_v2"}[version]


def test_the_lowest_zero_fits_version_1() -> None:
    """Catches a zero of 0, which version 1 would store as -1."""
    arrays = dict(packed_arrays("x.weight", solution(4, 2, zero=1), GptqSettings()))
    assert not arrays["x.qzeros"].any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_arrays_are_as_planned(bits: int, group_size: int) -> None:
    """Catches a plan that promises other shapes, types or sizes than are written."""
    config = GptqSettings(bits=bits, group_size=group_size)
    spec = TensorSpec("x.weight", "x", (64, 256), 0)
    n_groups = 256 // config.columns_per_group(256)
    arrays = list(packed_arrays("x.weight", solution(bits, n_groups), config))
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
