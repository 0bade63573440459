"""Plan -> GGUF files, any number of them in one pass over the checkpoint.

One thread reads, some encode, the calling thread writes in reading order, and one brings to the
disk what is written. What is on its way between them is bounded in bytes, whatever the tensors.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.encode import QuantType, n_cores, row_nbytes
from convert.errors import (
    CheckpointError,
    DiskFullError,
    GgufError,
    NumericalError,
    QwqError,
    StaleOutputError,
    UsageError,
)
from convert.files import (
    check_disk_space,
    missing_nbytes,
    partial_path,
    refuse_existing,
    sole_writer,
)
from convert.gguf_output import GgufOutput
from convert.journal import Journal, journal_path, load_journal
from convert.plan import FilePlan, RowSource, TensorPlan, plan_file
from convert.provenance import shard_paths
from convert.read_back import check_written
from convert.recipe import find_recipe
from convert.rounding_report import Choice
from convert.slice_encoder import Encoded, Job, encode_slice
from convert.source_reader import RawSlice, Slice, SourceReader, cut_into_slices

SLICE_N_WEIGHTS = 1 << 20
"""Weights read at a time. Journals count in slices, so it is the same on every machine."""
IN_FLIGHT_NBYTES = 1 << 29
"""Most bytes of slices between reading and writing."""
COMMIT_INTERVAL_S = 1.0
"""How much work an interruption costs at most, where the disk keeps up."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class GgufResult:
    """An output that was written whole; `path` is its first file.

    choices: of the matrices that were rounded with their Hessians.
    """

    path: Path
    recipe_name: str
    nbytes: int
    n_weights: int
    bits_per_weight: float
    choices: tuple[Choice, ...] = ()


def export_gguf(
    checkpoint: Checkpoint,
    recipe_name: str,
    out_path: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
) -> GgufResult:
    """Write one GGUF file; see export_planned for errors."""
    plan = plan_file(checkpoint, find_recipe(recipe_name), out_path)
    return export_planned(
        checkpoint, [plan], threads=threads, force=force, on_progress=on_progress
    )[0]


