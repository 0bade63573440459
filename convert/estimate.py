"""What calibrating or a GPTQ run will take: operations counted, the machine's speed measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.gptq import GptqSettings
from convert.hessian import hessian_operations
from convert.passages import BATCH_TOKENS, HELD_OUT_EVERY
from convert.qwen2 import Qwen2Config

if TYPE_CHECKING:
    import torch

PASSES = 2  # of each half layer: one for the Hessians, one with what is quantized
SENSITIVITY_PASSES = 4  # of each layer: forward; forward, back to its inputs and its weights
FACTORING = 2.2  # matrices of a Hessian's size, itself included, while it is factored: measured
GRID_COPIES = 5  # of a group's columns, while its scales are sought
OPERATIONS_PER_CODE = 900  # elementwise, for each weight, damping and sweep: measured
OPERATIONS_PER_CANDIDATE = 8  # elementwise, for each weight and each scale tried


@dataclass(frozen=True, slots=True)
class Estimate:
    """Floating-point operations in matrix products and one by one, and the peak of memory.

    peak_nbytes: on the device that computes. host_nbytes: on the host meanwhile, where that is
    another.
    """

    n_matrix: float
    n_elementwise: float
    peak_nbytes: int
    host_nbytes: int = 0


def estimate_gptq(model: Qwen2Config, settings: GptqSettings, n_tokens: int) -> Estimate:
    """Count the work of export_gptq() on n_tokens calibration tokens."""
    solves = sites(model)
    n_weights = sum(n_in * n_out for n_in, n_out in solves)
    n_matrix = PASSES * 2 * n_tokens * n_weights
    n_elementwise = 0
    n_solves = len(settings.damps)
    for n_in, n_out in solves:
        n_matrix += hessian_operations(n_in, n_tokens)
        n_matrix += n_solves * (n_in**3 // 3 + n_out * n_in**2)  # factor, errors passed on
        if settings.is_judged:
            n_tries = n_solves + (settings.n_sweeps > 0)
            n_matrix += n_tries * 2 * n_tokens // HELD_OUT_EVERY * n_in * n_out
        if settings.n_sweeps:
            n_matrix += (1 + 2 * settings.n_sweeps) * n_out * n_in**2
        n_choices = n_solves + settings.n_sweeps
        candidates = n_solves * OPERATIONS_PER_CANDIDATE * (settings.clip_steps + 1)
        n_elementwise += n_out * n_in * (n_choices * OPERATIONS_PER_CODE + candidates)
    floats = min(model.n_layers, 2) * n_weights + _gptq_floats(model, settings, n_tokens)
    # The next layer as it is read, and codes with what they are packed into, a byte each at most.
    host = 4 * n_weights + 3 * max(n_in * n_out for n_in, n_out in solves)
    return Estimate(
        float(model.n_layers * n_matrix),
        float(model.n_layers * n_elementwise),
        round(4 * floats),
        host,
    )


def _gptq_floats(model: Qwen2Config, settings: GptqSettings, n_tokens: int) -> float:
    """The most that solving any of a layer's linears takes, beside the layer and the next one.

    A solution keeps a byte a weight; linears that share their inputs are copied into one.
    """
    n_solves = len(settings.damps)
    n_held_out = n_tokens // HELD_OUT_EVERY if settings.is_judged else 0
    most = 0.0
    q_size, hidden, inner = (
        model.n_heads * model.head_dim,
        model.hidden_size,
        model.intermediate_size,
    )
    largest = (q_size, hidden, inner, hidden)  # outputs of one linear
    for n_linears, n_of_one, (n_in, n_out) in zip((3, 1, 2, 1), largest, sites(model), strict=True):
        hessian, weight, refined = n_in**2, n_in * n_out, n_in * n_of_one
        copied = weight if n_linears > 1 else 0
        grid = GRID_COPIES * n_out * settings.columns_per_group(n_in)
        solving = max(
            FACTORING * hessian + (n_solves - 1) * weight / 4,
            2 * hessian + weight + grid + n_solves * weight / 4,
            hessian + 2 * weight + n_held_out * n_out + n_solves * weight / 4,
            hessian + 3 * refined + n_solves * weight / 4,
        )
        activations = hessian + 4 * BATCH_TOKENS * inner
        most = max(most, n_held_out * n_in + max(copied + solving, activations))
    return most


def estimate_calibration(
    model: Qwen2Config,
    *,
    n_tokens: int,
    n_fitted: int,
    n_held_out: int,
    n_sampled: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Estimate:
    """Count the work of calibrate(): one pass over n_tokens, Hessians of n_fitted of them.

    n_sampled: tokens that go forward, forward again and back, for the sensitivities.
    """
    n_weights = sum(n_in * n_out for n_in, n_out in sites(model))
    n_matrix = 2 * (n_tokens + SENSITIVITY_PASSES * n_sampled) * n_weights
    floats = 2 * n_weights + 4 * batch_tokens * model.intermediate_size  # and the next layer
    if n_fitted:
        n_matrix += sum(hessian_operations(n_in, n_fitted) for n_in, _ in sites(model))
        floats += sum(n_in * (n_in + n_held_out) for n_in, _ in sites(model))
    return Estimate(float(model.n_layers * n_matrix), 0.0, 4 * floats)


def estimate_rounding(
    model: Qwen2Config, *, n_types: int, n_dampings: int, n_sweeps: int, n_held_out: int
) -> Estimate:
    """Count the work of GPTQ rounding into n_types types, each tried at n_dampings dampings.

    n_sweeps: over the codes of the best.
    """
    n_matrix = n_elementwise = 0
    for n_in, n_out in sites(model):
        n_tries = n_types * n_dampings
        n_matrix += n_dampings * n_in**3 // 3 + n_tries * n_out * n_in**2
        n_matrix += n_types * (1 + n_sweeps) * 2 * n_out * n_in**2
        n_matrix += (n_tries + 2 * n_types) * 2 * n_held_out * n_in * n_out
        n_elementwise += (n_tries + n_types * n_sweeps) * n_out * n_in * OPERATIONS_PER_CODE
    # The Hessian, its held-out inputs; a matrix with three copies.
    floats = max(
        n_in * (FACTORING * n_in + n_held_out) + (n_types + 3) * n_in * n_out
        for n_in, n_out in sites(model)
    )
    return Estimate(
        float(model.n_layers * n_matrix), float(model.n_layers * n_elementwise), round(4 * floats)
    )


def sites(model: Qwen2Config) -> tuple[tuple[int, int], ...]:
    """(n_in, n_out) of a layer's linears, those that share their inputs taken together."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    return (
        (hidden, q_size + 2 * kv_size),
        (q_size, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    )


def estimated_seconds(estimate: Estimate, device: str = "cpu") -> float:
    """The time on a device as it is now, from a fraction of a second of either kind of work."""
    import torch

    n, n_rows = (768, 128) if device == "cpu" else (4096, 8192)  # enough to keep a GPU busy
    matrix = torch.ones(n, n, device=device)
    rows = torch.ones(n_rows, 4096, device=device)
    matrix_rate = 2 * n**3 / _fastest(lambda: matrix @ matrix)
    elementwise_rate = rows.numel() / _fastest(lambda: rows * rows)
    return estimate.n_matrix / matrix_rate + estimate.n_elementwise / elementwise_rate


def _fastest(work: Callable[[], torch.Tensor]) -> float:
    """Seconds that the work takes at best, its last number read, since a GPU runs ahead of us."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()[-1, -1].item()
        times.append(time.perf_counter() - start)
    return min(times)


def format_duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit_s, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{max(seconds, 1):.0f} s"
