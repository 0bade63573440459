"""`qwq calibrate`: a checkpoint in, the statistics of its linears' inputs out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convert.estimate import format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from convert.calibrate import CalibrationPlan, Progress
    from convert.calibration import Conversation, Passage

    Generate = Callable[[str | None, Sequence[Conversation], int], Iterator[Conversation]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Example: qwq calibrate models/QwQ-32B -o calibration, then "
    "qwq convert gguf models/QwQ-32B --type IQ4_XS --imatrix calibration/imatrix.gguf"
)
def calibrate(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with config.json, tokenizer.json and *.safetensors.")
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="The folder to write (default: models/MODEL/calibration).",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON Lines, Parquet or plain text to calibrate on; may be given several times "
            "(default: the built-in conversations).",
            show_default=False,
        ),
    ] = None,
    self_generated: Annotated[
        int,
        typer.Option(
            "--self-generate",
            min=0,
            help="Let a model write its own thoughts and answers on this many prompts of the text.",
        ),
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="With --self-generate: what writes them, such as a GGUF file of this checkpoint "
            "(default: what was quantized last under ./models).",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Use this many tokens; the time grows with them (default: all of --text, and "
            "262144 of the built-in conversations).",
            show_default=False,
        ),
    ] = None,
    hessians: Annotated[
        bool, typer.Option("--hessians", help="Keep whole Hessians too, for --rounding gptq.")
    ] = False,
    hessian_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens for the Hessians, an eighth of them held out.")
    ] = 16_384,
    sensitivities: Annotated[
        bool,
        typer.Option("--sensitivities", help="Keep how much each matrix matters too, for --fit."),
    ] = False,
    sensitivity_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens for the sensitivities.")
    ] = 4096,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Conversations or text that ride along: their final hidden states are kept for "
            "`qwq eval reference --calibration`.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cuda, mps or cpu (default: the best there is).", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that exists, finished or not.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it would take and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show errors alone.")] = False,
) -> None:
    """Measure what every linear of a checkpoint reads, for imatrix files and GPTQ.

    One layer is in memory while the next is read, and a batch of hidden states.
    All others lie in a file beside the output, kept in memory as far as they fit.
    Interrupted, the same command continues where it was.
    """
    from rich.console import Console

    from convert.calibrate import CalibrationSettings, describe, plan_calibration
    from convert.calibrate import calibrate as run
    from convert.checkpoint import Checkpoint
    from convert.files import refuse_existing
    from convert.layer_stream import find_device
    from convert.passages import BUILT_IN_TOKENS, load_all_passages, load_pieces

    console = Console(stderr=True, quiet=quiet, highlight=False)
    settings = CalibrationSettings(
        n_tokens=tokens if tokens or text else BUILT_IN_TOKENS,
        hessians=hessians,
        n_hessian_tokens=hessian_tokens,
        sensitivities=sensitivities,
        n_sensitivity_tokens=sensitivity_tokens,
    )
    chosen = find_device(device)
    with Checkpoint.open(checkpoint) as opened:
        target = out or Path("models") / opened.name / "calibration"
        if not dry_run:
            refuse_existing(target, force=force)
        passages = load_all_passages(text, opened.model.vocab_size)
        if self_generated and not dry_run:
            kept = target.with_name(f"{target.name}.self-generated.jsonl")
            passages = _self_generated(passages, self_generated, kept, console, context.obj, model)
        plan = plan_calibration(
            opened,
            target,
            passages=passages,
            settings=settings,
            evaluation=[] if evaluation is None else load_pieces(evaluation),
        )
        document = describe(plan.result) | {"path": str(target), "disk_nbytes": plan.disk_nbytes}
        if dry_run and as_json:
            typer.echo(json.dumps(document, indent=2))
            return
        _show_plan(Console(highlight=False) if dry_run else console, plan, device=chosen)
        if dry_run:
            return
        start_s = time.monotonic()
        with _bars(console, plan.result.n_layers) as (on_progress, on_sensitivities):
            result = run(
                plan,
                device=chosen,
                force=force,
                on_progress=on_progress,
                on_sensitivities=on_sensitivities,
            )
    elapsed_s = time.monotonic() - start_s
    console.print(f"{result.n_layers} layers in {format_duration(elapsed_s)}")
    document["elapsed_s"] = round(elapsed_s, 3)
    typer.echo(json.dumps(document, indent=2) if as_json else result.path)


def _self_generated(
    passages: list[Passage],
    n: int,
    path: Path,
    console: Console,
    generate: Generate,
    model: str | None,
) -> list[Passage]:
    """The passages, with a model's own replies in the first n conversations without tools.

    path: keeps them as they come, so that the same command continues after an interruption.
    """
    from convert.calibration import Conversation, load_conversations
    from convert.errors import QwqError, UsageError

    places = [
        i for i, one in enumerate(passages) if isinstance(one, Conversation) and not one.tools
    ]
    if len(places) < n:
        raise UsageError(
            f"--self-generate {n}: the text has {len(places)} prompts without tools; ask for fewer"
        )
    prompts = [one for one in (passages[i] for i in places[:n]) if isinstance(one, Conversation)]
    done = load_conversations(path)[:n] if path.is_file() else []
    if [one.messages for one in done] != [one.messages for one in prompts[: len(done)]]:
        raise QwqError(f"{path}: holds replies to other prompts; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for one in generate(model, prompts[len(done) :], len(done)) if len(done) < n else ():
            done.append(one)
            record = {
                "kind": one.kind,
                "messages": one.messages,
                "reasoning": one.reasoning,
                "answer": one.answer,
                **({"is_cut": True} if one.is_cut else {}),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            cut = " (cut: it did not come to an end)" if one.is_cut else ""
            console.print(f"self-generated: {len(done)} of {n}{cut}")
    replies = dict(zip(places, done, strict=False))
    return [replies.get(i, one) for i, one in enumerate(passages)]


def _show_plan(console: Console, plan: CalibrationPlan, *, device: str) -> None:
    from convert.estimate import estimated_seconds
    from convert.files import format_nbytes, free_space, missing_nbytes
    from convert.hessian import too_few_tokens

    result, estimate = plan.result, plan.estimate()
    console.print(
        f"{result.path}: {result.n_tokens:,} tokens (set {result.calibration_sha256[:12]}) through "
        f"{result.n_layers} layers on {device}",
        soft_wrap=True,
    )
    if plan.settings.hessians:
        n_columns = plan.checkpoint.model.intermediate_size
        console.print(
            f"Hessians of {result.n_fitted:,} tokens, {result.n_fitted / n_columns:.1f} for each "
            f"of up to {n_columns:,} columns, judged by {result.n_held_out:,} held out",
            soft_wrap=True,
        )
        if warning := too_few_tokens(result.n_fitted, n_columns):
            console.print(warning, soft_wrap=True)
    if result.n_sampled:
        console.print(
            f"sensitivities of all matrices, on {result.n_sampled:,} tokens, forward and back",
            soft_wrap=True,
        )
    n_missing = missing_nbytes(result.path, plan.disk_nbytes)
    console.print(
        f"disk: {format_nbytes(n_missing)} needed"
        + (" beside what is done of it" if n_missing < plan.disk_nbytes else "")
        + f", {format_nbytes(free_space(result.path))} free; up to "
        f"{format_nbytes(plan.states_nbytes)} are hidden states, read batch by batch and removed "
        "at the end",
        soft_wrap=True,
    )
    duration = format_duration(estimated_seconds(estimate, device))
    console.print(
        f"memory: {format_nbytes(estimate.peak_nbytes)} beside torch's own; "
        f"time: about {duration} on {device} as it is now"
        + ("" if device == "cpu" else ", and what reading the checkpoint takes longer"),
        soft_wrap=True,
    )


@contextmanager
def _bars(console: Console, n_layers: int) -> Iterator[tuple[Progress, Progress]]:
    """A bar with the layer, tokens a second through all layers, and the time left; then another."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(None), TextColumn("{task.description}"))
    with Bars(*columns, console=console, disable=console.quiet, transient=True) as bars:
        statistics = bars.add_task("")
        sensitivities = bars.add_task("sensitivities", visible=False)
        statistics_pace, sensitivities_pace = _Pace(console.get_time), _Pace(console.get_time)

        def show(done: int, total: int) -> None:
            description = f"layer {min(done * n_layers // total + 1, n_layers)} of {n_layers}"
            if rate := statistics_pace.rate(done):
                tokens = rate / n_layers
                description += f", {tokens:{',.0f' if tokens >= 10 else '.2g'}} tokens/s"
                description += f", {format_duration((total - done) / rate)} left"
            bars.update(statistics, completed=done, total=total, description=description)

        def show_sensitivities(done: int, total: int) -> None:
            description = f"sensitivities, step {done} of {total}"
            if rate := sensitivities_pace.rate(done):
                description += f", {format_duration((total - done) / rate)} left"
            bars.update(
                sensitivities, completed=done, total=total, description=description, visible=True
            )

        yield show, show_sensitivities


class _Pace:
    """How fast work goes, over all the time since it was first heard of, however far it was then.

    A bar's own estimate looks back half a minute, and a single batch can take that long.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def rate(self, done: int) -> float:
        """Of what is done, a second; 0 when first asked."""
        if self._first is None:
            self._first = done, self._clock()
        n_before, start_s = self._first
        return (done - n_before) / max(self._clock() - start_s, 1e-3)
