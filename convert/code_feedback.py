"""Columns fixed one after the other, each making up for the errors of those before it.

With the damped Hessian H = U D U^T, U upper triangular with ones on its diagonal, what is off in
the columns so far moves the next one by their entries in its column of U. These are GPTQ's
updates, for which its own form inverts the Hessian and factors that; here one factorization does.
Source: Frantar et al. 2022 (GPTQ), algorithm 1; Chee et al. 2023 (QuIP), theorem 6, which shows
that both forms choose the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from convert.code_sweep import AT_ONCE
from convert.errors import NumericalError

if TYPE_CHECKING:
    import torch

MAX_DAMP = 1.0
ROWS_AT_ONCE = 1024  # of a Hessian, brought in order
REVERSED_AT_ONCE = 1 << 22  # numbers of a factor

Choose = Callable[[int, "torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""Of a column, and what it and those after it in its chunk should hold: its codes and values.

At multiples of AT_ONCE all that comes before is in what those after it should hold, too.
"""


def mean_diagonal(hessian: torch.Tensor) -> float:
    """What damping is a fraction of."""
    return float(hessian.diagonal().cpu().double().mean())  # MPS has no float64


def factor(
    hessian: torch.Tensor, damp: float, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """U of the damped Hessian U D U^T, upper triangular with ones, and the damping used.

    order: in which columns and rows are taken; None: as they are.
    Damping rises tenfold, up to 1, while the Hessian is not positive definite. One matrix of the
    Hessian's size is made beside it.
    Raises NumericalError where the Hessian is zero, not finite, or indefinite at any damping.
    """
    if not bool(hessian.sum(dim=1).isfinite().all()):  # hessian.isfinite() takes two copies
        raise NumericalError("its Hessian holds NaN or Inf; the calibration inputs are damaged")
    mean = mean_diagonal(hessian)
    if mean <= 0:
        raise NumericalError("its Hessian is zero, no input was active; calibrate on more text")
    while True:
        upper = _upper_factor(hessian, damp * mean, order)
        if upper is not None:
            upper /= upper.diagonal().clone()
            return upper, damp
        if damp >= MAX_DAMP:
            raise NumericalError(
                f"its Hessian is indefinite even with damping {damp:g}; calibrate on more text"
            )
        damp = min(10 * damp, MAX_DAMP)


def _upper_factor(
    hessian: torch.Tensor, added: float, order: torch.Tensor | None
) -> torch.Tensor | None:
    """R of the ordered Hessian R R^T, upper triangular; None: it has none.

    added: to the diagonal. R is a lower Cholesky factor, of the Hessian reversed in both axes and
    then reversed itself.
    """
    import torch

    if order is None:
        order = torch.arange(len(hessian), device=hessian.device)
    last_first = order.flip(0)
    matrix = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    for start in range(0, len(matrix), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        matrix[rows] = hessian.index_select(0, last_first[rows]).index_select(1, last_first)
    matrix.diagonal().add_(added)
    columns = matrix.mT  # symmetric; as LAPACK wants it, so that it is factored in place
    failed_at = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns, upper=True, out=(columns, failed_at))
    if int(failed_at):
        return None
    _reverse(matrix.view(-1))
    return matrix


def _reverse(numbers: torch.Tensor) -> None:
    """Reverse a vector in place, a piece from either end at a time."""
    n = len(numbers)
    for start in range(0, n // 2, REVERSED_AT_ONCE):
        stop = min(start + REVERSED_AT_ONCE, n // 2)
        first, last = numbers[start:stop], numbers[n - stop : n - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def fix_columns(
    columns: torch.Tensor, upper: torch.Tensor, *, chunk: int, choose: Choose, into: torch.Tensor
) -> None:
    """Choose the codes of all columns, in the order of the factor.

    columns: (n_in, n_out), the weights; they become what is off, weight - value. upper: of
    factor(). chunk: columns brought up to date together; it changes speed alone. into: the codes,
    (n_in, n_out) uint8.
    """
    import torch

    n_in = len(columns)
    for start in range(0, n_in, chunk):
        stop = min(start + chunk, n_in)
        wanted = torch.addmm(columns[start:stop], upper[:start, start:stop].T, columns[:start])
        first = start
        while first < stop:
            last = min(first // AT_ONCE * AT_ONCE + AT_ONCE, stop)
            for column in range(first, last):
                code, value = choose(column, wanted[column - start :])
                into[column] = code.to(torch.uint8)
                columns[column] -= value
                coming = wanted[column + 1 - start : last - start]
                coming.addr_(upper[column, column + 1 : last], columns[column])
            wanted[last - start :].addmm_(upper[first:last, last:stop].T, columns[first:last])
            first = last
