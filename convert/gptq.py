"""The GPTQ solver: one weight matrix and its Hessian in, codes, scales and zeros out.

Columns are fixed one after the other; each rounding error is spread over the columns to come so
that the layer's output changes least. Then sweeps choose each code once more, with the codes on
both sides as they are. Pure arrays, on any device, in the Hessian's dtype.
Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.code_feedback import MAX_DAMP, factor, fix_columns, mean_diagonal
from convert.code_sweep import AT_ONCE, best_codes, sweep_blocks
from convert.errors import NumericalError, UsageError

if TYPE_CHECKING:
    import torch

SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number
LARGEST_SCALE = 65504.0  # and its largest
CACHED_ROWS = 4096  # solved at a time on a processor: a chunk of their columns stays in its cache
PER_CHANNEL = -1
ORDERS = ("groups", "columns", "activations")


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """How to quantize.

    group_size: columns sharing a scale; -1: all of a row. symmetric: 0 has the middle code.
    order: "groups" takes the groups, and the columns in each, from the most active down (Gafni et
    al. 2025, group-aware reordering); "columns" goes from left to right; "activations" takes all
    columns by how active they are and groups them in that order, for which readers need a lookup.
    damp: fraction of the mean diagonal added to the Hessian's. other_damps: tried too by the
    exporter, which keeps the one whose output errs least on inputs that it holds out.
    sampled_rows: how many of a matrix tell it which one, at least, or all that there are.
    clip_steps: how many clipped scales are tried beside the full one; 0 tries none. n_sweeps: how
    often the exporter chooses every code once more, and takes them where they err no more on what
    is held out. version: of the file format, 1 or 2.
    column_chunk: columns brought up to date together; it changes speed alone.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    order: str = "groups"
    damp: float = 0.05
    other_damps: tuple[float, ...] = (0.2, 0.8)
    sampled_rows: int = 1024
    clip_steps: int = 24
    n_sweeps: int = 1
    version: int = 1
    column_chunk: int = 128

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bits", self.bits, (2, 3, 4, 8)),
            ("group size", self.group_size, (PER_CHANNEL, 32, 64, 128)),
            ("order", self.order, ORDERS),
            ("format version", self.version, (1, 2)),
        ):
            if value not in known:
                choices = ", ".join(map(str, known))
                raise UsageError(f"{name}: {value} is not one of {choices}; choose one of them")
        for damp in self.damps:
            if not 0 < damp <= MAX_DAMP:
                raise UsageError(f"damp: {damp} is not between 0 and {MAX_DAMP}; 0.05 is usual")
        if self.sampled_rows < 1:
            raise UsageError(f"sampled rows: {self.sampled_rows} are none; 1024 are usual")
        assert self.clip_steps >= 0
        assert self.n_sweeps >= 0
        assert self.column_chunk > 0

    @property
    def damps(self) -> tuple[float, ...]:
        return (self.damp, *self.other_damps)

    @property
    def is_judged(self) -> bool:
        """Whether there is anything to choose by inputs held out; if not, all are fitted to."""
        return bool(self.other_damps or self.n_sweeps)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code of 0 where quantization is symmetric."""
        return 1 << (self.bits - 1)

    def sample(self, n_out: int) -> slice:
        """The rows of a matrix that the dampings are tried on; all where there is but one."""
        return slice(None, None, max(1, n_out // self.sampled_rows) if self.other_damps else 1)

    def columns_per_group(self, n_in: int) -> int:
        return n_in if self.group_size == PER_CHANNEL else self.group_size


@dataclass(frozen=True, slots=True)
class GptqSolution:
    """A quantized matrix: weight = (code - zero) * scale, zero and scale of its row and group.

    codes: (n_out, n_in) uint8. scales: (n_out, n_groups) float16. zeros: the same shape, uint8.
    group_of: (n_in,) int64, each column's group. damp: what the Hessian needed.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: torch.Tensor
    damp: float

    def rows(self, rows: slice) -> GptqSolution:
        """The part of some outputs."""
        return GptqSolution(
            self.codes[rows], self.scales[rows], self.zeros[rows], self.group_of, self.damp
        )


