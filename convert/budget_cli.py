"""`qwq convert gguf --fit`: what a size leaves for weights, and the mix that is chosen."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from convert.budget import Fit, Mix
    from convert.checkpoint import Checkpoint
    from convert.imatrix import Imatrix
    from convert.recipe import Recipe


@dataclass(frozen=True, slots=True)
class FitOptions:
    """What was asked for, as it was written."""

    size: str
    context: int
    kv_type: str
    margin: str | None

    @property
    def name(self) -> str:
        """Of the recipe, and in the file's name."""
        return f"fit-{''.join(self.size.split())}-{self.context}-{self.kv_type}"


def parse_nbytes(text: str, option: str) -> int:
    """Bytes from a number with K, M, G or T, in powers of ten, or with Ki to Ti, in powers of two.

    option: as which the text was given.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(I?)B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{option} {text}: is no size; give one such as 4GB or 500MiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2])))


def fit_recipe(
    checkpoint: "Checkpoint",
    calibration: Path,
    imatrix: "Imatrix",
    options: FitOptions,
    *,
    console: "Console",
    n_threads: int,
) -> "tuple[Recipe, dict[str, object]]":
    """The recipe of the best mix that fits, after saying what it is; and the same as JSON values.

    Raises QwqError where nothing fits, and where the calibration lacks what is needed.
    """
    from rich.progress import Progress

    from convert.budget import fit, measure_costs, recipe_of
    from convert.calibrate import open_calibration
    from convert.files import format_nbytes
    from convert.memory import MARGIN_NBYTES, share_out
    from convert.recipe import RECIPES

    margin = options.margin
    room = share_out(
        checkpoint.model,
        parse_nbytes(options.size, "--fit"),
        context=options.context,
        kv_type=options.kv_type,
        margin_nbytes=MARGIN_NBYTES if margin is None else parse_nbytes(margin, "--margin"),
    )
    console.print(
        f"{options.size}: {format_nbytes(room.kv_cache)} for a kv_cache of {options.context:,} "
        f"tokens in {options.kv_type}, {format_nbytes(room.compute)} for buffers, "
        f"{format_nbytes(room.margin)} left free, "
        f"{format_nbytes(max(0, room.weights))} for weights",
        soft_wrap=True,
    )
    open_calibration(calibration, checkpoint)  # of this checkpoint, or an error
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task("what each type costs")
        costs = measure_costs(
            checkpoint,
            calibration,
            imatrix,
            n_threads=n_threads,
            on_progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    found = fit(checkpoint.model, costs, room.weights, imatrix, name=options.name)
    _show(console, found)
    base = RECIPES["Q4_K_M" if found.stock is None else found.stock.name]
    recipe = recipe_of(found.mix, base, about="; ".join(_predictions(found)))
    return recipe, _document(found, room.weights)


def _show(console: "Console", found: "Fit") -> None:
    from rich.table import Table

    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for gguf_name, quant_type in found.mix.types.items():
        kinds[gguf_name.removesuffix(".weight").rpartition(".")[2]][quant_type.name] += 1
    table = Table("tensor", "chosen types", box=None)
    for role, counts in kinds.items():
        table.add_row(role, ", ".join(f"{n} {name}" for name, n in counts.most_common()))
    console.print(table)
    for line in _predictions(found):
        console.print(line, soft_wrap=True)


def _predictions(found: "Fit") -> list[str]:
    """What each mix is predicted to cost, and the gain where both have the same size."""
    from convert.files import format_nbytes

    mix, stock, same_size = found.mix, found.stock, found.of_stock_size
    lines = [
        f"{mix.name}: {format_nbytes(mix.nbytes)} of weights, {mix.divergence:.2g} nats a token"
    ]
    if stock is not None and same_size is not None and found.share is not None:
        lines.append(
            f"{stock.name}, the largest stock mix that fits: {format_nbytes(stock.nbytes)}, "
            f"{stock.divergence:.2g} nats; types chosen for its size: {same_size.divergence:.2g} "
            f"nats, {found.share:.2f} of that"
        )
    return lines


def _document(found: "Fit", max_nbytes: int) -> dict[str, object]:
    def described(mix: "Mix | None") -> dict[str, object] | None:
        if mix is None:
            return None
        return {"name": mix.name, "nbytes": mix.nbytes, "predicted_kl_nats": mix.divergence}

    return {
        "max_nbytes": max_nbytes,
        "mix": described(found.mix),
        "stock": described(found.stock),
        "of_stock_size": described(found.of_stock_size),
        "predicted_share_of_stock": found.share,
    }
