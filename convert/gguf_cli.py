"""`qwq convert gguf`: the plan, the bar and the results of a conversion, in words or JSON."""

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convert.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from convert.encode import QuantType
    from convert.gguf_export import GgufResult
    from convert.imatrix import Imatrix
    from convert.plan import FilePlan
    from convert.recipe import Recipe
    from convert.rounding import GptqRounding

SIZES = (
    "F32, F16, BF16 (unquantized); with bits per weight of QwQ-32B: Q8_0 8.5, Q6_K 6.6, "
    "Q5_K_M 5.7, Q5_K_S 5.5, Q5_1 6.0, Q5_0 5.5, Q4_K_M 4.8, Q4_K_S 4.6, Q4_1 5.0, Q4_0 4.6, "
    "IQ4_NL 4.6, IQ4_XS 4.3, Q3_K_L 4.2, Q3_K_M 3.9, Q3_K_S 3.5, IQ3_M 3.6, IQ3_S 3.5, Q2_K 3.0; "
    "with --imatrix alone: IQ3_XS 3.3, IQ3_XXS 3.1, Q2_K_S 2.8, IQ2_M 2.7, IQ2_S 2.5, IQ2_XS 2.4, "
    "IQ2_XXS 2.2"
)


def gguf_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with config.json, tokenizer.json and *.safetensors.")
    ],
    *,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            help=f"{SIZES}; or a recipe's file, NAME.toml. May be given several times "
            "(default: Q4_K_M).",
            show_default=False,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="Importance of the columns, from qwq calibrate or llama-imatrix (.gguf or .dat).",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder made by qwq calibrate: its imatrix, and its Hessians for --rounding gptq.",
            show_default=False,
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Choose the types that cost least within a device's memory, such as 24GiB, from "
            "a --calibration with sensitivities; the kv_cache and buffers count too.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(min=1, help="With --fit: tokens that the kv_cache is to hold.")
    ] = 32_768,
    kv_type: Annotated[
        str, typer.Option("--kv", "--kv-type", help="With --fit: the kv_cache's type, f16 or q8_0.")
    ] = "f16",
    margin: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --fit: what is to stay free (default: 512MiB).",
            show_default=False,
        ),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            help="nearest, as llama.cpp has it, or gptq: codes chosen together, with the Hessians."
        ),
    ] = "nearest",
    device: Annotated[
        str | None,
        typer.Option(
            help="Where --rounding gptq computes: cuda, mps or cpu (default: the best there is).",
            show_default=False,
        ),
    ] = None,
    tensor_types: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="PATTERN=TYPE",
            help="A type for the tensors in whose GGUF name the regular expression is found, as in "
            "'blk\\.0\\.ffn_down=Q8_0'. May be given several times; the first match decides.",
            show_default=False,
        ),
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(help="The type of the embeddings.", show_default=False)
    ] = None,
    output_type: Annotated[
        str | None, typer.Option(help="The type of the output matrix.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="The file, for one type and a name ending in .gguf; else the folder, with files "
            "named MODEL-TYPE.gguf (default: models/MODEL).",
            show_default=False,
        ),
    ] = None,
    split_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Split into files of at most this size, such as 4GB, named "
            "NAME-00001-of-0000N.gguf; readers are given the first.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Encoder threads (default: all cores).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that exist, unfinished ones too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show errors alone.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show the plan tensor by tensor.")
    ] = False,
) -> None:
    """Write GGUF files for llama.cpp and everything built on it.

    The checkpoint is read once, whatever the number of types; there is no intermediate file.
    A file gets its name when it is complete and was read back. Interrupted, the same command
    continues where it was.
    """
    from rich.console import Console

    from convert.budget_cli import FitOptions, fit_recipe, parse_nbytes
    from convert.checkpoint import Checkpoint
    from convert.encode import n_cores
    from convert.gguf_estimate import estimate_export, n_slices_ahead
    from convert.gguf_export import check_outputs
    from convert.gguf_report import plan_document, result_document, show_estimate, show_plans
    from convert.recipe_file import load_recipe, with_overrides
    from convert.rounding_report import rounding_lines

    console = Console(stderr=True, quiet=quiet, highlight=False)
    n_threads = threads or n_cores()
    documents: dict[str, object] = {}  # of what chooses types and codes, for --json
    if fit is not None:
        chosen = (types, tensor_types, token_embedding_type, output_type)
        _check_fit(fit, calibration, type_is_given=any(one is not None for one in chosen))
    with Checkpoint.open(checkpoint) as opened:
        if calibration is not None:
            imatrix = _imatrix_of(calibration, imatrix)
        importance = (
            None
            if imatrix is None
            else _read_imatrix(imatrix, opened, console, limit=None if verbose else 8)
        )
        if fit is not None and calibration is not None and importance is not None:
            options = FitOptions(fit, context, kv_type, margin)
            recipe, predicted = fit_recipe(
                opened, calibration, importance, options, console=console, n_threads=n_threads
            )
            recipes, documents = [recipe], {"fit": predicted}
        else:
            recipes = [
                with_overrides(
                    load_recipe(name),
                    tensor_types=tensor_types or (),
                    token_embedding_type=token_embedding_type,
                    output_type=output_type,
                )
                for name in types or ["Q4_K_M"]
            ]
        rounder = _rounder(opened, recipes, importance, calibration, rounding, device)
        plans = _plan(
            opened,
            recipes,
            importance,
            out,
            row_source=rounder,
            split_nbytes=None if split_size is None else parse_nbytes(split_size, "--split-size"),
        )
        n_ahead = n_slices_ahead(opened, plans, n_threads)
        if dry_run:
            estimate = estimate_export(opened, plans, n_threads=n_threads)
            if as_json:
                if rounder is not None:
                    documents["rounding"] = _rounding_plan(rounder, n_ahead)
                document = plan_document(opened, plans, estimate) | documents
                typer.echo(json.dumps(document, indent=2))
            else:
                show_plans(Console(highlight=False), opened, plans, tensors=True)
                show_estimate(Console(highlight=False), estimate)
                if rounder is not None:
                    _show_rounding(Console(highlight=False), rounder, n_ahead)
            return
        check_outputs(plans, force=force)
        if not quiet:
            show_plans(console, opened, plans, tensors=verbose)
            show_estimate(
                console, estimate_export(opened, plans, n_threads=n_threads, patience=0.02)
            )
        if rounder is not None:
            _show_rounding(console, rounder, n_ahead)
        start_s = time.monotonic()
        results = _export(opened, plans, console, threads=n_threads, force=force)
        elapsed_s = time.monotonic() - start_s
    if rounder is not None:
        choices = [choice for result in results for choice in result.choices]
        for line in (*rounding_lines(choices), *rounder.token_lines()):
            console.print(line, soft_wrap=True)
    console.print(
        f"{len(results)} written in {elapsed_s:.1f} s, {checkpoint} read once", soft_wrap=True
    )
    if as_json:
        if rounder is not None:
            documents["rounding"] = rounder.token_document()
        typer.echo(json.dumps(result_document(results, elapsed_s) | documents, indent=2))
    else:
        for result in results:
            typer.echo(result.path)


