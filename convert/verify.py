"""GGUF files held against what they should be: their hashes, their source, plain numbers."""

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from math import isfinite, prod
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np

from convert.checkpoint import Checkpoint
from convert.decode import can_decode, decode_rows
from convert.encode import ByteArray, QuantType, n_cores
from convert.errors import GgufError
from convert.gguf_header import GgufTensor
from convert.gguf_parts import GgufModel, GgufPart, read_model
from convert.provenance import FILE_TYPE, TENSOR_SHA256
from convert.qwen2 import tensor_specs
from convert.tensor_error import TYPICAL_ERROR, TensorError, measure_error

SLICE_N_WEIGHTS = 1 << 21
"""Weights a thread holds at a time: 8 MiB as float32, and as much of the source."""

Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One tensor as it was found; `error` where there was a source, `problem` empty if sound."""

    path: Path
    tensor: GgufTensor
    sha256: str
    error: TensorError | None
    problem: str

    @property
    def message(self) -> str:
        return f"{self.path}: {self.tensor.name} {self.problem}"


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """RMS error over RMS weight of all tensors of a type together, and of the worst of them."""

    quant_type: QuantType
    n_tensors: int
    relative: float
    largest: float
    largest_in: str


def verify_model(
    path: Path,
    *,
    source: Checkpoint | None = None,
    threads: int | None = None,
    slice_n_weights: int = SLICE_N_WEIGHTS,
    on_progress: Progress | None = None,
) -> Iterator[TensorCheck]:
    """Read and judge every tensor of a GGUF file, or of all parts from the first on.

    Without a source: the hashes that the file lists, where it does, and that each weight is a
    number. With the checkpoint that it was made from: the error of each tensor too.
    threads: all cores by default. on_progress: (bytes done, bytes in all). Neither threads nor
    slice_n_weights changes a verdict or a hash.
    Raises GgufError for a file that cannot be read or lacks tensors of the source, and
    CheckpointError for a source that cannot be read.
    """
    model = read_model(path)
    hashes = listed_hashes(model)
    judge = _judge_numbers if source is None else _SourceJudge(source, model)
    for scan in _scan(model, judge, threads or n_cores(), slice_n_weights, on_progress):
        judgements = [judgement for judgement in scan.judgements if judgement.problem]
        problem = judgements[0].problem if judgements else ""
        errors = [one.error for one in scan.judgements if one.error is not None]
        error = sum(errors, TensorError()) if errors else None
        if not problem and error is not None:
            problem = _judged_by_type(scan.tensor, error)
        listed = hashes.get(scan.tensor.name, scan.sha256)
        if listed != scan.sha256:
            problem = (
                f"has the SHA-256 {scan.sha256[:16]} and the file lists {listed[:16]}; "
                "fetch or make the file again"
            )
        yield TensorCheck(scan.path, scan.tensor, scan.sha256, error, problem)


def listed_hashes(model: GgufModel) -> dict[str, str]:
    """SHA-256 by tensor name from the file's own list; {} where it has none for itself."""
    hashes = model.metadata.get(TENSOR_SHA256)
    if not isinstance(hashes, list) or len(hashes) != len(model.tensors):
        return {}
    if model.metadata.get(FILE_TYPE) != model.metadata.get("general.file_type"):
        return {}
    return dict(zip(model.tensors, hashes, strict=True))


def summarize_errors(checks: Sequence[TensorCheck]) -> list[ErrorSummary]:
    """By type, the coarsest first; empty where no source was given."""
    by_type: dict[QuantType, list[TensorCheck]] = defaultdict(list)
    for check in checks:
        if check.error is not None:
            by_type[check.tensor.quant_type].append(check)
    summaries = []
    for quant_type, members in by_type.items():
        errors = [(check.error or TensorError()).relative for check in members]
        worst = int(np.argmax(errors))
        total = sum((check.error or TensorError() for check in members), TensorError())
        name = members[worst].tensor.name
        summaries.append(
            ErrorSummary(quant_type, len(members), total.relative, errors[worst], name)
        )
    return sorted(summaries, key=lambda summary: -summary.relative)


@dataclass(frozen=True, slots=True)
class _Judgement:
    """What was found in some rows of a tensor."""

    error: TensorError | None = None
    problem: str = ""


_Judge = Callable[[GgufTensor, int, ByteArray], _Judgement]
"""(tensor, first row, rows as blocks) -> what is wrong with them; called in threads."""


def _judge_numbers(tensor: GgufTensor, start: int, blocks: ByteArray) -> _Judgement:
    """That every weight is a number, with the position of the first that is none."""
    if not can_decode(tensor.quant_type):
        return _Judgement()
    n_in = tensor.shape[-1]
    finite = np.isfinite(decode_rows(blocks, tensor.quant_type, n_in))
    if finite.all():
        return _Judgement()
    flat = start * n_in + int(np.argmin(finite))
    position = [int(i) for i in np.unravel_index(flat, tensor.shape)]
    return _Judgement(
        problem=f"holds a weight that is no number at {position}; fetch or make the file again"
    )


