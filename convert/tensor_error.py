"""How far stored tensors are from their source, and whether that is what their type can do."""

from dataclasses import dataclass
from math import gcd, sqrt

import numpy as np
import numpy.typing as npt

from convert.decode import decode_rows
from convert.encode import ByteArray, Float32Array, QuantType

TYPICAL_ERROR = {
    QuantType.F64: 0.0,
    QuantType.F32: 0.0,
    QuantType.F16: 0.0003,
    QuantType.BF16: 0.0017,
    QuantType.Q8_0: 0.0054,
    QuantType.Q6_K: 0.018,
    QuantType.Q5_K: 0.036,
    QuantType.Q5_1: 0.038,
    QuantType.Q5_0: 0.043,
    QuantType.Q4_K: 0.072,
    QuantType.Q4_1: 0.078,
    QuantType.Q4_0: 0.086,
    QuantType.IQ4_NL: 0.076,
    QuantType.IQ4_XS: 0.077,
    QuantType.NVFP4: 0.099,
    QuantType.MXFP4: 0.116,
    QuantType.Q3_K: 0.151,
    QuantType.IQ3_S: 0.166,
    QuantType.IQ3_XXS: 0.214,
    QuantType.Q2_K: 0.297,
    QuantType.IQ2_S: 0.266,
    QuantType.IQ2_XS: 0.322,
    QuantType.IQ2_XXS: 0.364,
    QuantType.IQ1_M: 0.493,
    QuantType.IQ1_S: 0.521,
    QuantType.Q1_0: 0.600,
    QuantType.TQ1_0: 0.809,
    QuantType.TQ2_0: 0.809,
}
"""RMS error over RMS weight that the type's encoder leaves on normally distributed weights.

Heavy tails and an importance that differs a thousandfold between columns make it at most about
twice as large, in one row four times: hence the limits below. A tensor of zeros would have 1.
"""

_TENSOR_FACTOR, _TENSOR_CEILING = 3.0, 0.9
_ROW_FACTOR, _ROW_CEILING = 6.0, 0.95
_BY_IMPORTANCE = frozenset({QuantType.IQ2_XXS, QuantType.IQ2_XS, QuantType.IQ1_M, QuantType.IQ1_S})
"""Have too few levels to follow more of a row than its important columns."""
_BY_IMPORTANCE_ROW_CEILING = 1.5
_EXACT = 1e-6
"""What rounding of the sums may feign where a type holds its source exactly."""
_WEAK_ROW_RMS = 1e-4
"""Rows below it (padding of the vocabulary) weigh nothing, and float16 scales run out for them."""
_N_PER_CHUNK = 1 << 18
_N_PER_SUM = 1 << 12

RowSums = npt.NDArray[np.float64]
"""(n_rows,)."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """Sums over a tensor's weights, in float64; parts of a tensor add up with `+`.

    source, error, product: sums of source^2, (stored - source)^2 and stored x source.
    worst_row: the largest RMS error of a row over its RMS weight.
    """

    source: float = 0.0
    error: float = 0.0
    product: float = 0.0
    worst_row: float = 0.0

    def __add__(self, other: "TensorError") -> "TensorError":
        return TensorError(
            self.source + other.source,
            self.error + other.error,
            self.product + other.product,
            max(self.worst_row, other.worst_row),
        )

    @property
    def relative(self) -> float:
        """RMS error over RMS weight; 0 for a tensor of zeros that was kept."""
        if self.error == 0:
            return 0.0
        return sqrt(self.error / self.source) if self.source > 0 else float("inf")

    @property
    def scale(self) -> float:
        """By how much the stored weights are larger on the whole: 1 but for the type's own bias."""
        return self.product / self.source if self.source > 0 else 1.0

    def problem(self, quant_type: QuantType) -> str:
        """In words what no sound encoder of this type does; empty where all is well."""
        typical = TYPICAL_ERROR[quant_type]
        limit = max(_EXACT, min(_TENSOR_FACTOR * typical, _TENSOR_CEILING))
        if not self.relative <= limit:
            return f"differs from the source by {self.relative:.2%}, {_allowed(quant_type, limit)}"
        ceiling = _BY_IMPORTANCE_ROW_CEILING if quant_type in _BY_IMPORTANCE else _ROW_CEILING
        row_limit = max(_EXACT, min(_ROW_FACTOR * typical, ceiling))
        if not self.worst_row <= row_limit:
            return (
                f"has a row that differs from the source by {self.worst_row:.2%}, "
                f"{_allowed(quant_type, row_limit)}"
            )
        variance = self.relative**2
        if not -0.005 - 6 * variance <= self.scale - 1 <= 0.005 + 1.5 * variance:
            return f"is {self.scale:.3f} times its source on the whole"
        return ""


def measure_error(
    rows: Float32Array,
    blocks: ByteArray,
    quant_type: QuantType,
    *,
    squares: RowSums | None = None,
) -> TensorError:
    """Hold encoded rows against their source.

    rows: (n_rows, n_in). blocks: (n_rows, row_nbytes). squares: row_squares(rows), where they are
    known already. Several threads may call it; beside its arguments it needs about 1 MiB.
    """
    n_rows, n_in = rows.shape
    if squares is None:
        squares = row_squares(rows)
    n_per_chunk = max(1, _N_PER_CHUNK // n_in)
    total = TensorError()
    for start in range(0, n_rows, n_per_chunk):
        part = slice(start, start + n_per_chunk)
        total += _measure_chunk(
            rows[part], decode_rows(blocks[part], quant_type, n_in), squares[part]
        )
    return total


def row_squares(rows: Float32Array) -> RowSums:
    """Sums of the squares of each row."""
    return _row_products(rows, rows)


def _measure_chunk(source: Float32Array, stored: Float32Array, squares: RowSums) -> TensorError:
    product = _row_products(stored, source).sum()
    stored -= source
    errors = _row_products(stored, stored)
    worst = (errors / (squares + _WEAK_ROW_RMS**2 * source.shape[1])).max()
    return TensorError(
        float(squares.sum()), float(errors.sum()), float(product), float(np.sqrt(worst))
    )


def _row_products(a: Float32Array, b: Float32Array) -> RowSums:
    """Sums of a times b over each row: of a few thousand in float32, of those in float64.

    That few, since BLAS takes threads of its own for more.
    """
    n_rows, n_in = a.shape
    pieces = (n_rows, -1, gcd(n_in, _N_PER_SUM))
    sums: RowSums = np.vecdot(a.reshape(pieces), b.reshape(pieces)).sum(axis=1, dtype=np.float64)
    return sums


def _allowed(quant_type: QuantType, limit: float) -> str:
    return f"and {quant_type.name} keeps within {limit:.2%}"
