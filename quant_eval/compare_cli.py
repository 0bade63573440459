"""`qwq eval compare`: two models side by side, files or servers."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from convert.errors import QwqError, UsageError
from quant_eval.options import (
    AsJson,
    AtOnce,
    BaseUrl,
    FileReference,
    Files,
    Floors,
    MaxTokens,
    Needles,
    Out,
    Problems,
    Quiet,
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
from quant_eval.terminal import hush_engines, progress, stderr_console, stdout_console

if TYPE_CHECKING:
    from quant_eval.measurement import Measured

CONFIDENCE = 0.95


def compare(
    files: Files = None,
    *,
    reference: FileReference = None,
    floor: Floors = None,
    base_url: BaseUrl = None,
    at_once: AtOnce = 8,
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
    reply_seed: ReplySeed = None,
) -> None:
    """Show how two models differ: paired differences with 95 % confidence intervals.

    Two files, a file and a server, or two servers; the second is held against the first. Of
    servers the tasks alone can be asked. Beside each number against the reference stands that of
    the 16-bit file.
    """
    from convert.checkpoint import Checkpoint
    from quant_eval import pipeline
    from quant_eval.manifest import Manifest
    from quant_eval.rows import find_floor
    from quant_eval.sizes import check_unquantized
    from qwq_local.hub import resolve_model

    hush_engines()
    paths, servers = files or [], [pipeline.Server(url, at_once) for url in base_url or ()]
    if len(paths) + len(servers) != 2:
        raise UsageError(
            f"compare: {len(paths)} files and {len(servers)} servers are given and two models are "
            "compared; name two files, or servers with --base-url"
        )
    if floor and servers:
        raise UsageError("--floor: is for numbers that a server does not show; leave it out")
    for each in floor or ():
        check_unquantized(each)
    if paths and reference is None:
        raise UsageError("compare: files need the checkpoint they were made from; give --reference")
    with ExitStack() as stack:
        checkpoint = None
        if reference is not None:
            checkpoint = stack.enter_context(Checkpoint.open(resolve_model(reference)))
        settings = settings_for(
            checkpoint if paths else None,
            tasks,
            needles,
            n_tokens=tokens,
            n_problems=problems,
            n_task_problems=task_problems,
            n_replies=replies,
            max_tokens=max_tokens,
            seed=seed,
            reply_seed=reply_seed,
        )
        ask = pipeline.Ask(settings, text, states, tuple(tasks or ()), tuple(floor or ()))
        on_progress = stack.enter_context(progress(stderr_console(quiet=quiet)))
        measured: list[Measured] = []
        noise: list[Measured] = []
        failures: list[QwqError] = []
        if checkpoint is not None and paths:
            n_threads = pipeline.engine_threads(checkpoint, threads)
            measured, failures = pipeline.measure(
                checkpoint, paths, Manifest(out), ask, threads=n_threads, on_progress=on_progress
            )
            if not failures:
                noise, failures = pipeline.measure_floors(
                    checkpoint, Manifest(out), ask, threads=n_threads, on_progress=on_progress
                )
        if not failures:
            replied, failures = pipeline.measure_servers(
                servers, Manifest(out), ask, checkpoint=checkpoint, on_progress=on_progress
            )
            measured += replied
    if failures:
        raise failures[0]
    first, second = measured
    floors = {
        one.engine: find_floor([*noise, first, second], one.engine) for one in (first, second)
    }
    rows = differences(first, second, floors)
    if not rows:
        raise UsageError(
            f"compare: nothing is known of both {first.name} and {second.name}, and of a server "
            "the tasks alone can be; give --problems or --task"
        )
    if as_json:
        names = {"first": first.name, "second": second.name}
        typer.echo(json.dumps({"confidence": CONFIDENCE, **names, "differences": rows}, indent=2))
    else:
        unknown = [one for one, floor in floors.items() if floor is None]
        _print_differences(rows, first.name, second.name, unknown)


def differences(
    first: "Measured", second: "Measured", floors: "Mapping[str, Measured | None] | None" = None
) -> list[dict[str, Any]]:
    """A row for each quantity that both have on the same passages or problems.

    floors: the 16-bit files by engine; what is held against the reference has the number of the
    first's as "floor", and that of the second's as "second_floor" where its engine is another.
    """
    from quant_eval.metrics import metrics_among, noise_of, samples_of, tails_of
    from quant_eval.paired import paired_difference

    tails = tails_of(first)
    before, after = samples_of(first, tails), samples_of(second, tails)
    known = {engine: noise_of(floor, tails) for engine, floor in (floors or {}).items() if floor}
    noise, other = known.get(first.engine, {}), known.get(second.engine, {})
    if second.engine == first.engine:
        other = {}
    rows: list[dict[str, Any]] = []
    for name, metric in metrics_among(before.keys() & after.keys()).items():
        difference = paired_difference(before[name], after[name], of_shares=metric.of_replies)
        means = before[name].mean, after[name].mean
        if difference is None or means[0] is None or means[1] is None:
            continue
        low, high = difference.interval(CONFIDENCE)
        worse, better = (high < 0, low > 0) if metric.more_is_better else (low > 0, high < 0)
        rows.append(
            {
                "name": name,
                "title": metric.title,
                "first": means[0].value,
                "second": means[1].value,
                "difference": difference.value,
                "low": low if math.isfinite(low) else None,
                "high": high if math.isfinite(high) else None,
                "n": difference.n,
                "verdict": "worse" if worse else "better" if better else "",
                **({"floor": noise[name]} if name in noise else {}),
                **({"second_floor": other[name]} if name in other else {}),
            }
        )
    return rows


def _print_differences(
    rows: Sequence[dict[str, Any]], first: str, second: str, unknown: Sequence[str]
) -> None:
    """unknown: engines whose noise was not measured."""
    from rich import box
    from rich.table import Table

    from quant_eval.report import unknown_noise

    caption = "paired by passage and problem"
    if any("floor" in row or "second_floor" in row for row in rows):
        caption += "\nin brackets: of the 16-bit file, the noise of the path itself"
    if any(row["name"] == "kl" for row in rows):
        for engine in unknown:
            caption += f"\n{unknown_noise(engine)} as --floor"
    table = Table(
        title=f"{second} against {first}",
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for title in ("first", "second", "differ-\nence", "95 %\ninterval", "n"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("second\nis")
    for row in rows:
        low, high = row["low"], row["high"]
        table.add_row(
            row["title"],
            *(
                f"{row[side]:.3g}" + (f"\n({row[floor]:.3g})" if floor in row else "")
                for side, floor in (("first", "floor"), ("second", "second_floor"))
            ),
            f"{row['difference']:.3g}",
            "" if low is None or high is None else f"{low:.3g} to\n{high:.3g}",
            str(row["n"]),
            row["verdict"],
        )
    stdout_console().print(table)