class _SourceJudge:
    """Holds rows against the checkpoint's; raises GgufError where the file lacks a tensor."""

    def __init__(self, source: Checkpoint, model: GgufModel) -> None:
        self.source = source
        self.names = {spec.gguf_name: spec.name for spec in tensor_specs(source.model)}
        missing = next((name for name in self.names if name not in model.tensors), None)
        if missing is not None:
            raise GgufError(
                f"{model.path}: lacks {missing}, which {source.path} has; "
                "give the checkpoint it was made from, or make the file again"
            )
        if source.model.tied_embeddings:
            self.names["output.weight"] = self.names["token_embd.weight"]

    def __call__(self, tensor: GgufTensor, start: int, blocks: ByteArray) -> _Judgement:
        name = self.names.get(tensor.name)
        if name is None:
            return _Judgement(problem=f"has no source in {self.source.path}; make the file again")
        shape = self.source.tensors[name].shape
        if shape != tensor.shape:
            return _Judgement(
                problem=f"has the shape {list(tensor.shape)} and its source {list(shape)}; "
                "give the checkpoint it was made from"
            )
        if tensor.quant_type not in TYPICAL_ERROR:
            return _Judgement(
                problem=f"is stored as {tensor.quant_type.name}, which no reader takes for "
                "weights; make the file again"
            )
        if len(shape) == 1:
            rows = self.source.read(name)[None]
        else:
            rows = self.source.rows(name, start, start + len(blocks))
        error = measure_error(rows, blocks, tensor.quant_type)
        if not isfinite(error.error):
            return _judge_numbers(tensor, start, blocks)
        return _Judgement(error)


def _judged_by_type(tensor: GgufTensor, error: TensorError) -> str:
    problem = error.problem(tensor.quant_type)
    return (
        f"{problem}; give the checkpoint it was made from, or convert it again" if problem else ""
    )


@dataclass(frozen=True, slots=True)
class _Scan:
    """One tensor that was read whole, with the judgements on its slices in their order."""

    path: Path
    tensor: GgufTensor
    sha256: str
    judgements: list[_Judgement]


@dataclass(frozen=True, slots=True)
class _Slice:
    """Rows start to stop of a tensor in a file that is open; `lock` guards the file's position."""

    path: Path
    file: FileIO
    lock: Lock
    tensor: GgufTensor
    start: int
    stop: int


def _scan(
    model: GgufModel,
    judge: _Judge,
    threads: int,
    slice_n_weights: int,
    on_progress: Progress | None,
) -> Iterator[_Scan]:
    """Read all tensors once, slice by slice in threads; judged there, hashed here in order."""
    n_bytes = sum(tensor.nbytes for tensor in model.tensors.values())
    n_done = 0

    def examine(piece: _Slice) -> tuple[_Slice, ByteArray, _Judgement]:
        blocks = _read(piece)
        return piece, blocks, judge(piece.tensor, piece.start, blocks)

    with ExitStack() as stack:
        slices = (
            piece
            for part in model.parts
            for piece in _slices(
                part, stack.enter_context(part.path.open("rb", buffering=0)), slice_n_weights
            )
        )
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        examined = _ahead(pool, examine, slices, n_ahead=2 * threads)
        for tensor, group in groupby(examined, key=lambda one: one[0].tensor):
            digest = hashlib.sha256()
            judgements = []
            for piece, blocks, judgement in group:
                path = piece.path
                digest.update(blocks.data)
                judgements.append(judgement)
                n_done += blocks.nbytes
                if on_progress is not None:
                    on_progress(n_done, n_bytes)
            yield _Scan(path, tensor, digest.hexdigest(), judgements)


def _slices(part: GgufPart, file: FileIO, slice_n_weights: int) -> Iterator[_Slice]:
    lock = Lock()
    for tensor in part.header.tensors.values():
        n_rows = prod(tensor.shape[:-1])
        n_per_slice = max(1, slice_n_weights // tensor.shape[-1])
        for start in range(0, n_rows, n_per_slice):
            stop = min(start + n_per_slice, n_rows)
            yield _Slice(part.path, file, lock, tensor, start, stop)


def _read(piece: _Slice) -> ByteArray:
    row_nbytes = piece.tensor.nbytes // prod(piece.tensor.shape[:-1])
    blocks = np.empty((piece.stop - piece.start, row_nbytes), dtype=np.uint8)
    view = blocks.data.cast("B")
    n_read = 0
    try:
        with piece.lock:
            piece.file.seek(piece.tensor.offset + piece.start * row_nbytes)
            while n_read < len(view) and (n_new := piece.file.readinto(view[n_read:])):
                n_read += n_new
    except OSError as error:
        raise GgufError(
            f"{piece.path}: {piece.tensor.name} cannot be read ({error.strerror}); check the disk"
        ) from error
    if n_read < len(view):
        raise GgufError(
            f"{piece.path}: {piece.tensor.name} ends {len(view) - n_read:,} bytes early, the file "
            "changed while it was read; fetch or make it again"
        )
    return blocks


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Slice], T], jobs: Iterable[_Slice], *, n_ahead: int
) -> Iterator[T]:
    """Results in the order of the jobs, with at most n_ahead begun before they are asked for."""
    begun: deque[Future[T]] = deque()
    try:
        for job in jobs:
            begun.append(pool.submit(work, job))
            if len(begun) >= n_ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