def quantize_matrix(
    weight: torch.Tensor, hessian: torch.Tensor, settings: GptqSettings
) -> GptqSolution:
    """Quantize a linear's weight so that its output on the Hessian's inputs changes least.

    weight: (n_out, n_in). hessian: (n_in, n_in), symmetric; it is not changed.
    Rounding is half to even; scales are rounded to float16 before any code is chosen. Columns whose
    inputs are always zero are rounded to nearest and disturb no other.
    Raises NumericalError where the Hessian is zero, not finite, or indefinite at any damping.
    """
    import torch

    if settings.order == "columns":
        return _solve(weight, hessian, settings)
    n_in = weight.shape[1]
    group_size = settings.columns_per_group(n_in)
    if settings.order == "groups":
        group_order, order = _group_aware_order(hessian.diagonal(), group_size)
    else:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    solution = _solve(weight, hessian, settings, order)
    rank = torch.argsort(order)
    codes, group_of = solution.codes[:, rank], solution.group_of[rank]
    if settings.order == "activations":
        return GptqSolution(codes, solution.scales, solution.zeros, group_of, solution.damp)
    return GptqSolution(
        codes,
        solution.scales[:, group_order.argsort()],
        solution.zeros[:, group_order.argsort()],
        group_order[group_of],
        solution.damp,
    )


