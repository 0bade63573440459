"""`qwq convert gptq`: a checkpoint in, a folder in GPTQ's format out."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from convert.calibration import TokenBatch
    from convert.checkpoint import Checkpoint
    from convert.gptq import GptqSettings
    from convert.gptq_export import GptqPlan, GptqResult

BAR_LOOKS_BACK_S = 1e6  # by default half a minute, in which no large linear is done

Batches = tuple[list["TokenBatch"], list["TokenBatch"]]
"""Text to fit to, and text held out."""


def gptq_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with config.json, tokenizer.json and *.safetensors.")
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="The folder to write (default: models/MODEL/MODEL-gptq-4bit).",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Input columns that share a scale: 32, 64, 128, or -1 for all.")
    ] = 128,
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric",
            help="Give every group a zero point of its own; for GPTQModel's loader with "
            "--format-version 2.",
        ),
    ] = False,
    order: Annotated[
        str,
        typer.Option(
            help="Which columns are fixed first: groups (the most active ones, group by group), "
            "columns (from left to right) or activations (act-order, slower to run)."
        ),
    ] = "groups",
    version: Annotated[
        int, typer.Option("--format-version", help="1, which all read, or 2 (gptq_v2).")
    ] = 1,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON Lines, Parquet or plain text to calibrate on; may be given several times "
            "(default: the built-in conversations).",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Calibration tokens; more take longer and fit better.")
    ] = 16_384,
    device: Annotated[
        str | None,
        typer.Option(help="cuda, mps or cpu (default: the best there is).", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that exists, finished or not.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show errors alone.")] = False,
) -> None:
    """Write a GPTQ folder for transformers, GPTQModel and vLLM.

    One layer is in memory at a time. The weights are fitted to calibration conversations, thoughts
    included. Interrupted, the same command continues where it was.
    """
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from convert.files import refuse_existing
    from convert.gptq import GptqSettings
    from convert.gptq_export import export_gptq, gptq_batches, plan_gptq
    from convert.hessian import too_few_tokens
    from convert.layer_stream import find_device
    from convert.passages import load_all_passages

    settings = GptqSettings(
        bits=bits,
        group_size=group_size,
        symmetric=not asymmetric,
        order=order,
        version=version,
    )
    chosen = find_device(device)
    console = Console(stderr=True, quiet=quiet, highlight=False)
    with Checkpoint.open(checkpoint) as opened:
        target = out or Path("models") / opened.name / f"{opened.name}-gptq-{bits}bit"
        plan = plan_gptq(opened, settings)
        if not dry_run:
            refuse_existing(target, force=force)
        passages = load_all_passages(text, opened.model.vocab_size)
        if dry_run and as_json:
            typer.echo(json.dumps(_plan_document(plan, target), indent=2))
            return
        batches = gptq_batches(opened, passages, settings, n_tokens=tokens)
        shown = Console(highlight=False) if dry_run else console
        _show_plan(shown, opened, plan, target, batches)
        shown.print(_about(opened, settings, batches, device=chosen), soft_wrap=True)
        if dry_run:
            return
        start_s = time.monotonic()
        with _bar(console, opened.model.n_layers) as on_progress:
            result = export_gptq(
                opened,
                target,
                settings=settings,
                calibration=passages,
                n_tokens=tokens,
                device=chosen,
                force=force,
                on_progress=on_progress,
            )
        elapsed_s = time.monotonic() - start_s
    n_columns = opened.model.intermediate_size
    if warning := too_few_tokens(result.n_fitted, n_columns):
        console.print(warning, soft_wrap=True)
    dampings = Counter(result.damp.values())
    console.print(
        f"damping, chosen on {result.n_held_out:,} held-out tokens: "
        + ", ".join(f"{damp:g} for {n}" for damp, n in sorted(dampings.items())),
        soft_wrap=True,
    )
    for linear, damp in result.raised_damp.items():
        console.print(
            f"{linear}: its Hessian needed damping {damp:g}; more tokens may help", soft_wrap=True
        )
    console.print(
        f"{plan.n_quantized} linears in {elapsed_s:.1f} s, fitted to {result.n_fitted:,} tokens, "
        f"{result.n_fitted / n_columns:.1f} for each of up to {n_columns:,} columns "
        f"(set {result.calibration_sha256[:12]})",
        soft_wrap=True,
    )
    typer.echo(
        json.dumps(_result_document(result, elapsed_s), indent=2) if as_json else result.path
    )


@contextmanager
def _bar(console: Console, n_layers: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of linears done, with the layer and the time left; it goes when the work is done."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(None),
        TextColumn("{task.description}, linear"),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(
        *columns,
        console=console,
        disable=console.quiet,
        transient=True,
        speed_estimate_period=BAR_LOOKS_BACK_S,
    ) as progress:
        task = progress.add_task(f"layer 1 of {n_layers}")

        def show(done: int, total: int) -> None:
            layer = min(done * n_layers // total + 1, n_layers)
            description = f"layer {layer} of {n_layers}"
            progress.update(task, completed=done, total=total, description=description)

        yield show


def _show_plan(
    console: Console, checkpoint: Checkpoint, plan: GptqPlan, target: Path, batches: Batches
) -> None:
    from convert.files import format_nbytes, free_space, missing_nbytes
    from convert.gptq_export import disk_nbytes
    from convert.hessian import too_few_tokens
    from convert.layer_stream import n_tokens_of

    n_linears, model = plan.n_quantized, checkpoint.model
    console.print(
        f"{target}: {format_nbytes(plan.nbytes)}, {plan.bits_per_weight:.2f} bits per weight; "
        f"{n_linears} linears of {model.n_layers} layers, all else as it is",
        soft_wrap=True,
    )
    n_needed = disk_nbytes(checkpoint, plan, [*batches[0], *batches[1]])
    n_missing = missing_nbytes(target, n_needed)
    console.print(
        f"disk: {format_nbytes(n_missing)} needed"
        + (" beside what is done of it" if n_missing < n_needed else "")
        + f", {format_nbytes(free_space(target))} free; {format_nbytes(n_needed - plan.nbytes)} of "
        "all are hidden states, removed at the end",
        soft_wrap=True,
    )
    n_fitted, n_held_out = map(n_tokens_of, batches)
    console.print(
        f"fitted to {n_fitted:,} tokens, {n_fitted / model.intermediate_size:.1f} for each of up "
        f"to {model.intermediate_size:,} columns, judged by {n_held_out:,} held out",
        soft_wrap=True,
    )
    if warning := too_few_tokens(n_fitted, model.intermediate_size):
        console.print(warning, soft_wrap=True)


def _about(checkpoint: Checkpoint, settings: GptqSettings, batches: Batches, *, device: str) -> str:
    """Time and memory that the work will take, in words; off the processor no time is known."""
    from convert.estimate import estimate_gptq, estimated_seconds, format_duration
    from convert.files import format_nbytes
    from convert.layer_stream import n_tokens_of

    n_tokens = sum(map(n_tokens_of, batches))
    estimate = estimate_gptq(checkpoint.model, settings, n_tokens)
    peak = format_nbytes(estimate.peak_nbytes)
    if device != "cpu":
        host = format_nbytes(estimate.host_nbytes)
        return f"memory: {peak} on {device} and {host} on the host, beside torch's own"
    duration = format_duration(estimated_seconds(estimate))
    return f"memory: {peak} beside torch's own; time: about {duration} on this machine as it is now"


def _plan_document(plan: GptqPlan, target: Path) -> dict[str, object]:
    return {
        "path": str(target),
        "nbytes": plan.nbytes,
        "n_weights": plan.n_weights,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "nbytes": tensor.nbytes,
            }
            for tensor in plan.tensors
        ],
    }


def _result_document(result: GptqResult, elapsed_s: float) -> dict[str, object]:
    return {
        "path": str(result.path),
        "nbytes": result.nbytes,
        "bits_per_weight": round(result.bits_per_weight, 4),
        "n_calibration_tokens": result.n_calibration_tokens,
        "n_held_out": result.n_held_out,
        "calibration_sha256": result.calibration_sha256,
        "damp": result.damp,
        "raised_damp": result.raised_damp,
        "elapsed_s": round(elapsed_s, 3),
    }
