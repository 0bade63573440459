"""K-quants with GPTQ rounding: scales as the encoder finds them, codes chosen with the Hessian.

Block by block from left to right: the encoder finds the scales for the columns as they are by then,
the codes are fixed column by column, and each rounding error is spread over the columns to come.
Then sweeps over all columns choose each code anew, with those on both sides as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convert.code_layout import LAYOUTS, code_values, replace_codes
from convert.code_sweep import AT_ONCE, Nearest, sweep_codes
from convert.decode import decode_rows
from convert.encode import ByteArray, Float32Array, QuantType, block_size, encode_rows, row_nbytes
from convert.gptq import mean_diagonal

if TYPE_CHECKING:
    import torch


def round_matrix(
    weight: torch.Tensor,
    quant_type: QuantType,
    *,
    inv_chol: torch.Tensor,
    importance: Float32Array,
) -> ByteArray:
    """Encode a matrix so that its output on the Hessian's inputs changes least.

    weight: (n_out, n_in) float32. inv_chol: (n_in, n_in), of gptq.factor_inverse().
    importance: (n_in,), for the encoder's choice of scales.
    Returns (n_out, row_nbytes) uint8. Raises OverflowError as encode_rows() does.
    Source: Frantar et al. 2022 (GPTQ), algorithm 1, with a block's columns as its lazy batch.
    """
    n_out, n_in = weight.shape
    width = block_size(quant_type)
    columns = weight.T.to(inv_chol.dtype, copy=True).contiguous()  # (n_in, n_out)
    encoded = np.empty((n_out, row_nbytes(quant_type, n_in)), dtype=np.uint8)
    block_nbytes = row_nbytes(quant_type, width)
    for index, start in enumerate(range(0, n_in, width)):
        stop = start + width
        rows = columns[start:stop].T.float().cpu().numpy()
        blocks = encode_rows(rows, quant_type, importance=importance[start:stop])
        codes, errors = _fix_columns(
            columns[start:stop], inv_chol[start:stop, start:stop], blocks, quant_type
        )
        encoded[:, index * block_nbytes : (index + 1) * block_nbytes] = replace_codes(
            blocks, codes.T.contiguous().cpu().numpy(), quant_type
        )
        columns[stop:].addmm_(inv_chol[start:stop, stop:].T, errors, alpha=-1)
    return encoded


def refine_codes(
    weight: torch.Tensor,
    blocks: ByteArray,
    quant_type: QuantType,
    *,
    hessian: torch.Tensor,
    damp: float,
    n_sweeps: int,
) -> ByteArray:
    """The same blocks with codes that err less: each in turn the best, given all others.

    weight: (n_out, n_in) float32. hessian: (n_in, n_in), damped by `damp` of its mean diagonal.
    The damped squared error never rises, and at rest no code alone can lower it.
    """
    import torch

    n_in = weight.shape[1]
    width = block_size(quant_type)
    block_nbytes = row_nbytes(quant_type, width)
    refined = blocks.copy()

    def encoded(block: slice) -> ByteArray:
        index = block.start // width
        return refined[:, index * block_nbytes : (index + 1) * block_nbytes]

    def nearest_in(block: slice) -> Nearest:
        return _nearest_code(np.ascontiguousarray(encoded(block)), quant_type, like=hessian)

    def keep(block: slice, codes: torch.Tensor) -> None:
        changed = replace_codes(encoded(block), codes.T.contiguous().cpu().numpy(), quant_type)
        encoded(block)[:] = changed

    sweep_codes(
        weight,
        torch.from_numpy(decode_rows(blocks, quant_type, n_in).T.copy()).to(hessian),
        hessian,
        added=damp * mean_diagonal(hessian),
        width=width,
        n_sweeps=n_sweeps,
        nearest_in=nearest_in,
        keep=keep,
    )
    return refined


def _fix_columns(
    columns: torch.Tensor, inv_chol: torch.Tensor, blocks: ByteArray, quant_type: QuantType
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of one block's columns, (width, n_out) uint8, and errors over the factor's diagonal.

    columns: (width, n_out); they are changed.
    """
    import torch

    nearest = _nearest_code(blocks, quant_type, like=columns)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    errors = torch.empty_like(columns)
    for start in range(0, len(columns), AT_ONCE):
        stop = min(start + AT_ONCE, len(columns))
        for column in range(start, stop):
            code, rounded = nearest(column, columns[column])
            errors[column] = (columns[column] - rounded) / inv_chol[column, column]
            codes[column] = code.to(torch.uint8)
            coming = slice(column + 1, stop)
            columns[coming].addr_(inv_chol[column, coming], errors[column], alpha=-1)
        columns[stop:].addmm_(inv_chol[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return codes, errors


def _nearest_code(blocks: ByteArray, quant_type: QuantType, *, like: torch.Tensor) -> Nearest:
    """The codes of one block. like: a tensor of the dtype and on the device that are wanted."""
    import torch

    layout = LAYOUTS[quant_type]
    lowest, highest = layout.lowest, layout.highest

    def values_of(codes: range) -> torch.Tensor:  # (n_codes, width, n_out)
        values = torch.from_numpy(code_values(blocks, codes, quant_type)).transpose(1, 2)
        return values.to(like).contiguous()

    if not layout.is_affine:
        table = values_of(range(lowest, highest + 1))

        def from_table(column: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            worth = table[:, column]  # (n_codes, n_out)
            code = (wanted - worth).abs().argmin(dim=0)
            return code + lowest, worth.gather(0, code[None])[0]

        return from_table

    low, high = values_of(range(lowest, highest + 1, highest - lowest))
    step = (high - low) / (highest - lowest)
    is_flat = step == 0  # a scale of 0: all codes are worth the same
    divisor = torch.where(is_flat, 1, step)

    def from_steps(column: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        code = ((wanted - low[column]) / divisor[column]).round()
        code = code.clamp(0, highest - lowest).masked_fill(is_flat[column], 0)
        return code + lowest, low[column] + code * step[column]

    return from_steps
