"""Sweeps over a quantized matrix: each code in turn the best one, given all the others.

Source: Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AT_ONCE = 32  # columns of a block chosen before the others of it are brought up to date

Nearest = Callable[[int, "torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""Of a column of a block and the numbers it should hold: the codes nearest, and their values."""

Improve = Callable[[slice, "torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Of a block: its columns, values now, pulls and damped Hessian, to the values that err less."""


def sweep_blocks(
    weight: torch.Tensor,
    columns: torch.Tensor,
    hessian: torch.Tensor,
    *,
    added: float,
    width: int,
    n_sweeps: int,
    improve: Improve,
) -> None:
    """Lower the squared error of a quantized matrix, damped by `added` on the Hessian's diagonal.

    weight: (n_out, n_in). columns: (n_in, n_out) in the Hessian's dtype, the quantized values now;
    they become the new ones. width: of a block of columns. improve: gives each block new values,
    (width, n_out), from the old, the pulls on them (half the gradient, downhill) and the block's
    part of the Hessian.
    """
    n_in = len(columns)
    errors = weight.T.to(columns) - columns
    pulls = (hessian @ errors).add_(errors, alpha=added)
    del errors
    for n_left in reversed(range(n_sweeps)):
        for start in range(0, n_in, width):
            block = slice(start, min(start + width, n_in))
            damped = hessian[block, block].clone()
            damped.diagonal().add_(added)
            values = improve(block, columns[block], pulls[block], damped)
            changes = values - columns[block]
            columns[block] = values
            read_again = slice(0 if n_left else block.stop, n_in)
            pulls[read_again].addmm_(hessian[read_again, block], changes, alpha=-1)
            if n_left:
                pulls[block] -= added * changes


def best_codes(
    columns: torch.Tensor, pulls: torch.Tensor, hessian: torch.Tensor, nearest: Nearest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of one block's columns, (width, n_out) uint8, and their values.

    columns, pulls: (width, n_out). The error never rises.
    """
    import torch

    values, pulls = columns.clone(), pulls.clone()
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    for start in range(0, len(columns), AT_ONCE):
        stop = min(start + AT_ONCE, len(columns))
        for column in range(start, stop):
            wanted = columns[column] + pulls[column] / hessian[column, column]
            code, values[column] = nearest(column, wanted)
            codes[column] = code.to(torch.uint8)
            coming = slice(column + 1, stop)
            change = values[column] - columns[column]
            pulls[coming].addr_(hessian[coming, column], change, alpha=-1)
        changes = values[start:stop] - columns[start:stop]
        pulls[stop:].addmm_(hessian[stop:, start:stop], changes, alpha=-1)
    return codes, values
