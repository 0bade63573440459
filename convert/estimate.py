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
    n_matrix = 2 * n_tokens * n_weights
    n_elementwise = 0
    n_solves = len(settings.damps)
    per_solved = OPERATIONS_PER_CODE + OPERATIONS_PER_CANDIDATE * (settings.clip_steps + 1)
    for (n_in, n_out), outputs in zip(solves, _outputs(model), strict=True):
        n_sampled = sum(_n_sampled(n, settings) for n in outputs)
        again = [n for n in outputs if _n_sampled(n, settings) < n]  # solved whole after that
        n_solved = n_solves * n_sampled + sum(again)
        n_matrix += hessian_operations(n_in, n_tokens)
        n_matrix += (n_solves + len(again)) * n_in**3 // 3  # factors
        n_matrix += n_solved * n_in**2  # errors passed on
        if settings.is_judged:
            n_matrix += (n_solves + 1) * 2 * n_tokens // HELD_OUT_EVERY * n_in * n_sampled
        if settings.n_sweeps:
            n_matrix += (1 + 2 * settings.n_sweeps) * n_out * n_in**2
        n_elementwise += n_in * (
            n_solved * per_solved + settings.n_sweeps * n_out * OPERATIONS_PER_CODE
        )
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

    A solution keeps a byte a weight; samples of linears that share their inputs are copied into
    one.
    """
    n_held_out = n_tokens // HELD_OUT_EVERY if settings.is_judged else 0
    most = 0.0
    for (n_in, _), outputs in zip(sites(model), _outputs(model), strict=True):
        hessian, largest = n_in**2, n_in * max(outputs)
        n_sampled = sum(_n_sampled(n_out, settings) for n_out in outputs)
        sampled = n_in * n_sampled
        tried = len(settings.damps) * sampled / 4
        group_size = settings.columns_per_group(n_in)
        copied = sampled if len(outputs) > 1 else 0
        trying = copied + max(
            2 * hessian + sampled + GRID_COPIES * n_sampled * group_size,
            hessian + 2 * sampled + n_held_out * n_sampled,
        )
        solving = 2 * hessian + 1.25 * largest + GRID_COPIES * max(outputs) * group_size
        refining = hessian + 3.25 * largest
        activations = hessian + 4 * BATCH_TOKENS * model.intermediate_size
        most = max(
            most,
            n_held_out * n_in
            + max(tried + max(FACTORING * hessian, trying, solving, refining), activations),
        )
    return most


def _outputs(model: Qwen2Config) -> tuple[tuple[int, ...], ...]:
    """Of each linear, those that share their inputs taken together."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    return (q_size, kv_size, kv_size), (hidden,), (inner, inner), (hidden,)


def _n_sampled(n_out: int, settings: GptqSettings) -> int:
    return len(range(n_out)[settings.sample(n_out)])


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
    inputs = (
        model.hidden_size,
        model.n_heads * model.head_dim,
        model.hidden_size,
        model.intermediate_size,
    )
    return tuple(zip(inputs, map(sum, _outputs(model)), strict=True))


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
    for _ in range(20):
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
