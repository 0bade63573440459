"""`qwq quantize` and `qwq eval`: plan and progress on stderr, results on stdout."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convert.errors import UsageError
from quant_eval.compare_cli import compare
from quant_eval.layers_cli import layers
from quant_eval.options import (
    AsJson,
    MaxTokens,
    Problems,
    Quiet,
    Replies,
    ReplySeed,
    Seed,
    TaskSeconds,
    Text,
    Threads,
    Tokens,
    settings_for,
)
from quant_eval.run_cli import evaluate, run
from quant_eval.terminal import hush_engines, progress, stderr_console, stdout_console
from quant_eval.verdict_cli import baseline, gate, parity, reference

if TYPE_CHECKING:
    from rich.console import Console

    from quant_eval.pipeline import Plan

app = typer.Typer(
    help="Measure what quantizing did to a model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
quantize_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@quantize_app.command()
def quantize(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, or a repository such as Qwen/QwQ-32B, fetched where needed "
            "(default: nano-qwq, bundled).",
            show_default=False,
        ),
    ] = None,
    *,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            help="Q4_K_M and its like, or gptq-4bit; again for more (default: Q4_K_M and "
            "gptq-4bit; for nano-qwq all of them).",
            show_default=False,
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="In place of types: choose those that cost least within a device's memory, such "
            "as 24GiB; it calibrates first.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(min=1, help="With --fit: tokens that the kv_cache is to hold.")
    ] = 32_768,
    kv_type: Annotated[
        str, typer.Option("--kv", "--kv-type", help="With --fit: the kv_cache's type, f16 or q8_0.")
    ] = "f16",
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Folder (default: models/ and its name).", show_default=False
        ),
    ] = None,
    threads: Threads = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make again and replace what is there.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan alone.")] = False,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Check the files, measure nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    text: Text = None,
    tokens: Tokens = None,
    problems: Problems = None,
    replies: Replies = None,
    task_seconds: TaskSeconds = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    reply_seed: ReplySeed = None,
) -> None:
    """Quantize a checkpoint, check the files and show what it cost.

    A second run makes and measures only what is new.
    """
    from convert.budget_cli import FitOptions
    from convert.checkpoint import Checkpoint
    from convert.encode import n_cores
    from convert.passages import load_pieces
    from quant_eval import pipeline
    from quant_eval.fitted import plan_fitted
    from quant_eval.manifest import Manifest
    from qwq_local.hub import resolve_model

    hush_engines()
    path = pipeline.NANO_CHECKPOINT if model is None else resolve_model(model)
    default_types = pipeline.NANO_TYPES if model is None else pipeline.USUAL_TYPES
    chosen = pipeline.parse_types(types or default_types)
    if fit is not None and (types or dry_run):
        raise UsageError(
            f"--fit {fit}: chooses the types, once it has calibrated; leave --type and --dry-run "
            "out"
        )
    if text is not None:
        load_pieces(text)  # a text that is none is said now, not after hours of work
    console = stderr_console(quiet=quiet)
    with Checkpoint.open(path) as checkpoint:
        manifest = Manifest(out or Path("models") / pipeline.model_name(checkpoint))
        if fit is None:
            plan = pipeline.make_plan(checkpoint, chosen, manifest, force=force)
        else:
            with progress(console) as on_progress:
                plan = plan_fitted(
                    checkpoint,
                    manifest,
                    FitOptions(fit, context, kv_type, None),
                    threads=threads or n_cores(),
                    console=console,
                    on_progress=on_progress,
                )
        if dry_run:
            _print_plan(stdout_console(), plan, as_json=as_json)
            return
        _print_plan(console, plan, as_json=False)
        engine_threads = pipeline.engine_threads(checkpoint, threads)
        with progress(console) as on_progress:
            pipeline.write(plan, manifest, threads=threads, force=force, on_progress=on_progress)
            pipeline.check(plan.outputs, manifest, threads=engine_threads, on_progress=on_progress)
        if no_eval:
            if as_json:
                _print_plan(stdout_console(), plan, as_json=True)
            else:
                for planned in plan.outputs:
                    typer.echo(planned.path)
            return
        settings = settings_for(
            checkpoint,
            n_tokens=tokens,
            n_problems=problems,
            n_replies=replies,
            task_seconds=task_seconds,
            max_tokens=max_tokens,
            seed=seed,
            reply_seed=reply_seed,
        )
        paths = [output.path for output in plan.outputs]
        has_folders = any(one.is_dir() for one in paths)
        floors = (path,) if has_folders and pipeline.is_small(checkpoint) else ()
        evaluate(
            checkpoint,
            paths,
            (),
            manifest,
            pipeline.Ask(settings, text, floors=floors),
            threads=engine_threads,
            output=(console, as_json),
        )


@app.callback()
def start() -> None:
    """Measure what quantizing did to a model."""


for _command in (run, compare, gate, baseline, layers, parity, reference):
    app.command()(_command)


def _print_plan(console: "Console", plan: "Plan", *, as_json: bool) -> None:
    """The outputs with their sizes, a row each, and the disk."""
    from rich import box
    from rich.table import Table

    from convert.files import format_nbytes, free_space

    n_needed = sum(output.nbytes for output in plan.outputs if not output.kept)
    n_free = free_space(plan.outputs[0].path.parent)

    if as_json:
        rows = [
            {
                "type": output.type_name,
                "path": str(output.path),
                "nbytes": output.nbytes,
                "bits_per_weight": output.bits_per_weight,
                "kept": output.kept,
            }
            for output in plan.outputs
        ]
        document = {"outputs": rows, "disk_needed_nbytes": n_needed, "disk_free_nbytes": n_free}
        typer.echo(json.dumps(document, indent=2, sort_keys=True))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("type", "size MB", "bits/weight", "", "file"):
        table.add_column(title, justify="right" if title[:1] in ("s", "b") else "left")
    for output in plan.outputs:
        table.add_row(
            output.type_name,
            f"{output.nbytes / 1e6:,.1f}",
            f"{output.bits_per_weight:.2f}",
            "kept" if output.kept else "new",
            str(output.path),
        )
    console.print(table)
    console.print(f"to write: {format_nbytes(n_needed)}; free: {format_nbytes(n_free)}")
