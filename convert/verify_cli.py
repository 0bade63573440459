"""`qwq verify`: every tensor of a GGUF file read and judged."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convert.errors import GgufError, QwqError

if TYPE_CHECKING:
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from convert.metadata_parity import Difference
    from convert.verify import TensorCheck

_REMEDY = "give the checkpoint it was made from, or convert it again"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Example: qwq verify models/QwQ-32B/QwQ-32B-Q4_K_M.gguf --source models/QwQ-32B"
)
def verify(
    file: Annotated[
        Path, typer.Argument(help="GGUF file, of several parts the first; or a GPTQ folder.")
    ],
    *,
    source: Annotated[
        Path | None,
        typer.Option(help="The checkpoint that it was made from.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads (default: all cores).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show errors alone.")] = False,
) -> None:
    """Read a GGUF file whole, ours or not, and name the first tensor that is wrong.

    Checked are the header, that every weight is a number, and the file's own list of hashes where
    it has one. With --source also that each tensor is as near to the checkpoint's as its type can
    be, and that sizes, tokens and template are the checkpoint's. Of a GPTQ folder every matrix is
    unpacked and held against the checkpoint's, and all else has to be the checkpoint's own.
    """
    from rich.console import Console

    from convert.checkpoint import Checkpoint
    from convert.gguf_parts import read_model
    from convert.metadata_parity import metadata_differences
    from convert.verify import listed_hashes

    console = Console(stderr=True, quiet=quiet, highlight=False, markup=False)
    if file.is_dir():
        _verify_folder(file, source, console, as_json=as_json)
        return
    model = read_model(file)
    with Checkpoint.open(source) if source is not None else nullcontext() as opened:
        differences = metadata_differences(model, opened) if opened is not None else []
        checks = _run(file, opened, threads, console)
    wrong = [check.message for check in checks if check.problem]
    wrong += [f"{file}: {one.key} {one.words}; {_REMEDY}" for one in differences if one.grave]
    if as_json:
        typer.echo(json.dumps(_document(checks, differences, sound=not wrong), indent=2))
    elif not wrong:
        _show(file, checks, has_hashes=bool(listed_hashes(model)))
    for message in wrong[1:]:
        console.print(f"also {message}", soft_wrap=True)
    for one in differences:
        if not one.grave:
            console.print(f"note: {one.key} {one.words}", soft_wrap=True)
    if wrong:
        raise GgufError(wrong[0])


def _verify_folder(folder: Path, source: Path | None, console: Console, *, as_json: bool) -> None:
    from convert.checkpoint import Checkpoint
    from convert.gptq_check import check_gptq
    from convert.gptq_folder import open_gptq
    from convert.metadata_parity import config_differences, tokenizer_differences

    gptq = open_gptq(folder)
    with Checkpoint.open(source) if source is not None else nullcontext() as opened:
        checks = list(check_gptq(gptq, opened))
        wrong = [f"{folder}: {one.name} {one.problem}; {_REMEDY}" for one in checks if one.problem]
        differences = []
        if opened is not None:
            if gptq.model is not None:
                differences += config_differences(gptq.model, opened.model)
            differences += tokenizer_differences(folder, opened)
    wrong += [f"{folder}: {one.key} {one.words}; {_REMEDY}" for one in differences if one.grave]
    errors = {one.name: one.relative_error for one in checks if one.relative_error is not None}
    if as_json:
        document = {"sound": not wrong, "bits": gptq.config.bits, "relative_errors": errors}
        typer.echo(json.dumps(document, indent=2))
    elif not wrong:
        largest = max(errors, key=errors.__getitem__, default=None)
        found = (
            "no --source was given: errors were not measured"
            if largest is None
            else f"{len(checks) - len(gptq.sizes)} other tensors are the checkpoint's, "
            f"the largest error is {errors[largest]:.1%}, in {largest}"
        )
        widths = " and ".join(sorted({str(bits) for bits, _ in gptq.sizes.values()}))
        typer.echo(f"{folder}: sound, {len(gptq.sizes)} matrices of {widths} bits; {found}")
    for message in wrong[1:]:
        console.print(f"also {message}", soft_wrap=True)
    for one in differences:
        if not one.grave:
            console.print(f"note: {one.key} {one.words}", soft_wrap=True)
    if wrong:
        raise QwqError(wrong[0])


def _run(
    file: Path, source: Checkpoint | None, threads: int | None, console: Console
) -> list[TensorCheck]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from convert.verify import verify_model

    columns = (BarColumn(None), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("")

        def show(n_done: int, n_bytes: int) -> None:
            progress.update(task, completed=n_done, total=n_bytes)

        return list(verify_model(file, source=source, threads=threads, on_progress=show))


def _show(file: Path, checks: list[TensorCheck], *, has_hashes: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from convert.files import format_nbytes
    from convert.verify import summarize_errors

    console = Console(highlight=False, markup=False, soft_wrap=True)
    nbytes = sum(check.tensor.nbytes for check in checks)
    hashes = "as its own hashes say" if has_hashes else "it lists no hashes"
    console.print(f"{file}: sound, {len(checks)} tensors, {format_nbytes(nbytes)}, {hashes}")
    summaries = summarize_errors(checks)
    if not summaries:
        console.print("no --source was given: errors were not measured")
        return
    table = Table("type", "tensors", "error", "largest", "in", box=None)
    for summary in summaries:
        table.add_row(
            summary.quant_type.name,
            str(summary.n_tensors),
            f"{summary.relative:.3%}",
            f"{summary.largest:.3%}",
            summary.largest_in,
        )
    console.print(table)


def _document(
    checks: list[TensorCheck], differences: list[Difference], *, sound: bool
) -> dict[str, object]:
    return {
        "sound": sound,
        "metadata": [
            {"key": one.key, "difference": one.words, "grave": one.grave} for one in differences
        ],
        "tensors": [
            {
                "file": str(check.path),
                "name": check.tensor.name,
                "type": check.tensor.quant_type.name,
                "shape": check.tensor.shape,
                "nbytes": check.tensor.nbytes,
                "sha256": check.sha256,
                "problem": check.problem,
            }
            | (
                {}
                if check.error is None
                else {
                    "relative_error": check.error.relative,
                    "worst_row": check.error.worst_row,
                    "scale": check.error.scale,
                }
            )
            for check in checks
        ],
    }
