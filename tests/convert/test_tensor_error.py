"""The limits of every type: quiet on what encoders do, loud on what they never do."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from convert.decode import decode_rows
from convert.encode import (
    NEEDS_IMPORTANCE,
    ByteArray,
    Float32Array,
    QuantType,
    encode_rows,
)
from convert.tensor_error import TYPICAL_ERROR, TensorError, measure_error

N_ROWS, N_IN = 6, 512
ENCODED_TYPES = sorted(set(TYPICAL_ERROR) - {QuantType.F64, QuantType.IQ1_S, QuantType.IQ1_M})
"""Without the 1-bit types, which no recipe has and whose tables take long to set up."""
COARSE = {QuantType.TQ1_0, QuantType.TQ2_0, QuantType.Q1_0}
"""Types for models trained in them: of other weights nearly nothing is left."""
FINE = [t for t in ENCODED_TYPES if TYPICAL_ERROR[t] < 0.2]


def weights(kind: str) -> Float32Array:
    random = np.random.default_rng(7)
    shape = (N_ROWS, N_IN)
    column_sizes = np.exp(random.normal(size=N_IN))
    values = {
        "normal": random.normal(size=shape),
        "uniform": random.uniform(-1, 1, shape),
        "heavy tails": random.standard_t(3, shape),
        "columns of other sizes": random.normal(size=shape) * column_sizes,
        "with an offset": random.normal(size=shape) + 2,
    }[kind]
    return np.asarray(0.03 * values, dtype=np.float32)


@cache
def importance(kind: str) -> Float32Array | None:
    spread = {"none": None, "even": 0.0, "uneven": 1.0, "very uneven": 2.5}[kind]
    if spread is None:
        return None
    return np.exp(spread * np.random.default_rng(3).normal(size=N_IN)).astype(np.float32)


def encoded(rows: Float32Array, quant_type: QuantType, kind: str = "none") -> ByteArray:
    if kind == "none" and quant_type in NEEDS_IMPORTANCE:
        kind = "even"
    return encode_rows(rows, quant_type, importance=importance(kind))


@pytest.mark.parametrize("quant_type", ENCODED_TYPES, ids=lambda quant_type: quant_type.name)
def test_quiet_on_every_encoder(quant_type: QuantType) -> None:
    """Five kinds of weights, three kinds of importance: no tensor is called wrong."""
    for kind in ("normal", "uniform", "heavy tails", "columns of other sizes", "with an offset"):
        if quant_type in COARSE and kind != "normal":
            continue
        rows = weights(kind)
        for spread in ("none", "uneven", "very uneven"):
            error = measure_error(rows, encoded(rows, quant_type, spread), quant_type)
            assert not error.problem(quant_type), (kind, spread, error)


@pytest.mark.parametrize("quant_type", ENCODED_TYPES, ids=lambda quant_type: quant_type.name)
def test_the_table_is_what_the_encoders_leave(quant_type: QuantType) -> None:
    """The figure of each type, measured anew: an upgrade that makes an encoder worse is noticed."""
    rows = weights("normal")
    relative = measure_error(rows, encoded(rows, quant_type), quant_type).relative
    assert relative == pytest.approx(TYPICAL_ERROR[quant_type], rel=0.15, abs=1e-4)


def zero_tensor(rows: Float32Array) -> Float32Array:
    return np.zeros_like(rows)


def swap_rows(rows: Float32Array) -> Float32Array:
    return np.roll(rows, 1, axis=0)


def zero_one_row(rows: Float32Array) -> Float32Array:
    return np.where(np.arange(N_ROWS)[:, None] == 5, np.float32(0), rows)


def larger(rows: Float32Array) -> Float32Array:
    return rows * np.float32(1.08)


@pytest.mark.parametrize("quant_type", FINE, ids=lambda quant_type: quant_type.name)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (zero_tensor, "differs from the source by 100"),
        (swap_rows, "differs from the source by 1"),
        (zero_one_row, "has a row that differs|differs from the source by"),
        (larger, "times its source|differs from the source by"),
    ],
)
def test_loud_on_damage(
    quant_type: QuantType, damage: Callable[[Float32Array], Float32Array], words: str
) -> None:
    """A tensor that is empty or another's, one row lost, a scale off by 8 %: all are named."""
    rows = weights("normal")
    error = measure_error(rows, encoded(damage(rows), quant_type), quant_type)
    problem = error.problem(quant_type)
    assert any(part in problem for part in words.split("|")), (error, problem)


