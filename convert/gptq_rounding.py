"""K-quants with GPTQ rounding: scales as the encoder finds them, codes chosen with the Hessian.

Columns are fixed from the most active down, wherever their blocks lie, and each rounding error is
spread over the columns to come. Then sweeps over all blocks choose each code, each scale and each
unit anew, with all others as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convert.code_feedback import fix_columns, mean_diagonal
from convert.code_layout import (
    LAYOUTS,
    Codes,
    code_values,
    read_unit,
    replace_unit,
    scale_values,
    unit_values,
)
from convert.code_sweep import best_codes, sweep_blocks
from convert.decode import decode_rows
from convert.encode import ByteArray, Float32Array, QuantType, block_size, row_nbytes

if TYPE_CHECKING:
    import torch

ROWS_AT_ONCE = 1024
COLUMN_CHUNK = 256  # columns brought up to date together


def round_matrix(
    weight: torch.Tensor,
    blocks: ByteArray,
    quant_type: QuantType,
    *,
    upper: torch.Tensor,
    order: torch.Tensor,
) -> ByteArray:
    """The same blocks with codes by which the output on the Hessian's inputs changes least.

    weight: (n_out, n_in) float32. blocks: its encoding, (n_out, row_nbytes), whose scales stay.
    order: (n_in,), in which columns are fixed. upper: (n_in, n_in), of code_feedback.factor() in
    that order.
    Source: Frantar et al. 2022 (GPTQ), algorithm 1, with the scales given.
    """
    import torch

    n_out, n_in = weight.shape
    codes = np.empty((n_out, n_in), dtype=np.uint8)
    for start in range(0, n_out, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        columns = weight[rows].T.to(upper.dtype).index_select(0, order)
        grid = _Grid.of(_apart(blocks[rows], quant_type), quant_type, like=columns).taken(order)
        fixed = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
        fix_columns(columns, upper, chunk=COLUMN_CHUNK, choose=grid.nearest_first, into=fixed)
        codes[rows] = torch.empty_like(fixed).index_copy_(0, order, fixed).T.cpu().numpy()
    return _with_codes(blocks, codes, quant_type)


def refine_blocks(
    weight: torch.Tensor,
    blocks: ByteArray,
    quant_type: QuantType,
    *,
    hessian: torch.Tensor,
    damp: float,
    n_sweeps: int,
) -> ByteArray:
    """Blocks that err less: each code, scale and unit in turn the best, given all the others.

    weight: (n_out, n_in) float32. hessian: (n_in, n_in), damped by `damp` of its mean diagonal.
    The damped squared error never rises, and at rest no number alone can lower it.
    """
    width = block_size(quant_type)
    block_nbytes = row_nbytes(quant_type, width)
    refined = blocks.copy()

    def improve(
        block: slice, columns: torch.Tensor, pulls: torch.Tensor, damped: torch.Tensor
    ) -> torch.Tensor:
        index = block.start // width
        place = slice(index * block_nbytes, (index + 1) * block_nbytes)
        old = np.ascontiguousarray(refined[:, place])
        grid = _Grid.of(old, quant_type, like=columns)
        codes, values = best_codes(columns, pulls, damped, grid.nearest)
        new = _with_codes(old, codes.T.contiguous().cpu().numpy(), quant_type)
        new = _fit_scales(new, quant_type, pulls - damped @ (values - columns), damped)
        refined[:, place] = new
        return _as_columns(decode_rows(new, quant_type, width), like=columns)

    sweep_blocks(
        weight,
        _as_columns(decode_rows(blocks, quant_type, weight.shape[1]), like=hessian),
        hessian,
        added=damp * mean_diagonal(hessian),
        width=width,
        n_sweeps=n_sweeps,
        improve=improve,
    )
    return refined


@dataclass(frozen=True, slots=True)
class _Grid:
    """What codes are worth in each column: its lowest value, and so many steps more.

    low, step, per_step: (n_columns, n_out); per_step is 1 / step, and 0 where all codes are worth
    the same. steps: (n_codes,), of each code, rising from 0; None where they are whole numbers.
    """

    low: torch.Tensor
    step: torch.Tensor
    per_step: torch.Tensor
    steps: torch.Tensor | None
    lowest: int
    highest: int

    @classmethod
    def of(cls, blocks: ByteArray, quant_type: QuantType, *, like: torch.Tensor) -> _Grid:
        """blocks: (n_blocks, block_nbytes); every len(blocks) / n_out of them make up a row."""
        import torch

        layout = LAYOUTS[quant_type]
        lowest, highest = layout.codes.lowest, layout.codes.highest
        ends = code_values(blocks, range(lowest, highest + 1, highest - lowest), quant_type)
        low, high = (_as_columns(end.reshape(like.shape[1], -1), like=like) for end in ends)
        step = high.sub_(low).div_(highest - lowest)
        per_step = step.reciprocal().masked_fill_(step == 0, 0)
        steps = None
        if not layout.is_affine:
            steps = torch.from_numpy(_steps(quant_type)).to(like)
        return cls(low, step, per_step, steps, lowest, highest)

    def taken(self, order: torch.Tensor) -> _Grid:
        """The same with its columns in another order."""
        low, step = self.low.index_select(0, order), self.step.index_select(0, order)
        per_step = self.per_step.index_select(0, order)
        return _Grid(low, step, per_step, self.steps, self.lowest, self.highest)

    def nearest(self, column: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes nearest to the numbers that a column should hold, and their values."""
        import torch

        low = self.low[column]
        steps = (wanted - low).mul_(self.per_step[column])
        if self.steps is None:
            steps.round_().clamp_(0, self.highest - self.lowest)
            return steps + self.lowest, torch.addcmul(low, steps, self.step[column])
        code = torch.bucketize(steps, (self.steps[1:] + self.steps[:-1]) / 2)
        return code + self.lowest, torch.addcmul(low, self.steps[code], self.step[column])

    def nearest_first(self, column: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a column and those after it, of which only it is fixed."""
        return self.nearest(column, wanted[0])


def _steps(quant_type: QuantType) -> Float32Array:
    """How many steps each code of a type adds, read off a block whose scales are 1."""
    layout = LAYOUTS[quant_type]
    n_bytes = row_nbytes(quant_type, block_size(quant_type))
    block: ByteArray = np.zeros((1, n_bytes), dtype=np.uint8)
    for packed in layout.scales:
        block = packed.fill(block, packed.worthless + 1)
    for offset in layout.units:
        block = replace_unit(block, offset, np.ones(1, np.float16))
    values = code_values(block, range(layout.codes.lowest, layout.codes.highest + 1), quant_type)
    worth = values[:, 0, 0]
    steps: Float32Array = (worth - worth[0]) / (worth[-1] - worth[0]) * (len(worth) - 1)
    return steps


def _pieces(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _fit_scales(
    blocks: ByteArray, quant_type: QuantType, pulls: torch.Tensor, hessian: torch.Tensor
) -> ByteArray:
    """Blocks of one column range with each scale and each unit in turn the best.

    pulls: (width, n_out), on the values now; they are changed. hessian: (width, width), damped.
    """
    import torch

    for packed, values in scale_values(blocks, quant_type):
        worth = _as_columns(values, like=hessian)
        scales = _as_columns(packed.read(blocks), like=hessian)  # (n_scales, n_out)
        for scale, part in zip(scales, _pieces(0, len(worth), len(worth) // packed.n), strict=True):
            step, reach = _best_step(worth, pulls, hessian, part)
            best = (scale + step).round().clamp(packed.lowest, packed.highest)
            pulls.addcmul_(reach, best - scale, value=-1)
            scale.copy_(best)
        blocks = packed.replace(blocks, scales.T.to(torch.uint8).contiguous().cpu().numpy())
    for offset, values in unit_values(blocks, quant_type):
        unit = torch.from_numpy(read_unit(blocks, offset)).to(hessian)
        worth = _as_columns(values, like=hessian)
        step, reach = _best_step(worth, pulls, hessian, slice(None))
        best = (unit + step).half().to(unit)
        best = torch.where(best.isfinite(), best, unit)
        pulls.addcmul_(reach, best - unit, value=-1)
        blocks = replace_unit(blocks, offset, best.half().cpu().numpy())
    return blocks


def _best_step(
    worth: torch.Tensor, pulls: torch.Tensor, hessian: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much more of a number lowers the error most, (n_out,), and what one more pulls away.

    worth: (width, n_out), what one more adds to the columns; it acts on a part of them.
    """
    import torch

    reach = hessian[:, part] @ worth[part]  # (width, n_out)
    curvature = (worth[part] * reach[part]).sum(dim=0)
    slope = (worth[part] * pulls[part]).sum(dim=0)
    return torch.where(curvature > 0, slope / curvature, 0), reach


def _apart(blocks: ByteArray, quant_type: QuantType) -> ByteArray:
    """Rows of blocks as blocks, one below the other."""
    return blocks.reshape(-1, row_nbytes(quant_type, block_size(quant_type)))


def _with_codes(blocks: ByteArray, codes: Codes, quant_type: QuantType) -> ByteArray:
    """Rows of blocks with other codes, (n_out, n_in)."""
    packed = LAYOUTS[quant_type].codes
    replaced = packed.replace(_apart(blocks, quant_type), codes.reshape(-1, packed.n))
    return replaced.reshape(blocks.shape)


def _as_columns(rows: Float32Array | Codes, *, like: torch.Tensor) -> torch.Tensor:
    """Rows of numbers as contiguous columns, in the dtype and on the device of `like`."""
    import torch

    return torch.from_numpy(rows).to(like).T.contiguous()
