"""A slice of the checkpoint in the types of all outputs, and how far each is from its source."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convert.checkpoint import Float32Array
from convert.encode import ByteArray, QuantType, encode_rows, row_nbytes
from convert.errors import CheckpointError
from convert.plan import FilePlan, RowSource, TensorPlan
from convert.source_reader import RawSlice, Slice, widen
from convert.tensor_error import TensorError, measure_error, row_squares

STEP_N_WEIGHTS = 1 << 18
"""Weights that a thread holds as float32 at a time: they fit into its cache."""
STEP_NBYTES = 20 * STEP_N_WEIGHTS
"""What a thread takes beside the slice: a step as float32, encoded, decoded, and truth values."""


@dataclass(frozen=True, slots=True)
class Job:
    """How one tensor is encoded in one output. importance: (n_in,), None where there is none.

    row_source: asked before the encoder, where there is one.
    """

    quant_type: QuantType
    importance: Float32Array | None
    row_source: RowSource | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A slice in each job's type, with its error; `source` is RawSlice.sha256_until."""

    source: tuple[str, ...]
    blocks: Sequence[ByteArray]
    errors: Sequence[TensorError]


def job_of(plan: FilePlan, tensor: TensorPlan) -> Job:
    importance = None
    if plan.imatrix is not None and len(tensor.shape) > 1:
        importance = plan.imatrix.importance_of(tensor.gguf_name, tensor.shape[-1])
    return Job(tensor.quant_type, importance, plan.row_source)


def encode_slice(raw: RawSlice, piece: Slice, jobs: Sequence[Job]) -> Encoded:
    """Widen the slice's rows step by step and encode each step for all jobs.

    Raises CheckpointError where a weight is NaN or infinite, or too large for a type.
    """
    n_rows = piece.stop - piece.start
    blocks = [
        np.empty((n_rows, row_nbytes(job.quant_type, piece.n_in)), dtype=np.uint8) for job in jobs
    ]
    errors = [TensorError()] * len(jobs)
    n_at_once = max(1, STEP_N_WEIGHTS // piece.n_in)
    for start in range(0, n_rows if jobs else 0, n_at_once):
        stop = min(start + n_at_once, n_rows)
        rows = widen(raw.bytes, piece, start, stop)
        squares = row_squares(rows)
        for i, job in enumerate(jobs):
            encoded = _encode_rows(rows, piece, job, start=piece.start + start)
            blocks[i][start:stop] = encoded
            errors[i] += measure_error(rows, encoded, job.quant_type, squares=squares)
    return Encoded(raw.sha256_until, blocks, errors)


def _encode_rows(rows: Float32Array, piece: Slice, job: Job, *, start: int) -> ByteArray:
    """Encode rows of the tensor from row `start` on."""
    try:
        if job.row_source is not None:
            stop = start + len(rows)
            made = job.row_source.rows(piece.info.name, job.quant_type, start, stop)
            if made is not None:
                return made
        return encode_rows(rows, job.quant_type, importance=job.importance)
    except OverflowError as error:
        raise CheckpointError(
            f"{piece.info.name}: holds weights of up to {abs(rows).max():.3g}, too large for "
            f"{job.quant_type.name}; choose --type BF16"
        ) from error
