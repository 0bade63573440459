"""The plan of a conversion and its results, as tables and as JSON documents."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from convert.checkpoint import Checkpoint
from convert.files import format_nbytes
from convert.gguf_estimate import Estimate
from convert.gguf_export import GgufResult
from convert.journal import journal_path, load_journal
from convert.plan import FilePlan
from convert.rounding_report import rounding_document

if TYPE_CHECKING:
    from rich.console import Console


def show_plans(
    console: "Console", checkpoint: Checkpoint, plans: Sequence[FilePlan], *, tensors: bool
) -> None:
    """Print a row an output and why a tensor has another type than its recipe wants.

    tensors: a row a tensor too, from what to what.
    """
    from rich.table import Table

    for plan in plans:
        if tensors:
            table = Table("tensor", "shape", "from", "to", "bytes", box=None)
            for tensor in plan.tensors:
                shape = " x ".join(map(str, tensor.shape))
                source = checkpoint.tensors[tensor.name].dtype
                row = (tensor.gguf_name, shape, source, tensor.quant_type.name)
                table.add_row(*row, f"{tensor.nbytes:,}")
            console.print(table)
        for tensor in plan.tensors:
            if tensor.note:
                console.print(
                    f"{tensor.gguf_name}: {tensor.quant_type.name}, since {tensor.note}",
                    soft_wrap=True,
                )
    table = Table("type", "size", "bits per weight", "tensors", "file", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for plan in plans:
        counts = Counter(tensor.quant_type.name for tensor in plan.tensors)
        mix = ", ".join(f"{n} {name}" for name, n in counts.most_common())
        size, bits = format_nbytes(plan.nbytes), f"{plan.bits_per_weight:.2f}"
        n_more = len(plan.parts) - 1
        path = f"{plan.path}" + (f" and {n_more} more" if n_more else "")
        table.add_row(plan.recipe.name, size, bits, mix, path)
    console.print(table)
    for plan in plans:
        if load_journal(journal_path(plan.path)) is not None:
            console.print(
                f"{plan.path}: unfinished work is there and will be continued", soft_wrap=True
            )


def show_estimate(console: "Console", estimate: Estimate) -> None:
    needed, free = estimate.disk_needed_nbytes, estimate.disk_free_nbytes
    verdict = "" if needed <= free else ": too little"
    console.print(f"disk: {format_nbytes(needed)} needed, {format_nbytes(free)} free{verdict}")
    console.print(f"memory: {format_nbytes(estimate.memory_nbytes)} at most")
    threads = "1 thread" if estimate.n_threads == 1 else f"{estimate.n_threads} threads"
    console.print(f"time: about {format_duration(estimate.duration_s)} on {threads}")


def format_duration(duration_s: float) -> str:
    """Two units at most: "8 s", "12 min", "3 h 20 min"."""
    if duration_s < 90:
        return f"{max(1, round(duration_s))} s"
    n_minutes = round(duration_s / 60)
    if n_minutes < 90:
        return f"{n_minutes} min"
    return f"{n_minutes // 60} h {n_minutes % 60} min"


def plan_document(
    checkpoint: Checkpoint, plans: Sequence[FilePlan], estimate: Estimate
) -> dict[str, object]:
    return {
        "files": [
            {
                "path": str(plan.path),
                "paths": [str(part.path) for part in plan.parts],
                "type": plan.recipe.name,
                "nbytes": plan.nbytes,
                "n_weights": plan.n_weights,
                "bits_per_weight": round(plan.bits_per_weight, 4),
                "tensors": [
                    {
                        "name": tensor.gguf_name,
                        "shape": tensor.shape,
                        "source_type": checkpoint.tensors[tensor.name].dtype,
                        "type": tensor.quant_type.name,
                        "nbytes": tensor.nbytes,
                        "note": tensor.note,
                    }
                    for tensor in plan.tensors
                ],
            }
            for plan in plans
        ],
        "disk_needed_nbytes": estimate.disk_needed_nbytes,
        "disk_free_nbytes": estimate.disk_free_nbytes,
        "memory_nbytes": estimate.memory_nbytes,
        "duration_s": round(estimate.duration_s, 1),
        "threads": estimate.n_threads,
    }


def result_document(results: Sequence[GgufResult], elapsed_s: float) -> dict[str, object]:
    return {
        "elapsed_s": round(elapsed_s, 3),
        "files": [
            {
                "path": str(result.path),
                "type": result.recipe_name,
                "nbytes": result.nbytes,
                "n_weights": result.n_weights,
                "bits_per_weight": round(result.bits_per_weight, 4),
                **({"rounding": rounding_document(result.choices)} if result.choices else {}),
            }
            for result in results
        ],
    }
