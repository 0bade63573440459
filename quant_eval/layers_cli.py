"""`qwq eval layers`: where a file's error comes from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant_eval.options import AsJson, Quiet, ReferenceOption, Text, Threads
from quant_eval.terminal import hush_engines, progress, stderr_console, stdout_console

if TYPE_CHECKING:
    from rich.table import Table

    from quant_eval.layers import LayerErrors


def layers(
    file: Annotated[Path, typer.Argument(help="GGUF file or GPTQ folder.")],
    *,
    reference: ReferenceOption,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for the plot and for what was measured.")
    ] = Path("evaluation"),
    tokens: Annotated[
        int, typer.Option(min=1, help="Reply tokens to follow, at most; whole conversations.")
    ] = 512,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    text: Text = None,
) -> None:
    """Show the error that each layer and each kind of tensor adds to the hidden states.

    The file's weights run beside the checkpoint's, one layer in memory at a time. A later `qwq eval
    run` into the same folder has it in its report.
    """
    from convert.checkpoint import Checkpoint
    from convert.errors import QwqError
    from convert.files import replacing_file
    from quant_eval import pipeline
    from quant_eval.curves import layers_plot
    from quant_eval.manifest import Manifest
    from quant_eval.results import EvaluationSettings, to_json
    from qwq_local.hub import resolve_model

    hush_engines()
    if not file.exists():
        raise QwqError(f"{file}: no such file or folder; check the path")
    console = stderr_console(quiet=quiet)
    with (
        Checkpoint.open(resolve_model(reference)) as checkpoint,
        progress(console) as on_progress,
    ):
        errors = pipeline.errors_by_layer(
            checkpoint,
            file,
            Manifest(out),
            pipeline.Ask(EvaluationSettings(), text),
            n_tokens=tokens,
            threads=pipeline.engine_threads(checkpoint, threads),
            on_progress=on_progress,
        )
    assert errors is not None
    if as_json:
        typer.echo(json.dumps(to_json(errors), indent=2))
    else:
        stdout_console().print(_table(file.name, errors))
    if svg := layers_plot([(file.name.removesuffix(".gguf"), errors)]):
        plot = out / f"{file.name}-layers.svg"
        with replacing_file(plot, force=True) as drawn:
            drawn.write(svg.encode())
        console.print(f"plot: {plot}", soft_wrap=True)


def _table(name: str, errors: "LayerErrors") -> "Table":
    """A row a layer, in percent."""
    from rich import box
    from rich.table import Table

    from quant_eval.layers import KINDS

    table = Table(
        title=f"{name}: error of the hidden states, % of their size",
        caption="so far: behind this layer, all up to here from the file, ± one standard error; "
        "added: this layer alone; then one linear alone\n"
        f"{errors.n_tokens:,} tokens of {errors.n_passages} passages; output: of the logits, "
        "by the output matrix alone",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("layer", justify="right", no_wrap=True)
    for title in ("so far", "", "added", *(kind.removesuffix("_proj") for kind in KINDS)):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row("embedding", _percent(errors.embedding.value))
    for index, layer in enumerate(errors.layers):
        spread = layer.so_far.standard_error
        kinds = (layer.by_kind[kind].value for kind in KINDS)
        table.add_row(
            str(index),
            f"{100 * layer.so_far.value:.3g}",
            "" if spread is None else f"±{_percent(spread)}",
            *(_percent(value) for value in (layer.added.value, *kinds)),
        )
    table.add_row("all, RMS", "", "", "", *(_percent(errors.of_kind(kind)) for kind in KINDS))
    table.add_row("output", _percent(errors.output.value))
    return table


def _percent(share: float) -> str:
    """In two digits, so that a line has room on a terminal of 80 columns."""
    return f"{100 * share:.2g}" if share < 1 else f"{100 * share:.0f}"
