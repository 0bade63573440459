"""`qwq eval gate`, `baseline`, `parity` and `reference`."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convert.errors import RegressionError, UsageError
from convert.files import refuse_existing
from quant_eval.options import (
    UNLIMITED_S,
    AsJson,
    Floors,
    MaxTokens,
    Needles,
    Out,
    Problems,
    Quiet,
    ReferenceOption,
    Replies,
    ReplySeed,
    Seed,
    States,
    TaskFiles,
    TaskProblems,
    Text,
    Threads,
    Tokens,
    settings_for,
)
from quant_eval.terminal import hush_engines, progress, stderr_console

if TYPE_CHECKING:
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from quant_eval.gate import Check
    from quant_eval.measurement import Measured
    from quant_eval.pipeline import Ask


def gate(
    file: Annotated[Path, typer.Argument(help="GGUF file or GPTQ folder.")],
    *,
    baseline: Annotated[
        Path | None, typer.Option(help="What `qwq eval baseline` wrote.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Entry of the baseline (default: the file's name, or the only one)."),
    ] = None,
    limits: Annotated[
        bool, typer.Option("--limits", help="Hold it against the limits for its type too.")
    ] = False,
    reference: ReferenceOption,
    states: States = None,
    out: Out = Path("evaluation"),
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    text: Text = None,
    tasks: TaskFiles = None,
    reply_seed: ReplySeed = None,
) -> None:
    """Exit with 3 where a file is worse than its baseline, and name what regressed.

    It is measured with the baseline's own settings and without a limit of time. A server's model
    has no gate: its weights and logits cannot be read, and unmeasured is not passed.
    """
    from quant_eval import gate as rules
    from quant_eval.baseline import find_entry, load_baseline
    from quant_eval.manifest import Manifest
    from quant_eval.metrics import absent_from, samples_of
    from quant_eval.pipeline import Ask, evaluation_text

    if re.match("https?:/", str(file)):
        raise UsageError(
            f"{file}: is a server, whose weights and logits cannot be read, and unmeasured is not "
            "passed; give the file that it serves, or see `qwq eval compare --base-url`"
        )
    if baseline is None and not limits:
        raise UsageError("gate: nothing to hold the file against; give --baseline or --limits")
    limit = rules.limit_of(file) if limits else None
    console = stderr_console(quiet=quiet)
    checks: list[Check] = []
    with _opened(reference) as (checkpoint, n_threads):
        settings = settings_for(checkpoint)
        entry = None
        if baseline is not None:
            accepted = load_baseline(baseline)
            entry = find_entry(accepted, file, against, baseline)
            rules.check_conditions(
                accepted,
                baseline,
                checkpoint=Manifest(out).model_sha256(checkpoint.path),
                text=evaluation_text(checkpoint, text)[1],
            )
            settings = rules.settings_of_gate(accepted, reply_seed)
        ask = Ask(settings, text, states, tuple(tasks or ()))
        (measured,) = _measured(checkpoint, [file], out, ask, threads or n_threads, console)
        if entry is not None:
            checks += rules.gate_file(measured, entry, checkpoint, threads=threads)
    if limit is not None:
        noise = entry.floor if entry is not None else {}
        checks += rules.judge_limit(limit, samples_of(measured, {}), floor=noise)
    failed = [check for check in checks if check.verdict != "passed"]
    absent = [] if entry is None else absent_from(entry.samples)
    if as_json:
        document = {
            "file": str(file),
            "passed": not failed,
            "alarm_rate": rules.ALARM_RATE,
            "checks": [asdict(check) for check in checks],
            "not_in_baseline": absent,
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        for check in checks:
            typer.echo(f"{check.verdict:<10}  {check.name}: {check.words}")
        if absent:
            typer.echo(f"not part of this baseline: {', '.join(absent)}")
    if failed:
        names = ", ".join(f"{check.name} ({check.verdict})" for check in failed)
        raise RegressionError(
            f"{file}: not passed: {names}; `qwq eval compare` shows it beside another file"
        )
    if entry is not None and not entry.floor:
        typer.echo(
            "the noise of the path itself is not known; make the baseline with the 16-bit file as "
            "--floor",
            err=True,
        )
    typer.echo(
        f"passed; a file that is no worse fails in at most {rules.ALARM_RATE:.0%} of gates",
        err=True,
    )


def baseline(
    files: Annotated[list[Path], typer.Argument(help="GGUF files and GPTQ folders found good.")],
    *,
    reference: ReferenceOption,
    floor: Floors = None,
    save: Annotated[Path, typer.Option(help="The baseline's own file.")] = Path("baseline.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace an older one.")] = False,
    states: States = None,
    out: Out = Path("evaluation"),
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
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Measure files and keep what `qwq eval gate` holds later ones against.

    With --floor, or a 16-bit file among them, the gate shows the noise of the path itself beside
    each number against the reference, and takes no difference below it for a regression.
    """
    from quant_eval.baseline import make_entry, save_baseline, summarize_entry
    from quant_eval.manifest import Manifest
    from quant_eval.pipeline import Ask, make_report, text_alone
    from quant_eval.rows import find_floor
    from quant_eval.sizes import check_unquantized

    refuse_existing(save, force=force)
    for each in floor or ():
        check_unquantized(each)
    console = stderr_console(quiet=quiet)
    with _opened(reference) as (checkpoint, n_threads):
        settings = settings_for(
            checkpoint,
            tasks,
            needles,
            n_tokens=tokens,
            n_problems=problems,
            n_task_problems=task_problems,
            n_replies=replies,
            max_tokens=max_tokens,
            seed=seed,
            task_seconds=UNLIMITED_S,
        )
        ask = Ask(settings, text, states, tuple(tasks or ()))
        measured = _measured(checkpoint, files, out, ask, threads or n_threads, console)
        noise: list[Measured] = []
        if floor:
            only_text = text_alone(ask)
            noise = _measured(checkpoint, floor, out, only_text, threads or n_threads, console)
        entries = []
        for one in measured:
            exact = find_floor([*noise, *measured], one.engine)
            entries.append(make_entry(one, checkpoint, threads=threads, floor=exact))
        save_baseline(save, make_report(checkpoint, Manifest(out), ask, measured), entries)
    summaries = [summarize_entry(entry) for entry in entries]
    if as_json:
        typer.echo(json.dumps({"baseline": str(save), "entries": summaries}, indent=2))
        return
    typer.echo(save)
    for summary in summaries:
        if absent := summary["not_measured"]:
            typer.echo(f"{summary['name']}: not measured: {', '.join(absent)}", err=True)


