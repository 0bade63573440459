"""The running Hessian against the plain product, however the tokens come."""

import pytest
import torch

from convert import hessian as hessian_module
from convert.errors import NumericalError
from convert.hessian import accumulate_hessian, too_few_tokens


def inputs(n_tokens: int = 300) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n_tokens, 24, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 250, 43], [43, 7, 250], [0, 300, 0]])
def test_batches_do_not_matter(sizes: list[int]) -> None:
    """Catches a mean weighted by batches, not tokens, and an empty batch that divides by 0."""
    hessian, n_seen = torch.zeros(24, 24, dtype=torch.float64), 0
    for batch in torch.split(inputs(), sizes):
        n_seen = accumulate_hessian(hessian, batch, n_seen)
    assert n_seen == 300
    torch.testing.assert_close(hessian, 2 * inputs().T @ inputs() / 300)


@pytest.mark.parametrize("n_rows", [1, 7, 24])
def test_rows_at_once_do_not_matter(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a lower half that stays behind the upper one, and rows past the last."""
    monkeypatch.setattr(hessian_module, "ROWS_AT_ONCE", n_rows)
    hessian = torch.zeros(24, 24, dtype=torch.float64)
    for n_seen in (0, 200):
        accumulate_hessian(hessian, inputs()[n_seen : n_seen + 200], n_seen)
    torch.testing.assert_close(hessian, 2 * inputs().T @ inputs() / 300)


def test_order_does_not_matter() -> None:
    """Catches old batches that fade."""
    forward, backward = (torch.zeros(24, 24, dtype=torch.float64) for _ in range(2))
    for i, batch in enumerate(torch.split(inputs(), 100)):
        accumulate_hessian(forward, batch, 100 * i)
    for i, batch in enumerate(reversed(torch.split(inputs(), 100))):
        accumulate_hessian(backward, batch, 100 * i)
    torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_inputs_are_errors(value: float) -> None:
    """Catches a Hessian of NaN that shows up only as nonsense."""
    broken = inputs()
    broken[3, 4] = value
    with pytest.raises(NumericalError, match="NaN or Inf"):
        accumulate_hessian(torch.zeros(24, 24, dtype=torch.float64), broken, 0)


def test_too_few_tokens_are_said() -> None:
    """Catches a threshold at one token a column: with 1.7 of them a matrix of 4,864 was overfit."""
    warning = too_few_tokens(8192, 4864)
    assert warning is not None
    assert "8,192 tokens for 4,864 columns are 1.7 for each and fewer than 4 overfit" in warning
    assert "19,456" in warning
    assert too_few_tokens(19_455, 4864)
    assert too_few_tokens(19_456, 4864) is None