def export_planned(
    checkpoint: Checkpoint,
    plans: Sequence[FilePlan],
    *,
    threads: int | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
    on_read_back: Progress | None = None,
    slice_n_weights: int = SLICE_N_WEIGHTS,
) -> list[GgufResult]:
    """Write all planned outputs, each slice of the checkpoint read once, and read them back.

    threads: of the encoders, all cores by default. on_progress: (bytes of the checkpoint done, in
    all). on_read_back: the same of the outputs. Neither threads nor slice_n_weights changes a byte.
    No output gets its name before all are complete. After an interruption, or where the disk
    filled up, partial files and journals stay, and the same call continues there.
    Raises OutputExistsError, OutputBusyError, DiskFullError, StaleOutputError where unfinished work
    is of another checkpoint or plan (forced, it is begun anew), GgufError where the disk gives back
    other bytes, CheckpointError for weights that are NaN, infinite or too large for a type, and
    NumericalError for a tensor that its type spoils.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: at least 1 is needed")
    slices = cut_into_slices(checkpoint, slice_n_weights)
    outputs = [GgufOutput(plan, slices, _identity(checkpoint, plan, slices)) for plan in plans]
    with ExitStack() as locks:
        for plan in plans:
            locks.enter_context(sole_writer(plan.path))
        check_outputs(plans, force=force)
        _make(checkpoint, outputs, threads or n_cores(), on_progress, on_read_back, force=force)
    return [
        GgufResult(
            plan.path,
            plan.recipe.name,
            plan.nbytes,
            plan.n_weights,
            plan.bits_per_weight,
            output.choices,
        )
        for plan, output in zip(plans, outputs, strict=True)
    ]


def check_outputs(plans: Sequence[FilePlan], *, force: bool) -> None:
    """Raise OutputExistsError or DiskFullError where the planned files cannot be written."""
    for plan in plans:
        journal = load_journal(journal_path(plan.path))
        is_verified = journal is not None and journal.is_verified
        for part in plan.parts:
            was_named_by_us = is_verified and not partial_path(part.path).exists()
            if not was_named_by_us:
                refuse_existing(part.path, force=force)
    for folder, n_needed in needed_nbytes(plans).items():
        check_disk_space(folder, n_needed)


def needed_nbytes(plans: Sequence[FilePlan]) -> dict[Path, int]:
    """Bytes that take new room, by folder: all but those of unfinished work."""
    needed: dict[Path, int] = {}
    for plan in plans:
        for part in plan.parts:
            folder = part.path.parent
            needed[folder] = needed.get(folder, 0) + missing_nbytes(part.path, part.nbytes)
    return needed


def buffered_nbytes(plans: Sequence[FilePlan], slices: Sequence[Slice]) -> int:
    """Most bytes of a slice as it is read and as it is written, in all outputs."""
    firsts = {piece.info.name: piece for piece in slices if piece.start == 0}

    def nbytes(tensors: tuple[TensorPlan, ...]) -> int:
        piece = firsts[tensors[0].name]
        encoded = sum(row_nbytes(tensor.quant_type, piece.n_in) for tensor in tensors)
        return piece.nbytes + (piece.stop - piece.start) * encoded

    return max(map(nbytes, zip(*(plan.tensors for plan in plans), strict=True)))


def in_flight_limit(n_threads: int, nbytes: int) -> int:
    """Slices of nbytes between reading and writing: two a thread, where memory allows."""
    return max(1, min(2 * n_threads + 2, IN_FLIGHT_NBYTES // nbytes))


def _identity(checkpoint: Checkpoint, plan: FilePlan, slices: Sequence[Slice]) -> str:
    """Digest of all that decides an output's bytes, but for the weights, and of the slices."""
    shards = [(shard.name, shard.stat().st_size) for shard in shard_paths(checkpoint)]
    cuts = [(piece.info.name, piece.start) for piece in slices]
    digest = hashlib.sha256(json.dumps([shards, cuts]).encode())
    for part in plan.parts:
        digest.update(part.header)
    return digest.hexdigest()


def _make(
    checkpoint: Checkpoint,
    outputs: Sequence[GgufOutput],
    n_threads: int,
    on_progress: Progress | None,
    on_read_back: Progress | None,
    *,
    force: bool,
) -> None:
    """Write all outputs, read them back and give them their names."""
    try:
        try:
            source = _convert(checkpoint, outputs, n_threads, on_progress, force=force)
        except StaleOutputError:
            if not force:
                raise
            for output in outputs:
                output.discard()
            source = _convert(checkpoint, outputs, n_threads, on_progress, force=True)
        _read_back(outputs, source, n_threads, on_read_back)
    except (CheckpointError, NumericalError, GgufError):
        for output in outputs:
            output.discard()  # none of it is of any use
        raise
    finally:
        for output in outputs:
            output.close()
    for output in outputs:
        output.publish()
    for output in outputs:
        output.forget()


def _convert(
    checkpoint: Checkpoint,
    outputs: Sequence[GgufOutput],
    n_threads: int,
    on_progress: Progress | None,
    *,
    force: bool,
) -> tuple[str, ...]:
    """Write all slices to all outputs; returns the SHA-256 of each shard."""
    for output in outputs:
        output.begin(force=force)
    row_sources = _row_sources(outputs)
    slices = outputs[0].slices
    n_total, n_done = sum(piece.nbytes for piece in slices), 0
    with (
        closing(SourceReader(checkpoint)) as reader,
        _threads(1) as committing,
        closing(_encode_all(reader, outputs, n_threads)) as encoded_slices,
    ):
        commit: Future[None] = committing.submit(_commit, [])
        last_commit_s = time.monotonic()
        for piece, encoded in encoded_slices:
            try:
                _write(outputs, piece, encoded)
            except DiskFullError:
                with suppress(OSError, QwqError):  # without room for it the last journal holds
                    commit.result()
                    _commit([(one, one.journal()) for one in outputs])
                raise
            if piece.is_last:
                for row_source in row_sources:
                    row_source.release(piece.info.name)
            n_done += piece.nbytes
            if on_progress is not None:
                on_progress(n_done, n_total)
            if commit.done() and time.monotonic() - last_commit_s >= COMMIT_INTERVAL_S:
                commit.result()
                commit = committing.submit(_commit, [(one, one.journal()) for one in outputs])
                last_commit_s = time.monotonic()
        commit.result()
        return reader.finish()