def _read_imatrix(
    path: Path, checkpoint: "Checkpoint", console: "Console", *, limit: int | None
) -> "Imatrix":
    """Read the file and say how it fits the checkpoint."""
    from convert.imatrix import match_imatrix, read_imatrix

    imatrix = read_imatrix(path)
    for line in match_imatrix(imatrix, checkpoint.model).lines(limit):
        console.print(line, soft_wrap=True)
    return imatrix


def _check_fit(fit: str, calibration: Path | None, *, type_is_given: bool) -> None:
    if calibration is None:
        raise UsageError(
            f"--fit {fit}: needs to know what matters; give the folder that "
            "`qwq calibrate --sensitivities` made as --calibration"
        )
    if type_is_given:
        raise UsageError(f"--fit {fit}: chooses all types; leave the options for types out")


def _imatrix_of(calibration: Path, imatrix: Path | None) -> Path:
    if imatrix is not None:
        raise UsageError(
            f"--imatrix {imatrix}: {calibration} brings its own; give one of the two options"
        )
    return calibration / "imatrix.gguf"


def _rounder(
    checkpoint: "Checkpoint",
    recipes: "list[Recipe]",
    imatrix: "Imatrix | None",
    calibration: Path | None,
    rounding: str,
    device: str | None,
) -> "GptqRounding | None":
    """What rounds with Hessians; None where each weight is rounded on its own."""
    if rounding == "nearest":
        return None
    if rounding != "gptq":
        raise UsageError(f"--rounding {rounding}: is neither nearest nor gptq; give one of them")
    if calibration is None:
        raise UsageError(
            "--rounding gptq: needs Hessians; give the folder that `qwq calibrate --hessians` made "
            "as --calibration"
        )
    from convert.calibrate import open_calibration
    from convert.layer_stream import find_device
    from convert.plan import plan_tensors
    from convert.rounding import GptqRounding

    wanted: dict[str, frozenset[QuantType]] = {}
    for recipe in recipes:
        for tensor in plan_tensors(checkpoint.model, recipe, imatrix=imatrix):
            wanted[tensor.name] = wanted.get(tensor.name, frozenset()) | {tensor.quant_type}
    return GptqRounding(
        checkpoint,
        open_calibration(calibration, checkpoint),
        wanted,
        device=find_device(device),
    )


