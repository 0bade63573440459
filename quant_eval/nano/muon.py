"""Muon in float32: torch's own works in bfloat16, which CPUs without AVX-512 only emulate.

Source: K. Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic that drives singular values to about one
_N_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix as the step; for matrices inside layers only.

    lr: step size per unit of spectral norm, scaled by sqrt(max(1, n_out / n_in)).
    """

    def __init__(
        self, params: Iterable[torch.Tensor], *, lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update every matrix; those of one shape are orthogonalized together."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                updates = torch.stack([self._momentum(w, group["momentum"]) for w in weights])
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for weight, update in zip(weights, orthogonalize(updates), strict=True):
                    weight.add_(update, alpha=-scale)

    def _momentum(self, weight: torch.Tensor, momentum: float) -> torch.Tensor:
        assert weight.grad is not None
        state = self.state[weight]
        buffer = state.setdefault("momentum", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)  # Nesterov's look ahead


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix's singular value decomposition.

    matrices: (n, n_out, n_in) float32.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_N_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
