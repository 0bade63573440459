"""GPTQ as the paper derives it, slowly: optimal brain quantization in a fixed order.

Frantar et al. 2022, equations 2 and 3: quantize one weight, move all weights left by the closed
formula, and eliminate it from the inverse of the Hessian. No Cholesky factor, no lazy updates, one
row at a time, float64.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Twin:
    """Codes (n_out, n_in), scales and zeros (n_out, n_groups), group_of (n_in,)."""

    codes: Ints
    scales: Floats
    zeros: Ints
    group_of: Ints


def gptq_twin(
    weight: Floats,
    hessian: Floats,
    *,
    bits: int,
    group_size: int,
    damp: float,
    clip_steps: int,
    symmetric: bool = True,
    order: str = "columns",
) -> Twin:
    n_out, n_in = weight.shape
    damped = hessian + damp * np.trace(hessian) / n_in * np.eye(n_in)
    groups = column_groups(np.diag(hessian), group_size, order)
    codes = np.zeros((n_out, n_in), dtype=np.int64)
    scales = np.zeros((n_out, len(groups)))
    zeros = np.zeros((n_out, len(groups)), dtype=np.int64)
    group_of = np.zeros(n_in, dtype=np.int64)
    for row in range(n_out):
        left = weight[row].copy()
        inverse = np.linalg.inv(damped)
        for index, group in groups:
            group_of[group] = index
            scale, zero = best_grid(left[group], bits, clip_steps, symmetric)
            scales[row, index], zeros[row, index] = scale, zero
            for q in group:
                code = min(max(np.rint(left[q] / scale) + zero, 0), 2**bits - 1)
                codes[row, q] = int(code)
                error = left[q] - (code - zero) * scale
                left -= error / inverse[q, q] * inverse[:, q]  # equation 2
                inverse -= np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]  # equation 3
    return Twin(codes, scales, zeros, group_of)


def sweep_twin(
    weight: Floats, hessian: Floats, twin: Twin, *, bits: int, damp: float, n_sweeps: int
) -> Ints:
    """Codes after sweeps from left to right, each the one of all with the least squared error.

    Behdin et al. 2023, algorithm 1, without its closed formula: every code is tried.
    """
    n_out, n_in = weight.shape
    damped = hessian + damp * np.trace(hessian) / n_in * np.eye(n_in)
    codes = twin.codes.copy()
    for row in range(n_out):
        scales, zeros = twin.scales[row][twin.group_of], twin.zeros[row][twin.group_of]
        for column in list(range(n_in)) * n_sweeps:
            tried = np.tile(codes[row], (2**bits, 1))
            tried[:, column] = range(2**bits)
            errors = weight[row] - (tried - zeros) * scales
            codes[row, column] = np.argmin(((errors @ damped) * errors).sum(axis=1))
    return codes


def column_groups(activity: Floats, group_size: int, order: str) -> list[tuple[int, list[int]]]:
    """Groups in the order of work, each with its index and its columns in the order of work."""
    n_in = len(activity)
    columns = list(range(n_in))
    if order == "activations":
        columns.sort(key=lambda column: -activity[column])
    starts = range(0, n_in, group_size)
    groups = [(i, columns[start : start + group_size]) for i, start in enumerate(starts)]
    if order == "groups":
        for _, group in groups:
            group.sort(key=lambda column: -activity[column])
        groups.sort(key=lambda numbered: -max(activity[column] for column in numbered[1]))
    return groups


def best_grid(group: Floats, bits: int, clip_steps: int, symmetric: bool) -> tuple[float, int]:
    """The float16 scale and the zero with the least squared error, the widest of equals."""
    low, high = min(group.min(), 0), max(group.max(), 0)
    best = (np.inf, 0.0, 0)
    for i in range(clip_steps + 1):
        kept = 1 - 0.5 * i / clip_steps if clip_steps else 1
        if symmetric:
            scale = float(np.float16(np.abs(group).max() / (2 ** (bits - 1) - 0.5) * kept))
            zero = 2 ** (bits - 1)
        else:
            scale = float(np.float16((high - low) / (2**bits - 1) * kept))
            zero = int(min(max(np.rint(-low * kept / scale), 1), 2**bits - 1))
        codes = np.clip(np.rint(group / scale) + zero, 0, 2**bits - 1)
        error = float(np.sum((group - (codes - zero) * scale) ** 2))
        if error < best[0]:
            best = (error, scale, zero)
    return best[1], best[2]
