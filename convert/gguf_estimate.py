"""What a conversion will take: time from a probe of the encoders, memory and disk by counting."""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from convert.checkpoint import Checkpoint
from convert.encode import LANE_TYPES, ByteArray
from convert.files import free_space
from convert.gguf_export import SLICE_N_WEIGHTS, buffered_nbytes, in_flight_limit, needed_nbytes
from convert.plan import FilePlan
from convert.slice_encoder import STEP_N_WEIGHTS, STEP_NBYTES, Job, encode_slice, job_of
from convert.source_reader import RawSlice, Slice, cut_into_slices

PROBE_S = 10.0
"""What the probe takes at most, beside its first step."""

_WORTH_PROBING_S = 0.1
_PROGRAM_NBYTES = 150_000_000
_NUMBA_NBYTES = 150_000_000
_NBYTES_PER_TOKEN = 1_500
"""The tokenizer as Python objects, from its file to its keys."""
_HASHED_NBYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of memory at most, bytes of the disk on top of unfinished work, seconds about."""

    memory_nbytes: int
    disk_needed_nbytes: int
    disk_free_nbytes: int
    n_threads: int
    duration_s: float


@dataclass(slots=True)
class _Kind:
    """Tensors that take the same work: types, importance or none, row length; a probe of them."""

    piece: Slice
    jobs: Sequence[Job]
    n_weights: int = 0
    weights_per_s: float = 0.0

    @property
    def duration_s(self) -> float:
        return self.n_weights / self.weights_per_s


def estimate_export(
    checkpoint: Checkpoint, plans: Sequence[FilePlan], *, n_threads: int, patience: float = 1.0
) -> Estimate:
    """Count memory and disk, and time the encoders on random weights, on all threads at once.

    patience: seconds of probe for a second of work; never more than PROBE_S in all.
    """
    slices = cut_into_slices(checkpoint, SLICE_N_WEIGHTS)
    needed = needed_nbytes(plans)
    return Estimate(
        memory_nbytes=_memory_nbytes(checkpoint, plans, slices, n_threads),
        disk_needed_nbytes=sum(needed.values()),
        disk_free_nbytes=free_space(plans[0].path.parent),
        n_threads=n_threads,
        duration_s=_duration_s(plans, slices, n_threads, patience),
    )


def n_slices_ahead(checkpoint: Checkpoint, plans: Sequence[FilePlan], n_threads: int) -> int:
    """Slices that are between reading and writing at a time."""
    slices = cut_into_slices(checkpoint, SLICE_N_WEIGHTS)
    return in_flight_limit(n_threads, buffered_nbytes(plans, slices))


def _memory_nbytes(
    checkpoint: Checkpoint, plans: Sequence[FilePlan], slices: Sequence[Slice], n_threads: int
) -> int:
    nbytes = buffered_nbytes(plans, slices)
    limit = in_flight_limit(n_threads, nbytes)
    types = {tensor.quant_type for plan in plans for tensor in plan.tensors}
    program = _PROGRAM_NBYTES + (_NUMBA_NBYTES if types & LANE_TYPES else 0)
    headers = 3 * sum(len(part.header) for plan in plans for part in plan.parts)
    tokens = _NBYTES_PER_TOKEN * checkpoint.model.vocab_size
    return program + tokens + headers + limit * nbytes + min(n_threads, limit) * STEP_NBYTES


def _duration_s(
    plans: Sequence[FilePlan], slices: Sequence[Slice], n_threads: int, patience: float
) -> float:
    """Encoding or hashing the source, whichever is slower, and then hashing the outputs."""
    kinds = _kinds(plans, slices)
    with ThreadPoolExecutor(n_threads) as pool:
        for kind in [*kinds, *kinds]:  # twice, since the first time loads the encoders
            _probe(kind, pool, 1, at_least_s=0.0)
        encoding_s = sum(kind.duration_s for kind in kinds) / n_threads
        budget_s = min(PROBE_S, patience * encoding_s)
        if budget_s > _WORTH_PROBING_S:
            for kind in kinds:
                _probe(kind, pool, n_threads, at_least_s=budget_s / len(kinds))
            encoding_s = sum(kind.duration_s for kind in kinds)
    data = bytes(_HASHED_NBYTES)
    start_s = time.perf_counter()
    hashlib.sha256(data)
    hashing_s_per_byte = (time.perf_counter() - start_s) / len(data)
    read, written = sum(one.nbytes for one in slices), sum(plan.nbytes for plan in plans)
    return max(encoding_s, hashing_s_per_byte * read) + hashing_s_per_byte * written


def _kinds(plans: Sequence[FilePlan], slices: Sequence[Slice]) -> list[_Kind]:
    """Group the matrices by the work that they take."""
    pieces = {piece.info.name: piece for piece in slices if len(piece.info.shape) > 1}
    kinds: dict[object, _Kind] = {}
    for tensors in zip(*(plan.tensors for plan in plans), strict=True):
        piece = pieces.get(tensors[0].name)
        if piece is None:
            continue
        jobs = [job_of(plan, tensor) for plan, tensor in zip(plans, tensors, strict=True)]
        key = (piece.n_in, *((job.quant_type, job.importance is None) for job in jobs))
        kind = kinds.setdefault(key, _Kind(piece, jobs))
        kind.n_weights += prod(piece.info.shape)
    return list(kinds.values())


def _probe(kind: _Kind, pool: ThreadPoolExecutor, n_threads: int, *, at_least_s: float) -> None:
    """Set the kind's rate from a step of random weights, encoded again and again by each thread."""
    n_in = kind.piece.n_in
    n_rows = max(1, min(STEP_N_WEIGHTS, kind.n_weights // 16) // n_in)
    piece = Slice(0, kind.piece.info, 0, n_rows)
    raw = RawSlice(_random_weights(n_rows * n_in, piece.info.dtype), ())
    jobs = [replace(job, row_source=None) for job in kind.jobs]
    start_s = time.perf_counter()

    def work() -> int:
        n_done = 0
        while not n_done or time.perf_counter() - start_s < at_least_s:
            encode_slice(raw, piece, jobs)
            n_done += n_rows * n_in
        return n_done

    n_weights = sum(done.result() for done in [pool.submit(work) for _ in range(n_threads)])
    kind.weights_per_s = n_weights / (time.perf_counter() - start_s)


def _random_weights(n_weights: int, dtype: str) -> ByteArray:
    values = np.random.default_rng(0).standard_normal(n_weights, dtype=np.float32) * 0.02
    if dtype == "BF16":
        return np.ascontiguousarray(values.view(np.uint8).reshape(-1, 4)[:, 2:]).reshape(-1)
    return values.astype("<f2" if dtype == "F16" else "<f4").view(np.uint8)