def test_a_scale_that_is_a_little_too_large() -> None:
    """2 % hide in Q4_K's own error of 7 %, and not in its scale."""
    rows = weights("normal")
    error = measure_error(rows, encoded(rows * np.float32(1.02), QuantType.Q4_K), QuantType.Q4_K)
    assert error.relative < 0.1
    assert "is 1.01" in error.problem(QuantType.Q4_K)


def test_not_a_number() -> None:
    """A NaN scale makes the error NaN, which is within no limit."""
    rows = weights("normal")
    blocks = encoded(rows, QuantType.Q8_0)
    blocks[3, :2] = 0xFF
    assert measure_error(rows, blocks, QuantType.Q8_0).problem(QuantType.Q8_0)


def test_exact_types_allow_nothing() -> None:
    """F32 keeps every weight: an error of a millionth of one is an error."""
    rows = weights("normal")
    assert measure_error(rows, encoded(rows, QuantType.F32), QuantType.F32).relative == 0.0
    moved = rows.copy()
    moved[4, 9] *= np.float32(1.01)
    error = measure_error(rows, encoded(moved, QuantType.F32), QuantType.F32)
    assert "has a row" in error.problem(QuantType.F32) or "differs" in error.problem(QuantType.F32)


def test_zeros_and_padding() -> None:
    """A tensor of zeros is kept exactly; rows too small for float16 scales are no defect."""
    zeros = np.zeros((2, 256), np.float32)
    error = measure_error(zeros, encoded(zeros, QuantType.Q4_0), QuantType.Q4_0)
    assert (error.relative, error.scale, error.problem(QuantType.Q4_0)) == (0.0, 1.0, "")
    assert measure_error(zeros, encode_rows(zeros + 1, QuantType.Q8_0), QuantType.Q8_0).problem(
        QuantType.Q8_0
    )
    padded = weights("normal")
    padded[4] *= np.float32(1e-6)
    assert not measure_error(padded, encoded(padded, QuantType.Q4_K), QuantType.Q4_K).problem(
        QuantType.Q4_K
    )


def test_against_a_slow_twin() -> None:
    """The sums, row by row in plain float64; parts of any size add up to the whole."""
    rows = weights("heavy tails")
    blocks = encoded(rows, QuantType.Q3_K)
    stored = decode_rows(blocks, QuantType.Q3_K, N_IN)
    twin_error = twin_source = twin_product = twin_worst = 0.0
    for a, b in zip(stored.astype(np.float64), rows.astype(np.float64), strict=True):
        twin_error += float(((a - b) ** 2).sum())
        twin_source += float((b**2).sum())
        twin_product += float((a * b).sum())
        twin_worst = max(twin_worst, float(((a - b) ** 2).sum() / (b**2).sum()) ** 0.5)
    for n_rows in (1, 5, N_ROWS):
        error = TensorError()
        for i in range(0, N_ROWS, n_rows):
            error += measure_error(rows[i : i + n_rows], blocks[i : i + n_rows], QuantType.Q3_K)
        assert error.relative == pytest.approx((twin_error / twin_source) ** 0.5, rel=1e-5)
        assert error.scale == pytest.approx(twin_product / twin_source, rel=1e-5)
        assert error.worst_row == pytest.approx(twin_worst, rel=1e-3)
