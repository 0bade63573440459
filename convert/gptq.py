"""The GPTQ solver: one weight matrix and its Hessian in, codes and scales out.

Columns are fixed from left to right; each rounding error is spread over the columns to come so that
the layer's output changes least. Pure arrays, on any device, in the Hessian's dtype.
Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.errors import NumericalError, UsageError

if TYPE_CHECKING:
    import torch

SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number
LARGEST_SCALE = 65504.0  # and its largest
MAX_DAMP = 1.0


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """How to quantize.

    group_size: columns sharing a scale. damp: fraction of the mean diagonal added to the Hessian's.
    clip_steps: how many clipped scales are tried beside the full one; 0 tries none.
    column_chunk: columns solved before the lazy update of the rest; it changes speed alone.
    """

    bits: int = 4
    group_size: int = 128
    damp: float = 0.05
    clip_steps: int = 24
    column_chunk: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise UsageError(f"bits: {self.bits} is not one of 2, 3, 4, 8; choose one of them")
        if self.group_size not in (32, 64, 128):
            raise UsageError(
                f"group size: {self.group_size} is not one of 32, 64, 128; choose one of them"
            )
        if not 0 < self.damp <= MAX_DAMP:
            raise UsageError(f"damp: {self.damp} is not between 0 and {MAX_DAMP}; 0.05 is usual")
        assert self.clip_steps >= 0
        assert self.column_chunk > 0

    @property
    def zero(self) -> int:
        """The code that stands for 0: the middle of the range, for quantization is symmetric."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True)
class GptqSolution:
    """A quantized matrix: weight = (code - zero) * scale of its row and group.

    codes: (n_out, n_in) uint8. scales: (n_out, n_groups) float16. damp: what the Hessian needed.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    damp: float


def quantize_matrix(
    weight: torch.Tensor, hessian: torch.Tensor, settings: GptqSettings
) -> GptqSolution:
    """Quantize a linear's weight so that its output on the Hessian's inputs changes least.

    weight: (n_out, n_in). hessian: (n_in, n_in), symmetric; it is not changed.
    Rounding is half to even; scales are rounded to float16 before any code is chosen. Columns whose
    inputs are always zero are rounded to nearest and disturb no other.
    Raises NumericalError where the Hessian is zero, not finite, or indefinite at any damping.
    """
    import torch

    n_out, n_in = weight.shape
    group_size, zero = settings.group_size, settings.zero
    assert n_in % group_size == 0, (n_in, group_size)
    inv_chol, damp = factor_inverse(hessian, settings.damp)
    columns = weight.T.to(hessian.dtype, copy=True).contiguous()  # (n_in, n_out)
    codes = torch.empty(n_in, n_out, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n_in // group_size, n_out, dtype=columns.dtype, device=weight.device)
    for start in range(0, n_in, settings.column_chunk):
        stop = min(start + settings.column_chunk, n_in)
        errors = columns.new_zeros(stop - start, n_out)
        for column in range(start, stop):
            if column % group_size == 0:
                group_stop = column + group_size
                within = columns[column : min(stop, group_stop)]
                # The lazy update has not reached the group's columns after the chunk.
                spread = inv_chol[start:column, stop:group_stop].T @ errors[: column - start]
                group = torch.cat([within, columns[stop:group_stop] - spread])
                scales[column // group_size] = choose_scales(group, settings)
            scale = scales[column // group_size]
            code = round_to_codes(columns[column], scale, zero)
            error = (columns[column] - code * scale) / inv_chol[column, column]
            columns[column:stop] -= inv_chol[column, column:stop, None] * error
            errors[column - start] = error
            codes[column] = (code + zero).to(torch.uint8)
        columns[stop:] -= inv_chol[start:stop, stop:].T @ errors
    return GptqSolution(codes.T, scales.T.to(torch.float16), damp)


def dequantize(solution: GptqSolution, settings: GptqSettings) -> torch.Tensor:
    """The weights that the codes stand for, (n_out, n_in) float32."""
    import torch

    scales = solution.scales.to(torch.float32).repeat_interleave(settings.group_size, dim=1)
    return (solution.codes.to(torch.float32) - settings.zero) * scales


def round_to_codes(values: torch.Tensor, scale: torch.Tensor, zero: int) -> torch.Tensor:
    """The nearest codes, from -zero to zero - 1."""
    return (values / scale).round().clamp(-zero, zero - 1)


def choose_scales(group: torch.Tensor, settings: GptqSettings) -> torch.Tensor:
    """For each output the scale, a float16 number, with the least squared error over its group.

    group: (group_size, n_out). Tried are the scale at which the largest weight lies half a step
    outside the codes, and smaller ones, which clip it for finer steps in between.
    Raises NumericalError where weights are too large for float16.
    """
    import torch

    full = group.abs().amax(dim=0) / (settings.zero - 0.5)  # (n_out,)
    if not bool((full <= LARGEST_SCALE).all()):
        raise NumericalError(
            f"a scale of {float(full.max()):.3g} is above {LARGEST_SCALE:.0f}, all that float16 "
            "holds; the weights are damaged, download the checkpoint again"
        )
    best_scale = _as_float16(full)
    if not settings.clip_steps:
        return best_scale
    best_error = torch.full_like(full, torch.inf)
    for step in range(settings.clip_steps + 1):
        scale = _as_float16(full * (1 - 0.5 * step / settings.clip_steps))
        rounded = round_to_codes(group, scale, settings.zero) * scale
        error = (group - rounded).square().sum(dim=0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _as_float16(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to a positive float16 number, kept in its own dtype."""
    return scale.half().to(scale.dtype).clamp(min=SMALLEST_SCALE)


def factor_inverse(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor U of the damped Hessian's inverse, U^T U, and the damping used.

    Damping rises tenfold, up to 1, while the Hessian is not positive definite.
    Flipped in both axes, the Hessian's lower factor L is U's inverse, so that one factorization and
    one triangular inverse do.
    """
    import torch

    mean_diagonal = float(hessian.diagonal().double().mean())
    if not bool(hessian.isfinite().all()):
        raise NumericalError("its Hessian holds NaN or Inf; the calibration inputs are damaged")
    if mean_diagonal <= 0:
        raise NumericalError("its Hessian is zero, no input was active; calibrate on more text")
    while True:
        flipped = hessian.flip(0, 1)
        flipped.diagonal().add_(damp * mean_diagonal)
        lower, failed_at = torch.linalg.cholesky_ex(flipped)
        del flipped  # each of these matrices takes 3 GB for QwQ-32B: at most four live at a time
        if not int(failed_at):
            break
        if damp >= MAX_DAMP:
            raise NumericalError(
                f"its Hessian is indefinite even with damping {damp:g}; calibrate on more text"
            )
        damp = min(10 * damp, MAX_DAMP)
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, inverse, upper=False)
    del lower
    return inverse.flip(0, 1), damp
