"""Sixteen blocks at a time: the bytes are libggml's, for weights and importance of every kind."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from convert import encode
from convert.checkpoint import Checkpoint
from convert.encode import (
    LANE_TYPES,
    ByteArray,
    Float32Array,
    QuantType,
    choose_encoder,
    encode_rows,
    encode_with_libggml,
    row_nbytes,
)

NANO = Path(__file__).resolve().parents[2] / "quant_eval" / "nano" / "checkpoint"
N_ROWS, N_IN = 20, 512
AnyFloats = npt.NDArray[np.floating[Any]]
TYPES = sorted(LANE_TYPES)
by_type = pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)


def by_libggml(
    rows: Float32Array, quant_type: QuantType, importance: Float32Array | None
) -> ByteArray:
    blocks = np.empty((len(rows), row_nbytes(quant_type, rows.shape[1])), np.uint8)
    encode_with_libggml(rows, quant_type, importance, blocks)
    return blocks


def by_lanes(
    rows: Float32Array, quant_type: QuantType, importance: Float32Array | None
) -> ByteArray:
    blocks = np.empty((len(rows), row_nbytes(quant_type, rows.shape[1])), np.uint8)
    encoder = encode._lane_encoder()
    assert encoder is not None
    encoder(rows, quant_type, importance, blocks)
    return blocks


def assert_same(
    name: str, rows: Float32Array, quant_type: QuantType, importance: Float32Array | None
) -> None:
    ours, theirs = (each(rows, quant_type, importance) for each in (by_lanes, by_libggml))
    n_different = np.count_nonzero((ours != theirs).any(axis=1))
    assert n_different == 0, f"{name}: {n_different} of {len(rows)} rows differ"


def kinds_of_rows(rng: np.random.Generator) -> Iterator[tuple[str, AnyFloats]]:
    """Weights that are ordinary, and weights that try every edge of the arithmetic."""
    shape = (N_ROWS, N_IN)

    def gaussian() -> AnyFloats:
        return rng.standard_normal(shape)

    def by_group(values: AnyFloats) -> AnyFloats:
        return np.repeat(values, 16, axis=1)

    constant = np.repeat(rng.standard_normal((N_ROWS, 1)), N_IN, axis=1)
    groups = rng.standard_normal((N_ROWS, N_IN // 16))
    first_of_group = np.arange(N_IN) % 16 == 0
    yield "random", 0.02 * gaussian()
    for exponent in (-44, -40, -36, -30, -20, -15, -6, 3, 5, 7, 12, 19, 30, 38):
        yield f"about 1e{exponent}", gaussian().clip(-3, 3) * 10.0**exponent
    yield "zero", np.zeros(shape)
    yield "minus zero", -np.zeros(shape)
    yield "constant", constant
    yield "constant by group", by_group(groups)
    yield "positive", np.abs(gaussian())
    yield "negative", -np.abs(gaussian())
    for spread in (1e-2, 1e-4, 1e-6, 1e-7, 1e-8):
        yield f"constant to {spread}", constant * (1 + spread * gaussian())
        yield f"constant by group to {spread}", by_group(10 * groups) * (1 + spread * gaussian())
    yield "outliers", gaussian() * np.where(np.arange(N_IN) % 37 == 0, 1000, 0.01)
    yield "one in a group", by_group(groups) * first_of_group
    yield "one in a group, at the limit of zero", by_group(groups) * first_of_group * 1e-15
    yield "one in a row", np.where(np.arange(N_IN) == 5, 1.0, np.zeros(shape))
    yield "sparse", gaussian() * (rng.random(shape) < 0.1)
    yield "heavy tails", gaussian() ** 9
    yield "all exponents", np.exp2(rng.uniform(-140, 120, shape)) * np.sign(gaussian())
    scales = np.exp2(rng.uniform(-140, 20, groups.shape))
    yield "groups of all exponents", by_group(scales) * gaussian()
    yield "few values", rng.integers(-3, 4, shape) * 0.125
    yield "ties", rng.integers(-16, 16, shape) + 0.5
    yield "denormal", rng.integers(-300, 300, shape) * 2.0**-149


def kinds_of_importance(rng: np.random.Generator) -> Iterator[tuple[str, AnyFloats | None]]:
    usual = rng.gamma(0.5, size=N_IN)
    yield "no importance", None
    yield "importance", usual
    yield "importance of zero", np.zeros(N_IN)
    yield "importance in part zero", usual * (rng.random(N_IN) < 0.5)
    yield "importance of all exponents", np.exp2(rng.uniform(-60, 60, N_IN))
    yield "importance of 3e38", np.full(N_IN, 3e38)


@by_type
def test_bytes_of_every_kind(quant_type: QuantType) -> None:
    """Sums in another order, a fused operation, a tie or an overflow taken otherwise would show.

    Blocks of infinities, which encode_rows() refuses, are compared too.
    """
    rng = np.random.default_rng(0)
    for kind, rows in kinds_of_rows(rng):
        for given, importance in kinds_of_importance(rng):
            assert_same(
                f"{kind}, {given}",
                rows.astype(np.float32),
                quant_type,
                None if importance is None else importance.astype(np.float32),
            )


@by_type
def test_many_random_rows(quant_type: QuantType) -> None:
    """What happens in one block of ten thousand, such as a tie between two scales, would show."""
    rng = np.random.default_rng(1)
    scales = np.exp2(rng.integers(-12, 2, (2000, 1))).astype(np.float32)
    rows = rng.standard_normal((2000, 512), dtype=np.float32) * scales
    assert_same("random", rows, quant_type, None)
    assert_same("random", rows, quant_type, rng.gamma(0.5, size=512).astype(np.float32))


def matrices() -> Iterator[tuple[str, Float32Array]]:
    with Checkpoint.open(NANO) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if len(info.shape) == 2:
                yield name, checkpoint.read(name)


@by_type
def test_real_weights(quant_type: QuantType) -> None:
    """Trained weights, which are bfloat16 and so full of ties: the first matrices of nano-qwq."""
    for _, (name, rows) in zip(range(3), matrices(), strict=False):
        importance = np.mean(rows**2, axis=0)
        assert_same(name, rows, quant_type, None)
        assert_same(name, rows, quant_type, importance)


@pytest.mark.slow
@by_type
def test_all_real_weights(quant_type: QuantType) -> None:
    """All matrices of nano-qwq."""
    for name, rows in matrices():
        assert_same(name, rows, quant_type, None)
        assert_same(name, rows, quant_type, np.mean(rows**2, axis=0))


@by_type
def test_lanes_left_over(quant_type: QuantType) -> None:
    """Any number of blocks, and rows of 1 to 17 blocks, so that lanes end anywhere in a row."""
    rng = np.random.default_rng(2)
    for n_rows, n_blocks in (
        (0, 1),
        (1, 1),
        (1, 15),
        (1, 16),
        (1, 17),
        (17, 1),
        (3, 5),
        (5, 17),
        (33, 3),
    ):
        rows = rng.standard_normal((n_rows, 256 * n_blocks), dtype=np.float32)
        importance = rng.random(256 * n_blocks, dtype=np.float32)
        assert_same(f"{n_rows} x {n_blocks}", rows, quant_type, None)
        assert_same(f"{n_rows} x {n_blocks}", rows, quant_type, importance)


@by_type
def test_too_large(quant_type: QuantType) -> None:
    """Scales that do not fit are refused whichever encoder meets them."""
    rows = np.random.default_rng(3).standard_normal((600, 256), dtype=np.float32)
    rows[599, 255] = 1e10
    with pytest.raises(OverflowError, match=quant_type.name):
        encode_rows(rows, quant_type)


def test_the_faster_encoder_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types without an encoder of ours go to libggml; large arrays of the others do not.

    Q8_0 does while nothing else has loaded our encoders.
    """
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "convert.lane_encoders", raising=False)
        assert choose_encoder(QuantType.Q8_0, sys.maxsize) is encode_with_libggml
        assert choose_encoder(QuantType.Q4_K, 1 << 10) is encode_with_libggml
    assert choose_encoder(QuantType.IQ4_XS, sys.maxsize) is encode_with_libggml
    for quant_type in (QuantType.Q4_K, *TYPES):
        assert choose_encoder(quant_type, 1 << 20) is not encode_with_libggml


