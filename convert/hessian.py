"""Statistics of a linear's inputs: their importance, and the Hessian of its squared output error.

The importance is the mean square of each input column; twice that is the Hessian's diagonal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convert.errors import NumericalError

if TYPE_CHECKING:
    import torch

BROKEN_INPUTS = "its inputs hold NaN or Inf; the weights before it are damaged"
ROWS_AT_ONCE = 2048  # of a Hessian, computed from their diagonal on; the rest is symmetric
ENOUGH_TOKENS = 4  # for each column; with 1.7 GPTQ rounding was seen to fit the text, not the model


def too_few_tokens(n_fitted: int, n_columns: int) -> str | None:
    """A warning where Hessians are of too few tokens to be trusted; None where they are of enough.

    n_fitted: tokens in the Hessians, without those held out. n_columns: of the widest matrix.
    """
    if n_fitted >= ENOUGH_TOKENS * n_columns:
        return None
    return (
        f"{n_fitted:,} tokens for {n_columns:,} columns are {n_fitted / n_columns:.1f} for each "
        f"and fewer than {ENOUGH_TOKENS} overfit; give more tokens, "
        f"{ENOUGH_TOKENS * n_columns:,} if you can"
    )


def accumulate_hessian(hessian: torch.Tensor, inputs: torch.Tensor, n_seen: int) -> int:
    """Fold one batch of layer inputs into the running mean Hessian, in place.

    hessian: (n_in, n_in) float32 or float64, mean of 2 x x^T over the tokens seen.
    inputs:  (n_tokens, n_in). Returns the new token count.
    Raises NumericalError if inputs hold NaN or Inf.
    Source: Frantar et al. 2022 (GPTQ), section 3, the Hessian of equation 1.
    """
    assert inputs.ndim == 2, inputs.shape
    if not inputs.isfinite().all():
        raise NumericalError(BROKEN_INPUTS)
    n_total = n_seen + len(inputs)
    if n_total > n_seen:
        inputs = inputs.to(hessian.dtype)
        share = {"beta": n_seen / n_total, "alpha": 2 / n_total}
        for start in range(0, len(hessian), ROWS_AT_ONCE):
            stop = start + ROWS_AT_ONCE
            hessian[start:stop, start:].addmm_(inputs[:, start:stop].T, inputs[:, start:], **share)
            hessian[stop:, start:stop] = hessian[start:stop, stop:].T
    return n_total


def hessian_operations(n_in: int, n_tokens: int) -> int:
    """Floating-point operations that n_tokens inputs of n_in columns take."""
    return n_tokens * n_in * (n_in + min(n_in, ROWS_AT_ONCE))


class InputStatistics:
    """What one pass keeps of the inputs of a linear: always sums of squares; Hessian if wanted.

    Inputs marked held out count for the importance, stay out of the Hessian and are kept whole, to
    judge by what the Hessian has not seen.
    """

    def __init__(self, n_in: int, *, with_hessian: bool, device: torch.device) -> None:
        import torch

        self.n_tokens = 0
        self.n_fitted = 0
        self._sum_squares = torch.zeros(n_in, dtype=torch.float64)
        self._held_out: list[torch.Tensor] = []
        self._hessian = (
            torch.zeros(n_in, n_in, dtype=torch.float32, device=device) if with_hessian else None
        )

    def add(self, inputs: torch.Tensor, *, held_out: bool, fitted: bool) -> None:
        """Fold a batch in; inputs: (n_tokens, n_in)."""
        import torch

        sums = inputs.to(torch.float32).square().sum(dim=0).cpu().double()
        if not bool(sums.isfinite().all()):
            raise NumericalError(BROKEN_INPUTS)
        self._sum_squares += sums
        self.n_tokens += len(inputs)
        if self._hessian is None:
            return
        if held_out:
            self._held_out.append(inputs.to("cpu", torch.float32))
        elif fitted:
            self.n_fitted = accumulate_hessian(self._hessian, inputs, self.n_fitted)

    def tensors(self) -> dict[str, torch.Tensor]:
        """importance (n_in,), and with a Hessian: hessian (n_in, n_in), held_out (n, n_in)."""
        import torch

        kept = {"importance": (self._sum_squares / max(self.n_tokens, 1)).float()}
        if self._hessian is not None:
            n_in = len(self._sum_squares)
            kept["hessian"] = self._hessian.cpu()
            kept["held_out"] = torch.cat([torch.empty(0, n_in), *self._held_out])
        return kept
