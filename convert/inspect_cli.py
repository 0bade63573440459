"""`qwq inspect`: what a GGUF file is made of and says of itself, and what in it will surprise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from convert.gguf_parts import GgufModel

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: qwq inspect models/nano-qwq/nano-qwq-Q4_K_M.gguf")
def inspect(
    file: Annotated[Path, typer.Argument(help="GGUF file; of several parts the first.")],
    *,
    recipe: Annotated[
        bool,
        typer.Option("--recipe", help="Print the recipe it was made by, a TOML file for --type."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a GGUF file's sizes by type, its types by layer, its metadata, and warnings.

    Only the header is read, so it takes a moment whatever the file's size.
    """
    from convert.errors import QwqError
    from convert.gguf_parts import read_model
    from convert.provenance import RECIPE

    model = read_model(file)
    if recipe:
        text = model.metadata.get(RECIPE)
        if not isinstance(text, str):
            raise QwqError(f"{file}: says nothing of a recipe; only files of `qwq convert gguf` do")
        typer.echo(text, nl=False)
    elif as_json:
        typer.echo(json.dumps(_document(model), indent=2, ensure_ascii=True))
    else:
        _show(model)


def _show(model: GgufModel) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from convert.files import format_nbytes
    from convert.inspection import (
        bits_per_weight,
        printable,
        shown_value,
        type_shares,
        types_by_layer,
        warnings_of,
    )

    console = Console(highlight=False, markup=False, soft_wrap=True)
    n_parts = f", {len(model.parts)} parts" if len(model.parts) > 1 else ""
    bits = bits_per_weight(model)
    density = "" if bits is None else f", {bits:.2f} bits per weight"
    console.print(
        f"{model.path}: {format_nbytes(model.nbytes)}{n_parts}, {len(model.tensors)} tensors"
        f"{density}\n"
    )
    shares = Table("type", "tensors", "weights", "size", "bits per weight", box=None)
    for share in type_shares(model):
        shares.add_row(
            share.quant_type.name,
            f"{share.n_tensors:,}",
            f"{share.n_weights:,}",
            format_nbytes(share.nbytes),
            f"{share.bits_per_weight:.2f}",
        )
    console.print(shares)
    layers = Table("tensor", "types by layer", box=None)
    for role, types in types_by_layer(model).items():
        layers.add_row(Text(printable(role)), types)
    console.print()
    console.print(layers)
    metadata = Table("key", "value", box=None)
    metadata.columns[1].overflow = "fold"
    for key, value in model.metadata.items():
        metadata.add_row(Text(printable(key)), Text(shown_value(value)))
    console.print()
    console.print(metadata)
    warnings = warnings_of(model)
    console.print("\nwarnings: none" if not warnings else "")
    for warning in warnings:
        console.print(f"warning: {warning}")


def _document(model: GgufModel) -> dict[str, object]:
    from convert.inspection import (
        bits_per_weight,
        json_value,
        type_shares,
        types_by_layer,
        warnings_of,
    )

    bits = bits_per_weight(model)
    return {
        "files": [str(part.path) for part in model.parts],
        "nbytes": model.nbytes,
        "bits_per_weight": None if bits is None else round(bits, 4),
        "types": [
            {
                "type": share.quant_type.name,
                "n_tensors": share.n_tensors,
                "n_weights": share.n_weights,
                "nbytes": share.nbytes,
            }
            for share in type_shares(model)
        ],
        "types_by_layer": types_by_layer(model),
        "metadata": {key: json_value(value) for key, value in model.metadata.items()},
        "warnings": warnings_of(model),
    }
