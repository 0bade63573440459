"""GPTQ as the paper derives it, slowly: optimal brain quantization in a fixed order.

Frantar et al. 2022, equations 2 and 3: quantize one weight, move all weights left by the closed
formula, and eliminate it from the inverse of the Hessian. No Cholesky factor, no lazy updates, one
row at a time, float64.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def gptq_twin(
    weight: Floats, hessian: Floats, *, bits: int, group_size: int, damp: float, clip_steps: int
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Codes (n_out, n_in), 0 at the middle of their range, and scales (n_out, n_groups)."""
    n_out, n_in = weight.shape
    half = 2 ** (bits - 1)
    damped = hessian + damp * np.trace(hessian) / n_in * np.eye(n_in)
    codes = np.zeros((n_out, n_in), dtype=np.int64)
    scales = np.zeros((n_out, n_in // group_size))
    for row in range(n_out):
        left = weight[row].copy()
        inverse = np.linalg.inv(damped)
        for q in range(n_in):
            if q % group_size == 0:
                group = left[q : q + group_size]
                scales[row, q // group_size] = best_scale(group, half, clip_steps)
            scale = scales[row, q // group_size]
            code = min(max(np.rint(left[q] / scale), -half), half - 1)
            codes[row, q] = int(code) + half
            left -= (left[q] - code * scale) / inverse[q, q] * inverse[:, q]  # equation 2
            inverse -= np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]  # equation 3
    return codes, scales


def best_scale(group: Floats, half: int, clip_steps: int) -> float:
    """The float16 scale with the least squared error, the largest of equals."""
    full = np.abs(group).max() / (half - 0.5)
    if clip_steps == 0:
        return float(np.float16(full))
    candidates = [
        np.float64(np.float16(full * (1 - 0.5 * i / clip_steps))) for i in range(clip_steps + 1)
    ]
    errors = []
    for scale in candidates:
        rounded = np.clip(np.rint(group / scale), -half, half - 1) * scale
        errors.append(np.sum((group - rounded) ** 2))
    return float(candidates[int(np.argmin(errors))])