def _group_aware_order(
    diagonal: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups by their most active column, and all columns in that order of groups."""
    by_group = diagonal.reshape(-1, group_size)  # (n_groups, group_size)
    group_order = by_group.amax(dim=1).argsort(descending=True, stable=True)
    within = by_group[group_order].argsort(dim=1, descending=True, stable=True)
    return group_order, (group_order[:, None] * group_size + within).flatten()


def _solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    settings: GptqSettings,
    order: torch.Tensor | None = None,
) -> GptqSolution:
    """Algorithm 1, columns in the given order, or from left to right, in contiguous groups."""
    import torch

    n_out, n_in = weight.shape
    group_size = settings.columns_per_group(n_in)
    assert n_in % group_size == 0, (n_in, group_size)
    upper, damp = factor(hessian, settings.damp, order)
    codes = torch.empty(n_in, n_out, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n_in // group_size, n_out, dtype=hessian.dtype, device=weight.device)
    zeros = torch.empty_like(scales)
    for rows in _rows_at_once(weight):
        _fix_columns(  # no name holds the columns, so that they go before the next ones are made
            _ordered_columns(weight[rows].to(hessian.dtype), order),
            upper,
            settings,
            into=(codes[:, rows], scales[:, rows], zeros[:, rows]),
        )
    group_of = torch.arange(n_in, device=weight.device) // group_size
    return GptqSolution(
        codes.T, scales.T.to(torch.float16), zeros.T.to(torch.uint8), group_of, damp
    )


def _rows_at_once(weight: torch.Tensor) -> Iterator[slice]:
    n_out = len(weight)
    n_at_once = CACHED_ROWS if weight.device.type == "cpu" else n_out
    for start in range(0, n_out, n_at_once):
        yield slice(start, min(start + n_at_once, n_out))


def _ordered_columns(rows: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """A copy of some rows as contiguous columns, (n_in, n_rows)."""
    import torch

    if order is None:
        return rows.T.clone(memory_format=torch.contiguous_format)
    return rows.T.index_select(0, order)


def _fix_columns(
    columns: torch.Tensor,
    upper: torch.Tensor,
    settings: GptqSettings,
    *,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Choose codes, and each group's grid just before its first column is fixed.

    columns: (n_in, n_out), used up. into: codes, scales and zeros, each column or group a row.
    """
    codes, scales, zeros = into
    group_size = settings.columns_per_group(len(columns))

    def choose(column: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = column // group_size
        if column % group_size == 0:
            group = slice(column, column + group_size)
            scales[index], zeros[index] = choose_grid(
                _completed(columns, upper, group, wanted), settings
            )
        code = round_to_codes(wanted[0], scales[index], zeros[index], settings)
        return code, (code - zeros[index]) * scales[index]

    fix_columns(columns, upper, chunk=settings.column_chunk, choose=choose, into=codes)


def _completed(
    columns: torch.Tensor, upper: torch.Tensor, group: slice, wanted: torch.Tensor
) -> torch.Tensor:
    """What a group's columns would hold if none of them were rounded, (group_size, n_out).

    wanted: what its columns should hold by the errors of those before it, or the first of them.
    """
    import torch

    if group.start == 0:
        return columns[group]
    assert group.start % AT_ONCE == 0, group  # else `wanted` holds too little
    given = wanted[: group.stop - group.start]
    beyond = slice(group.start + len(given), group.stop)  # in chunks to come
    pulls = torch.cat(
        [
            given - columns[group.start : beyond.start],
            upper[: group.start, beyond].T @ columns[: group.start],
        ]
    )
    moves: torch.Tensor = torch.linalg.solve_triangular(upper[group, group].T, pulls, upper=False)
    return columns[group] + moves


def refine_solution(
    weight: torch.Tensor, hessian: torch.Tensor, solution: GptqSolution, settings: GptqSettings
) -> GptqSolution:
    """The same grids with codes that err less: each in turn the best, given all others.

    weight, hessian: as of quantize_matrix(). The squared error, damped as it was for the solution,
    never rises; settings say how many sweeps over all columns there are.
    """
    import torch

    if not settings.n_sweeps:
        return solution
    codes = torch.empty_like(solution.codes)
    for rows in _rows_at_once(weight):
        _refine_rows(weight[rows], hessian, solution.rows(rows), settings, into=codes[rows])
    return dataclasses.replace(solution, codes=codes)


def _refine_rows(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    solution: GptqSolution,
    settings: GptqSettings,
    *,
    into: torch.Tensor,
) -> None:
    scales = solution.scales.T.to(hessian.dtype).contiguous()
    zeros = solution.zeros.T.to(hessian.dtype).contiguous()
    group_of = solution.group_of.tolist()

    def improve(
        block: slice, columns: torch.Tensor, pulls: torch.Tensor, damped: torch.Tensor
    ) -> torch.Tensor:
        groups = group_of[block]

        def nearest(column: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale, zero = scales[groups[column]], zeros[groups[column]]
            code = round_to_codes(wanted, scale, zero, settings)
            return code, (code - zero) * scale

        codes, values = best_codes(columns, pulls, damped, nearest)
        into[:, block] = codes.T
        return values

    sweep_blocks(
        weight,
        dequantize(solution).T.to(hessian.dtype).contiguous(),  # exact in float32 too
        hessian,
        added=solution.damp * mean_diagonal(hessian),
        width=settings.column_chunk,
        n_sweeps=settings.n_sweeps,
        improve=improve,
    )


def dequantize(solution: GptqSolution) -> torch.Tensor:
    """The weights that the codes stand for, (n_out, n_in) float32.

    No more than two matrices of that size live at a time.
    """
    import torch

    values = solution.codes.to(torch.float32)
    values -= solution.zeros.to(torch.float32)[:, solution.group_of]
    values *= solution.scales.to(torch.float32)[:, solution.group_of]
    return values


def round_to_codes(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, settings: GptqSettings
) -> torch.Tensor:
    """The nearest codes, from 0 to max_code."""
    return ((values / scale).round() + zero).clamp(0, settings.max_code)


def choose_grid(group: torch.Tensor, settings: GptqSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """For each output the scale, a float16 number, and the zero with the least squared error.

    group: (group_size, n_out). Tried are the grid that just holds the group's weights (symmetric:
    the largest lies half a step outside the codes), and smaller ones, which clip for finer steps in
    between. Zeros are 1 or more, since version 1 stores them minus one.
    Raises NumericalError where weights are too large for float16.
    """
    import torch

    if settings.symmetric:
        low = None
        full = group.abs().amax(dim=0) / (settings.middle - 0.5)  # (n_out,)
    else:
        low, high = group.amin(dim=0).clamp(max=0), group.amax(dim=0).clamp(min=0)
        full = (high - low) / settings.max_code
    if not bool((full <= LARGEST_SCALE).all()):
        raise NumericalError(
            f"a scale of {float(full.max()):.3g} is above {LARGEST_SCALE:.0f}, all that float16 "
            "holds; the weights are damaged, download the checkpoint again"
        )
    best_scale, best_zero = _grid(full, low, settings)
    if not settings.clip_steps:
        return best_scale, best_zero
    best_error = torch.full_like(full, torch.inf)
    for step in range(settings.clip_steps + 1):
        kept = 1 - 0.5 * step / settings.clip_steps
        scale, zero = _grid(full * kept, None if low is None else low * kept, settings)
        rounded = (round_to_codes(group, scale, zero, settings) - zero) * scale
        error = (group - rounded).square().sum(dim=0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _grid(
    scale: torch.Tensor, low: torch.Tensor | None, settings: GptqSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale that float16 holds, and the zero that puts `low` at code 0; low None: the middle."""
    import torch

    # Rounded to a positive float16 number, kept in its own dtype.
    scale = scale.half().to(scale.dtype).clamp(min=SMALLEST_SCALE)
    if low is None:
        return scale, torch.full_like(scale, settings.middle)
    return scale, (-low / scale).round().clamp(1, settings.max_code)
