"""The factor of a Hessian and the columns fixed with it, against their definitions."""

import pytest
import torch

from convert import code_feedback
from convert.code_feedback import factor, fix_columns
from convert.code_sweep import AT_ONCE


def problem(n_in: int, n_out: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and a Hessian, float64."""
    rng = torch.Generator().manual_seed(n_in)
    inputs = torch.randn(2 * n_in, n_in, generator=rng, dtype=torch.float64)
    inputs[:, 1:] += inputs[:, :-1]
    return torch.randn(n_in, n_out, generator=rng, dtype=torch.float64), inputs.T @ inputs


@pytest.mark.parametrize("n_in", [1, 2, 33, 128, 129])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_the_factor_is_that_of_the_damped_hessian(
    n_in: int, is_ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a factor of another order, a lower one, and ends of pieces left as they were."""
    monkeypatch.setattr(code_feedback, "ROWS_AT_ONCE", 10)
    monkeypatch.setattr(code_feedback, "REVERSED_AT_ONCE", 100)
    _, hessian = problem(n_in)
    order = torch.randperm(n_in, generator=torch.Generator().manual_seed(1))
    upper, damp = factor(hessian, 0.02, order if is_ordered else None)
    assert damp == 0.02
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() == 1).all()
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(n_in, dtype=torch.float64)
    if is_ordered:
        damped = damped[order][:, order]
    inverse = torch.linalg.inv(upper)
    rest = inverse @ damped @ inverse.T
    torch.testing.assert_close(rest, torch.diag(rest.diagonal()), atol=1e-9 * n_in, rtol=0)
    assert (rest.diagonal() > 0).all()


@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
def test_columns_hold_what_makes_up_for_those_before(chunk: int) -> None:
    """Catches an error that is passed on twice or not at all, at any border of chunks."""
    weights, hessian = problem(130)
    upper, _ = factor(hessian, 0.02)
    columns, seen = weights.clone(), []

    def choose(column: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        up_to_date = len(wanted) if column % AT_ONCE == 0 else 1
        after = slice(column, column + up_to_date)
        expected = weights[after] + upper[:column, after].T @ columns[:column]
        torch.testing.assert_close(wanted[:up_to_date], expected)
        seen.append(wanted[0].round())
        return wanted[0].round().clamp(0, 3), seen[-1]

    codes = torch.empty(columns.shape, dtype=torch.uint8)
    fix_columns(columns, upper, chunk=chunk, choose=choose, into=codes)
    values = torch.stack(seen)
    torch.testing.assert_close(columns, weights - values)
    assert torch.equal(codes.double(), values.clamp(0, 3))
