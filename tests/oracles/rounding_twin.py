"""GPTQ rounding into blocks, slowly: optimal brain quantization with the decoder's own values.

Frantar et al. 2022, equations 2 and 3, one row at a time in float64. What codes are worth is read
off libggml's decoder by trying every code in every column.
"""

import numpy as np
import numpy.typing as npt

from convert.code_layout import LAYOUTS, code_values, replace_codes
from convert.encode import ByteArray, QuantType, block_size, encode_rows

Floats = npt.NDArray[np.float64]


def rounding_twin(
    weight: Floats, quant_type: QuantType, hessian: Floats, damp: float, importance: Floats
) -> ByteArray:
    n_out, n_in = weight.shape
    layout, width = LAYOUTS[quant_type], block_size(quant_type)
    damped = hessian + damp * np.trace(hessian) / n_in * np.eye(n_in)
    rows = []
    for row in range(n_out):
        left = weight[row].copy()
        inverse = np.linalg.inv(damped)
        encoded = []
        for start in range(0, n_in, width):
            columns = slice(start, start + width)
            block = encode_rows(
                left[None, columns].astype(np.float32),
                quant_type,
                importance=importance[columns].astype(np.float32),
            )
            values = code_values(block, range(layout.lowest, layout.highest + 1), quant_type)
            codes = np.zeros(width, dtype=np.uint8)
            for k in range(width):
                q = start + k
                worth = values[:, 0, k].astype(np.float64)
                best = int(np.argmin(np.abs(worth - left[q])))
                codes[k] = best + layout.lowest
                left -= (left[q] - worth[best]) / inverse[q, q] * inverse[:, q]  # equation 2
                inverse -= np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]  # equation 3
            encoded.append(replace_codes(block, codes[None], quant_type)[0])
        rows.append(np.concatenate(encoded))
    return np.stack(rows)
