"""GPTQ rounding into blocks, slowly: optimal brain quantization with the decoder's own values.

Frantar et al. 2022, equations 2 and 3, one row at a time in float64. What codes are worth is read
off libggml's decoder by trying every code in every column.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from convert.code_layout import LAYOUTS, code_values
from convert.encode import ByteArray, QuantType, block_size, row_nbytes

Floats = npt.NDArray[np.float64]


def rounding_twin(
    weight: Floats,
    encoded: ByteArray,
    quant_type: QuantType,
    hessian: Floats,
    damp: float,
    order: Sequence[int],
) -> ByteArray:
    """encoded: the weight's blocks, whose scales stay. order: of the columns."""
    packed, width = LAYOUTS[quant_type].codes, block_size(quant_type)
    n_in = weight.shape[1]
    damped = hessian + damp * np.trace(hessian) / n_in * np.eye(n_in)
    rows = []
    for row, of_row in zip(weight, encoded, strict=True):
        blocks = of_row.reshape(-1, row_nbytes(quant_type, width))
        worth = code_values(blocks, range(packed.lowest, packed.highest + 1), quant_type)
        worth = worth.reshape(len(worth), n_in)
        left, inverse = row.copy(), np.linalg.inv(damped)
        codes = np.zeros(n_in, dtype=np.uint8)
        for q in order:
            values = worth[:, q].astype(np.float64)
            best = int(np.argmin(np.abs(values - left[q])))
            codes[q] = best + packed.lowest
            left -= (left[q] - values[best]) / inverse[q, q] * inverse[:, q]  # equation 2
            inverse -= np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]  # equation 3
        rows.append(packed.replace(blocks, codes.reshape(-1, width)).ravel())
    return np.stack(rows)