def _row_sources(outputs: Sequence[GgufOutput]) -> list[RowSource]:
    """What encodes rows in the encoders' place, told of what the outputs still lack."""
    wanted: dict[RowSource, dict[str, frozenset[QuantType]]] = {}
    for output in outputs:
        if output.plan.row_source is not None:
            of_source = wanted.setdefault(output.plan.row_source, {})
            for name, quant_type in output.pending().items():
                of_source[name] = of_source.get(name, frozenset()) | {quant_type}
    for row_source, of_source in wanted.items():
        row_source.expect(of_source)
    return list(wanted)


def _encode_all(
    reader: SourceReader, outputs: Sequence[GgufOutput], n_threads: int
) -> Generator[tuple[Slice, Encoded]]:
    """Read and encode ahead, in threads, as far as memory allows; slices come in their order."""
    slices = outputs[0].slices
    plans = [output.plan for output in outputs]
    limit = in_flight_limit(n_threads, buffered_nbytes(plans, slices))
    n_begun = [output.n_done for output in outputs]
    in_flight: deque[tuple[Slice, Future[Encoded]]] = deque()
    with _threads(n_threads) as encoding, _threads(1) as reading:
        for piece in slices:
            jobs = [
                output.job(piece)
                for output, n_there in zip(outputs, n_begun, strict=True)
                if n_there <= piece.index
            ]
            read = reading.submit(reader.read, piece)
            in_flight.append((piece, encoding.submit(_encode, read, piece, jobs)))
            if len(in_flight) == limit:
                yield _next_of(in_flight)
        while in_flight:
            yield _next_of(in_flight)


def _next_of(in_flight: deque[tuple[Slice, Future[Encoded]]]) -> tuple[Slice, Encoded]:
    piece, future = in_flight.popleft()
    return piece, future.result()


def _encode(read: Future[RawSlice], piece: Slice, jobs: Sequence[Job]) -> Encoded:
    return encode_slice(read.result(), piece, jobs)


def _write(outputs: Sequence[GgufOutput], piece: Slice, encoded: Encoded) -> None:
    """Write a slice to the outputs that lack it; those that have it must have the same source."""
    parts = iter(zip(encoded.blocks, encoded.errors, strict=True))
    for output in outputs:
        if output.n_done == piece.index:
            blocks, error = next(parts)
            output.write(piece, blocks, error, source=encoded.source)
        elif output.n_done == piece.index + 1 and output.source != encoded.source:
            raise output.stale(f"{piece.info.path} holds other weights now")


def _commit(states: Sequence[tuple[GgufOutput, Journal]]) -> None:
    for output, journal in states:
        output.commit(journal)


def _read_back(
    outputs: Sequence[GgufOutput],
    source: tuple[str, ...],
    n_threads: int,
    on_progress: Progress | None,
) -> None:
    new = [output for output in outputs if not output.is_verified]
    check_written(
        [output.complete(source) for output in new], threads=n_threads, on_progress=on_progress
    )
    for output in new:
        output.accept()


@contextmanager
def _threads(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing more once the caller is done, or fails."""
    pool = ThreadPoolExecutor(n_threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