@pytest.mark.parametrize("error", [ImportError("needs another numpy"), RuntimeError("no folder")])
def test_libggml_where_numba_does_not_load(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An environment where numba fails still converts, and says why it is slow."""

    def fail(**options: object) -> None:
        raise error

    rows = np.random.default_rng(4).standard_normal((600, 256), dtype=np.float32)
    expected = encode_rows(rows, QuantType.Q4_K)
    monkeypatch.setattr(encode, "_lane_encoder", encode._lane_encoder.__wrapped__)
    monkeypatch.delattr(sys.modules["convert"], "lane_encoders")
    monkeypatch.delitem(sys.modules, "convert.lane_encoders")
    monkeypatch.setattr("numba.njit", fail)
    assert choose_encoder(QuantType.Q4_K, 1 << 20) is encode_with_libggml
    assert f"numba does not load ({error})" in caplog.text
    np.testing.assert_array_equal(encode_rows(rows, QuantType.Q4_K), expected)


def test_stale_machine_code_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code kept from before a change of any of its sources is compiled again."""
    from convert import lane_encoders, lane_fits

    old, new = tmp_path / "lane_encoders.old.nbi", tmp_path / "lane_encoders.new.nbi"
    changed_s = max(
        Path(source).stat().st_mtime for source in Path(lane_fits.__file__).parent.glob("lane*.py")
    )
    for index, modified_s in ((old, changed_s - 1), (new, changed_s + 1)):
        index.touch()
        os.utime(index, (modified_s, modified_s))
    stand_in = SimpleNamespace(stats=SimpleNamespace(cache_path=tmp_path))
    monkeypatch.setattr(lane_encoders, "encode_affine", stand_in)
    lane_encoders.forget_stale_code()
    assert [index.exists() for index in (old, new)] == [False, True]


def test_float16_rounds_as_ieee() -> None:
    """All float16 values, the midpoints between them and their neighbours, against numpy."""
    import numba

    from convert.lane_encoders import half_bits, half_value
    from convert.lanes import N_LANES, load, store

    def round_all(values: Float32Array, halves: ByteArray, back: Float32Array) -> None:
        for i in range(len(values)):
            bits = half_bits(load(values, i))
            store(halves, 2 * i, bits)
            store(halves, 2 * i + 1, bits >> 8)
            store(back, i, half_value(bits))

    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = np.append((exact[:-1] + exact[1:]) / 2, np.float32(65520))
    near = [np.nextafter(middle, np.float32(way)) for way in (-np.inf, np.inf)]
    positive = np.concatenate([exact, middle, *near, [np.float32(3e38), np.inf, np.nan]])
    values = np.concatenate([positive, -positive]).astype(np.float32)
    rows = np.resize(values, (-(-len(values) // N_LANES), N_LANES))
    halves = np.empty((2 * len(rows), N_LANES), np.uint8)
    back = np.empty_like(rows)
    njit: Any = numba.njit
    njit(round_all)(rows, halves, back)
    with np.errstate(over="ignore"):
        expected = rows.astype(np.float16)
    bits = halves[::2] | halves[1::2].astype(np.uint16) << 8
    np.testing.assert_array_equal(bits, expected.view(np.uint16))
    np.testing.assert_array_equal(back, expected.astype(np.float32))
