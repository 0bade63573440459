"""`qwq eval run`: files and servers measured, a table on stdout and both reports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convert.errors import QwqError, UsageError
from quant_eval.options import (
    UNLIMITED_S,
    AsJson,
    AtOnce,
    BaseUrl,
    FileReference,
    Files,
    Floors,
    MaxTokens,
    Needles,
    Problems,
    Quiet,
    Replies,
    ReplySeed,
    Seed,
    States,
    TaskFiles,
    TaskProblems,
    TaskSeconds,
    Text,
    Threads,
    Tokens,
    settings_for,
)
from quant_eval.terminal import hush_engines, progress, stderr_console, stdout_console

if TYPE_CHECKING:
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from quant_eval.manifest import Manifest
    from quant_eval.measurement import Measured
    from quant_eval.pipeline import Ask, Server


def run(
    files: Files = None,
    *,
    reference: FileReference = None,
    floor: Floors = None,
    base_url: BaseUrl = None,
    at_once: AtOnce = 8,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A little of everything, within a minute for nano-qwq.")
    ] = False,
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
    tasks: TaskFiles = None,
    task_problems: TaskProblems = None,
    needles: Needles = None,
    replies: Replies = None,
    task_seconds: TaskSeconds = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    reply_seed: ReplySeed = None,
) -> None:
    """Evaluate files that are there: divergence from the reference, tasks, speed.

    Of servers the tasks alone can be asked.
    """
    from contextlib import ExitStack

    from convert.checkpoint import Checkpoint
    from quant_eval import pipeline
    from quant_eval.manifest import Manifest
    from quant_eval.sizes import check_unquantized
    from qwq_local.hub import resolve_model

    hush_engines()
    paths, servers = files or [], [pipeline.Server(url, at_once) for url in base_url or ()]
    if not paths and not servers:
        raise UsageError("run: nothing to measure; give files, or a server with --base-url")
    if paths and reference is None:
        raise UsageError("run: files need the checkpoint they were made from; give --reference")
    if floor and not paths:
        raise UsageError("--floor: is for numbers that a server does not show; leave it out")
    for each in floor or ():
        check_unquantized(each)
    with ExitStack() as stack:
        checkpoint = None
        if reference is not None:
            checkpoint = stack.enter_context(Checkpoint.open(resolve_model(reference)))
        settings = settings_for(
            checkpoint if paths else None,
            tasks,
            needles,
            smoke=smoke,
            n_tokens=tokens,
            n_problems=problems,
            n_task_problems=task_problems,
            n_replies=replies,
            task_seconds=task_seconds,
            max_tokens=max_tokens,
            seed=seed,
            reply_seed=reply_seed,
        )
        evaluate(
            checkpoint,
            paths,
            servers,
            Manifest(out),
            pipeline.Ask(settings, text, states, tuple(tasks or ()), tuple(floor or ())),
            threads=threads,
            output=(stderr_console(quiet=quiet), as_json),
        )


def evaluate(
    checkpoint: "Checkpoint | None",
    paths: Sequence[Path],
    servers: Sequence["Server"],
    manifest: "Manifest",
    ask: "Ask",
    *,
    threads: int | None,
    output: tuple["Console", bool],
) -> None:
    """Measure, print the table or the JSON, and write both reports.

    checkpoint: None where no reference is given; servers alone need none. output: where progress
    goes, and whether stdout gets JSON. Raises the first error of a file that could not be measured
    when the reports of the others are written.
    """
    from quant_eval import pipeline
    from quant_eval.report import caption_of, results_tables, write_html
    from quant_eval.results import to_json, write_json

    console, as_json = output
    settings = ask.settings
    console.print(
        f"measuring {len(paths) + len(servers)} models: at most {settings.n_tokens:,} reply "
        f"tokens, {_tasks_in_words(ask)}; what is known already is not measured again",
        soft_wrap=True,
    )
    measured: list[Measured] = []
    failures: list[QwqError] = []
    by_layer = {}
    floors: list[Measured] = []
    with progress(console) as on_progress:
        if checkpoint is not None and paths:
            n_threads = pipeline.engine_threads(checkpoint, threads)
            measured, failures = pipeline.measure(
                checkpoint, paths, manifest, ask, threads=n_threads, on_progress=on_progress
            )
            floors, unknown = pipeline.measure_floors(
                checkpoint, manifest, ask, threads=n_threads, on_progress=on_progress
            )
            failures = [*failures, *unknown]
            for one in measured:
                assert one.path is not None
                try:
                    by_layer[one.path] = pipeline.errors_by_layer(
                        checkpoint,
                        one.path,
                        manifest,
                        ask,
                        threads=n_threads,
                        on_progress=on_progress if pipeline.is_small(checkpoint) else None,
                    )
                except QwqError as error:
                    failures.append(error)
        replied, unreached = pipeline.measure_servers(
            servers, manifest, ask, checkpoint=checkpoint, on_progress=on_progress
        )
    measured, failures = measured + replied, failures + unreached
    if measured:
        of_files = checkpoint if paths else None
        report = pipeline.make_report(of_files, manifest, ask, measured, by_layer, floors=floors)
        write_json(manifest.folder / "report.json", report)
        write_html(manifest.folder / "report.html", report)
        if as_json:
            typer.echo(json.dumps(to_json(report), indent=2, sort_keys=True))
        else:
            stdout = stdout_console()
            stdout.print(*results_tables(report, width=stdout.width))
            stdout.print(caption_of(report), style="dim italic")
        console.print(
            f"report: {manifest.folder / 'report.html'} and report.json beside it", soft_wrap=True
        )
    if failures:
        for failure in failures[1:]:
            console.print(f"not measured: {failure}", soft_wrap=True)
        raise failures[0]


def _tasks_in_words(ask: "Ask") -> str:
    settings = ask.settings
    parts = [f"{settings.n_problems} problems of each kind"] if settings.n_problems else []
    parts += map(str, ask.tasks)
    parts += [f"numbers hidden in {n:,} tokens" for n in settings.needles]
    if not parts:
        return "no tasks"
    if settings.task_seconds >= UNLIMITED_S:
        return ", ".join(parts)
    return f"{', '.join(parts)} within {settings.task_seconds:.0f} s a model"