def _show_rounding(console: "Console", rounder: "GptqRounding", n_ahead: int) -> None:
    """What the Hessians' rounding takes beside all else, which knows nothing of it."""
    from convert.estimate import estimated_seconds, format_duration
    from convert.files import format_nbytes

    estimate = rounder.estimate(n_ahead=n_ahead)
    console.print(
        f"GPTQ rounding: about {format_duration(estimated_seconds(estimate))} on this machine's "
        f"processor as it is now, {format_nbytes(estimate.peak_nbytes)} of memory",
        soft_wrap=True,
    )
    for line in rounder.token_lines():
        console.print(line, soft_wrap=True)


def _rounding_plan(rounder: "GptqRounding", n_ahead: int) -> dict[str, object]:
    from convert.estimate import estimated_seconds

    estimate = rounder.estimate(n_ahead=n_ahead)
    return rounder.token_document() | {
        "memory_nbytes": estimate.peak_nbytes,
        "duration_s": round(estimated_seconds(estimate), 1),
    }


def _plan(
    checkpoint: "Checkpoint",
    recipes: "list[Recipe]",
    imatrix: "Imatrix | None",
    out: Path | None,
    *,
    row_source: "GptqRounding | None",
    split_nbytes: int | None,
) -> "list[FilePlan]":
    from convert.plan import plan_file

    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise UsageError(f"--type {' '.join(names)}: a type is given twice; give each once")
    folder = Path("models") / checkpoint.name if out is None else out
    paths = [folder / f"{checkpoint.name}-{name}.gguf" for name in names]
    if folder.suffix == ".gguf":
        if len(recipes) > 1:
            raise UsageError(
                f"{folder}: is one file for {len(recipes)} types; give a folder with -o"
            )
        paths = [folder]
    return [
        plan_file(
            checkpoint,
            recipe,
            path,
            imatrix=imatrix,
            row_source=row_source,
            split_nbytes=split_nbytes,
        )
        for recipe, path in zip(recipes, paths, strict=True)
    ]


def _export(
    checkpoint: "Checkpoint",
    plans: "list[FilePlan]",
    console: "Console",
    *,
    threads: int,
    force: bool,
) -> "list[GgufResult]":
    """Show how far it is; Ctrl-C and SIGTERM end it with what to do then, and exit code 130."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from convert.gguf_export import export_planned

    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        converting = progress.add_task("converting", total=None)
        reading_back = progress.add_task("reading back", total=None, visible=False)

        def show(n_done: int, n_total: int) -> None:
            progress.update(converting, completed=n_done, total=n_total)

        def show_read_back(n_done: int, n_total: int) -> None:
            progress.update(reading_back, completed=n_done, total=n_total, visible=True)

        on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            return export_planned(
                checkpoint,
                plans,
                threads=threads,
                force=force,
                on_progress=show,
                on_read_back=show_read_back,
            )
        except KeyboardInterrupt:
            progress.stop()
            console.print("interrupted; the same command continues where it was")
            raise typer.Exit(130) from None
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)