def parity(
    file: Annotated[Path, typer.Argument(help="GGUF file or GPTQ folder, whoever made it.")],
    *,
    source: Annotated[str, typer.Option(help="The checkpoint: folder or repository.")],
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Hold tokenizer, template, stop tokens, sampling and rope against the checkpoint's.

    Exits with 3 where the file cannot work as the checkpoint does, and names why; what it merely
    says otherwise is a note.
    """
    from quant_eval.parity import check_parity

    with _opened(source) as (checkpoint, n_threads):
        checks = list(check_parity(file, checkpoint, threads=threads or n_threads))
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            typer.echo(f"{check.verdict:<10}  {check.name}: {check.words}")
    wrong = [check.name for check in checks if check.verdict == "regressed"]
    if wrong:
        raise RegressionError(
            f"{file}: differs from its checkpoint in {', '.join(wrong)}; convert the checkpoint "
            "again, or take another file"
        )


def reference(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: folder or repository.")],
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the states.")] = Path(
        "reference"
    ),
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder of `qwq calibrate --evaluation` with the same text: nothing is run anew.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it anew, finished or not.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    text: Text = None,
    tokens: Tokens = None,
) -> None:
    """Run the unquantized model over the evaluation text once, and keep its hidden states.

    One layer is in memory at a time. Interrupted, the same command continues with the layer where
    it was. The states belong to the checkpoint's weights, tokenizer and template and to the text;
    for anything else they are refused.
    """
    from quant_eval import pipeline
    from quant_eval.manifest import Manifest
    from quant_eval.reference_store import forget_reference

    console = stderr_console(quiet=quiet)
    if force:
        forget_reference(out)
    with _opened(checkpoint) as (opened, n_threads), progress(console) as on_progress:
        settings = settings_for(opened, n_tokens=tokens)
        binding = pipeline.bind(opened, Manifest(out), text, settings.n_tokens)
        pipeline.keep_reference(
            opened,
            out,
            binding,
            text,
            threads=threads or n_threads,
            on_progress=on_progress,
            calibration=calibration,
        )
    if as_json:
        typer.echo(json.dumps({"folder": str(out), **asdict(binding)}, indent=2))
    else:
        typer.echo(out)


@contextmanager
def _opened(reference: str) -> Iterator[tuple["Checkpoint", int]]:
    """The checkpoint, and how many threads suit its size."""
    from convert.checkpoint import Checkpoint
    from quant_eval import pipeline
    from qwq_local.hub import resolve_model

    hush_engines()
    with Checkpoint.open(resolve_model(reference)) as checkpoint:
        yield checkpoint, pipeline.engine_threads(checkpoint, None)


def _measured(
    checkpoint: "Checkpoint",
    paths: Sequence[Path],
    out: Path,
    ask: "Ask",
    threads: int,
    console: "Console",
) -> "list[Measured]":
    """All files measured; raises the first error."""
    from quant_eval import pipeline
    from quant_eval.manifest import Manifest

    with progress(console) as on_progress:
        measured, failures = pipeline.measure(
            checkpoint, paths, Manifest(out), ask, threads=threads, on_progress=on_progress
        )
    if failures:
        raise failures[0]
    return measured
