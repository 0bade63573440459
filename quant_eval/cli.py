"""`qwq quantize` and `qwq eval`: plan and progress on stderr, results on stdout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convert.errors import QwqError
from quant_eval.layers_cli import layers
from quant_eval.options import (
    AsJson,
    MaxTokens,
    Problems,
    Quiet,
    ReferenceOption,
    Replies,
    ReplySeed,
    Seed,
    States,
    TaskSeconds,
    Text,
    Threads,
    Tokens,
    settings_for,
)
from quant_eval.terminal import hush_libraries, progress, stderr_console, stdout_console
from quant_eval.verdict_cli import baseline, compare, gate, parity, reference

if TYPE_CHECKING:
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from quant_eval.manifest import Manifest
    from quant_eval.pipeline import Plan
    from quant_eval.results import EvaluationSettings

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
    from convert.calibration import load_conversations
    from convert.checkpoint import Checkpoint
    from quant_eval import pipeline
    from quant_eval.manifest import Manifest
    from qwq_local.hub import resolve_model

    hush_libraries()
    path = pipeline.NANO_CHECKPOINT if model is None else resolve_model(model)
    default_types = pipeline.NANO_TYPES if model is None else pipeline.USUAL_TYPES
    chosen = pipeline.parse_types(types or default_types)
    if text is not None:
        load_conversations(text)  # a text that is none is said now, not after hours of work
    console = stderr_console(quiet=quiet)
    with Checkpoint.open(path) as checkpoint:
        manifest = Manifest(out or Path("models") / pipeline.model_name(checkpoint))
        plan = pipeline.make_plan(checkpoint, chosen, manifest, force=force)
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
        _evaluate(
            checkpoint,
            paths,
            manifest,
            settings=settings,
            text=text,
            threads=engine_threads,
            output=(console, as_json),
        )


@app.callback()
def start() -> None:
    """Measure what quantizing did to a model."""


for _command in (compare, gate, baseline, layers, parity, reference):
    app.command()(_command)


@app.command()
def run(
    files: Annotated[list[Path], typer.Argument(help="GGUF files and GPTQ folders.")],
    *,
    reference: ReferenceOption,
    states: States = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for report.json and report.html.")
    ] = Path("evaluation"),
    threads: Threads = None,
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
    """Evaluate files that are there: divergence from the reference, tasks, speed."""
    from convert.checkpoint import Checkpoint
    from quant_eval import pipeline
    from quant_eval.manifest import Manifest
    from qwq_local.hub import resolve_model

    hush_libraries()
    with Checkpoint.open(resolve_model(reference)) as checkpoint:
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
        _evaluate(
            checkpoint,
            files,
            Manifest(out),
            settings=settings,
            text=text,
            states=states,
            threads=pipeline.engine_threads(checkpoint, threads),
            output=(stderr_console(quiet=quiet), as_json),
        )


def _evaluate(
    checkpoint: "Checkpoint",
    paths: Sequence[Path],
    manifest: "Manifest",
    *,
    settings: "EvaluationSettings",
    text: Path | None,
    states: Path | None = None,
    threads: int,
    output: tuple["Console", bool],
) -> None:
    """Measure, print the table or the JSON, and write both reports.

    output: where progress goes, and whether stdout gets JSON. Raises the first error of a file
    that could not be measured when the reports of the others are written.
    """
    from quant_eval import pipeline
    from quant_eval.report import results_table, write_html
    from quant_eval.results import to_json, write_json

    console, as_json = output
    tasks = f"{settings.n_problems} problems of each kind" if settings.n_problems else "no tasks"
    console.print(
        f"measuring {len(paths)} files: at most {settings.n_tokens:,} reply tokens, {tasks} "
        f"within {settings.task_seconds:.0f} s a file; what is known already is not measured again",
        soft_wrap=True,
    )
    ask = pipeline.Ask(settings, text, states)
    with progress(console) as on_progress:
        measured, failures = pipeline.measure(
            checkpoint, paths, manifest, ask, threads=threads, on_progress=on_progress
        )
        by_layer = {}
        for one in measured:
            try:
                by_layer[one.path] = pipeline.errors_by_layer(
                    checkpoint,
                    one.path,
                    manifest,
                    ask,
                    threads=threads,
                    on_progress=on_progress if pipeline.is_small(checkpoint) else None,
                )
            except QwqError as error:
                failures.append(error)
    report = pipeline.make_report(checkpoint, manifest, ask, measured, by_layer)
    if report.files:
        write_json(manifest.folder / "report.json", report)
        write_html(manifest.folder / "report.html", report)
        if as_json:
            typer.echo(json.dumps(to_json(report), indent=2, sort_keys=True))
        else:
            stdout_console().print(results_table(report))
        console.print(
            f"report: {manifest.folder / 'report.html'} and report.json beside it", soft_wrap=True
        )
    if failures:
        for failure in failures[1:]:
            console.print(f"not measured: {failure}", soft_wrap=True)
        raise failures[0]


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
