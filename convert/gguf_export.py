"""Plan -> GGUF files, any number of them in one pass over the checkpoint."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.encode import ByteArray, Float32Array, encode_rows, n_cores
from convert.errors import CheckpointError, UsageError
from convert.files import check_disk_space, refuse_existing, replacing_file
from convert.plan import ALIGNMENT, FilePlan, TensorPlan, plan_file
from convert.recipe import find_recipe

SLICE_N_WEIGHTS = 1 << 22
"""Weights read at a time: 16 MiB as float32."""


@dataclass(frozen=True, slots=True)
class GgufResult:
    """A file that was written whole."""

    path: Path
    recipe_name: str
    nbytes: int
    n_weights: int
    bits_per_weight: float


def export_gguf(
    checkpoint: Checkpoint,
    recipe_name: str,
    out_path: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
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
    on_progress: Callable[[int, int], None] | None = None,
    slice_n_weights: int = SLICE_N_WEIGHTS,
) -> list[GgufResult]:
    """Write all planned files, each slice of the checkpoint read once.

    threads: of the encoders, all cores by default. on_progress: (weights done, weights in all).
    Neither threads nor slice_n_weights changes a byte. No file gets its name before all are
    complete.
    Raises OutputExistsError, DiskFullError, and CheckpointError for weights that are NaN, infinite
    or too large for a type.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: at least 1 is needed")
    check_outputs(plans, force=force)
    n_weights = plans[0].n_weights
    n_done = 0
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads or n_cores()))
        files = [stack.enter_context(replacing_file(plan.path, force=force)) for plan in plans]
        for file, plan in zip(files, plans, strict=True):
            file.write(plan.header)
        for tensors in zip(*(plan.tensors for plan in plans), strict=True):
            shape = tensors[0].shape
            n_per_row = shape[-1] if len(shape) > 1 else 1
            n_rows = max(1, slice_n_weights // n_per_row)
            for start in range(0, shape[0], n_rows):
                stop = min(start + n_rows, shape[0])
                rows = checkpoint.rows(tensors[0].name, start, stop).reshape(stop - start, -1)
                for file, tensor in zip(files, tensors, strict=True):
                    file.write(_encode(rows, tensor, pool).data)
                n_done += rows.size
                if on_progress is not None:
                    on_progress(n_done, n_weights)
            for file, tensor in zip(files, tensors, strict=True):
                file.write(bytes(-tensor.nbytes % ALIGNMENT))
    return [
        GgufResult(plan.path, plan.recipe.name, plan.nbytes, plan.n_weights, plan.bits_per_weight)
        for plan in plans
    ]


def check_outputs(plans: Sequence[FilePlan], *, force: bool) -> None:
    """Raise OutputExistsError or DiskFullError where the planned files cannot be written."""
    for plan in plans:
        refuse_existing(plan.path, force=force)
    for folder in sorted({plan.path.parent for plan in plans}):
        check_disk_space(folder, sum(plan.nbytes for plan in plans if plan.path.parent == folder))


def _encode(rows: Float32Array, tensor: TensorPlan, pool: ThreadPoolExecutor) -> ByteArray:
    try:
        return encode_rows(rows, tensor.quant_type, pool=pool)
    except OverflowError as error:
        raise CheckpointError(
            f"{tensor.name}: holds weights of up to {abs(rows).max():.3g}, too large for "
            f"{tensor.quant_type.name}; choose --type BF16"
        ) from error
