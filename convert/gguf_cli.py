"""`qwq convert gguf`: the plan, the bar and the results of a conversion, in words or JSON."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convert.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from convert.gguf_export import GgufResult
    from convert.imatrix import Imatrix
    from convert.plan import FilePlan
    from convert.recipe import Recipe

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
    threads: Annotated[
        int | None, typer.Option(min=1, help="Encoder threads (default: all cores).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
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
    A file gets its name when it is complete: after an error nothing half-written is left.
    """
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from convert.gguf_export import check_outputs
    from convert.recipe_file import load_recipe, with_overrides

    console = Console(stderr=True, quiet=quiet, highlight=False)
    with Checkpoint.open(checkpoint) as opened:
        recipes = [
            with_overrides(
                load_recipe(name),
                tensor_types=tensor_types or (),
                token_embedding_type=token_embedding_type,
                output_type=output_type,
            )
            for name in types or ["Q4_K_M"]
        ]
        importance = (
            None
            if imatrix is None
            else _read_imatrix(imatrix, opened, console, limit=None if verbose else 8)
        )
        plans = _plan(opened, recipes, importance, out)
        if dry_run:
            if as_json:
                typer.echo(json.dumps(_plan_document(plans), indent=2))
            else:
                _show_plans(Console(highlight=False), plans, tensors=True)
            return
        check_outputs(plans, force=force)
        _show_plans(console, plans, tensors=verbose)
        start_s = time.monotonic()
        results = _export(opened, plans, console, threads=threads, force=force)
        elapsed_s = time.monotonic() - start_s
    console.print(f"{len(results)} written in {elapsed_s:.1f} s, {checkpoint} read once")
    if as_json:
        document = {
            "elapsed_s": round(elapsed_s, 3),
            "files": [_result_document(result) for result in results],
        }
        typer.echo(json.dumps(document, indent=2))
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


def _plan(
    checkpoint: "Checkpoint",
    recipes: "list[Recipe]",
    imatrix: "Imatrix | None",
    out: Path | None,
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
        plan_file(checkpoint, recipe, path, imatrix=imatrix)
        for recipe, path in zip(recipes, paths, strict=True)
    ]


def _export(
    checkpoint: "Checkpoint",
    plans: "list[FilePlan]",
    console: "Console",
    *,
    threads: int | None,
    force: bool,
) -> "list[GgufResult]":
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    from convert.gguf_export import export_planned

    columns = (
        BarColumn(None),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("")

        def show(n_done: int, n_weights: int) -> None:
            progress.update(task, completed=n_done, total=n_weights)

        return export_planned(checkpoint, plans, threads=threads, force=force, on_progress=show)


def _show_plans(console: "Console", plans: "list[FilePlan]", *, tensors: bool) -> None:
    from rich.table import Table

    from convert.files import format_nbytes, free_space

    for plan in plans:
        if tensors:
            table = Table("tensor", "shape", "type", "bytes", box=None)
            for tensor in plan.tensors:
                shape = " x ".join(map(str, tensor.shape))
                table.add_row(tensor.gguf_name, shape, tensor.quant_type.name, f"{tensor.nbytes:,}")
            console.print(table)
        for tensor in plan.tensors:
            if tensor.note:
                console.print(f"{tensor.gguf_name}: {tensor.quant_type.name}, since {tensor.note}")
    table = Table("type", "size", "bits per weight", "tensors", "file", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for plan in plans:
        counts = Counter(tensor.quant_type.name for tensor in plan.tensors)
        mix = ", ".join(f"{n} {name}" for name, n in counts.most_common())
        size, bits = format_nbytes(plan.nbytes), f"{plan.bits_per_weight:.2f}"
        table.add_row(plan.recipe.name, size, bits, mix, str(plan.path))
    console.print(table)
    needed, free = sum(plan.nbytes for plan in plans), free_space(plans[0].path.parent)
    console.print(f"disk: {format_nbytes(needed)} needed, {format_nbytes(free)} free")


def _plan_document(plans: "list[FilePlan]") -> dict[str, object]:
    return {
        "files": [
            {
                "path": str(plan.path),
                "type": plan.recipe.name,
                "nbytes": plan.nbytes,
                "n_weights": plan.n_weights,
                "bits_per_weight": round(plan.bits_per_weight, 4),
                "tensors": [
                    {
                        "name": tensor.gguf_name,
                        "shape": tensor.shape,
                        "type": tensor.quant_type.name,
                        "nbytes": tensor.nbytes,
                        "note": tensor.note,
                    }
                    for tensor in plan.tensors
                ],
            }
            for plan in plans
        ]
    }


def _result_document(result: "GgufResult") -> dict[str, object]:
    return {
        "path": str(result.path),
        "type": result.recipe_name,
        "nbytes": result.nbytes,
        "n_weights": result.n_weights,
        "bits_per_weight": round(result.bits_per_weight, 4),
    }
