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


def sweep_codes(
    weight: torch.Tensor,
    columns: torch.Tensor,
    hessian: torch.Tensor,
    *,
    added: float,
    width: int,
    n_sweeps: int,
    nearest_in: Callable[[slice], Nearest],
    keep: Callable[[slice, torch.Tensor], None],
) -> None:
    """Lower the squared error that codes leave, damped by `added` on the Hessian's diagonal.

    weight: (n_out, n_in). columns: (n_in, n_out) in the Hessian's dtype, the codes' values now;
    they become those of the new codes. width: of a block of columns. keep: gets each block's new
    codes, (width, n_out) uint8. The error never rises, and at rest no code alone can lower it.
    """
    n_in = len(columns)
    errors = weight.T.to(columns) - columns
    pulls = (hessian @ errors).add_(errors, alpha=added)  # half the gradient, downhill
    del errors
    for n_left in reversed(range(n_sweeps)):
        for start in range(0, n_in, width):
            block = slice(start, min(start + width, n_in))
            damped = hessian[block, block].clone()
            damped.diagonal().add_(added)
            codes, changes = _best_codes(
                columns[block], pulls[block].clone(), damped, nearest_in(block)
            )
            keep(block, codes)
            read_again = slice(0 if n_left else block.stop, n_in)
            pulls[read_again].addmm_(hessian[read_again, block], changes, alpha=-1)
            if n_left:
                pulls[block] -= added * changes


def _best_codes(
    columns: torch.Tensor, pulls: torch.Tensor, hessian: torch.Tensor, nearest: Nearest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of one block's columns, (width, n_out) uint8, and by how much each value changed.

    columns, pulls: (width, n_out); they are changed.
    """
    import torch

    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    changes = torch.empty_like(columns)
    for start in range(0, len(columns), AT_ONCE):
        stop = min(start + AT_ONCE, len(columns))
        for column in range(start, stop):
            wanted = columns[column] + pulls[column] / hessian[column, column]
            code, value = nearest(column, wanted)
            codes[column], changes[column] = code.to(torch.uint8), value - columns[column]
            columns[column] = value
            coming = slice(column + 1, stop)
            pulls[coming].addr_(hessian[coming, column], changes[column], alpha=-1)
        pulls[stop:].addmm_(hessian[stop:, start:stop], changes[start:stop], alpha=-1)
    return codes, changes
