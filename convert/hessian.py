"""The Hessian of a linear's squared output error: second moments of its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convert.errors import NumericalError

if TYPE_CHECKING:
    import torch


def accumulate_hessian(hessian: torch.Tensor, inputs: torch.Tensor, n_seen: int) -> int:
    """Fold one batch of layer inputs into the running mean Hessian, in place.

    hessian: (n_in, n_in) float32 or float64, mean of 2 x x^T over the tokens seen.
    inputs:  (n_tokens, n_in). Returns the new token count.
    Raises NumericalError if inputs hold NaN or Inf.
    Source: Frantar et al. 2022 (GPTQ), section 3, the Hessian of equation 1.
    """
    assert inputs.ndim == 2, inputs.shape
    if not inputs.isfinite().all():
        raise NumericalError("its inputs hold NaN or Inf; the weights before it are damaged")
    n_total = n_seen + len(inputs)
    if n_total > n_seen:
        inputs = inputs.to(hessian.dtype)
        hessian.addmm_(inputs.T, inputs, beta=n_seen / n_total, alpha=2 / n_total)
    return n_total
