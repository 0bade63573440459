"""Curves for the page, a file each: the tail of KL, and the error by layer and kind of tensor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quant_eval.layers import KINDS, LayerErrors
from quant_eval.plot import draw_svg, plain
from quant_eval.results import Report, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82f6", "#10b981", "#f59e0b", "#ef4444", "#a855f7", "#06b6d4", "#84cc16", "#ec4899")
DASHES = ("-", "--", ":")
"""After as many files as there are colours they come again, dashed."""


def tail_plot(report: Report) -> str:
    """The share of tokens with some KL or more, as an SVG element; "" where no file has any."""
    names = short_names([file.name for file in report.files])
    tails = [
        (name, [(kl, share) for share, kl in file.kl_tail if kl > 0])
        for name, file in zip(names, report.files, strict=True)
    ]
    if not any(points for _, points in tails):
        return ""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        plain(axes)
        for index, (name, points) in enumerate(tails):
            axes.plot(
                [kl for kl, _ in points],
                [100 * share for _, share in points],
                label=name,
                color=_colour(index),
                linestyle=_dash(index),
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left=max(1e-9, axes.get_xlim()[0]))
        axes.set_xlabel("KL of a token, nats")
        axes.set_ylabel("tokens with that or more, %")
        _name_percent(axes)
        _legend(figure, axes)

    return draw_svg(draw, height=4.2)


def layers_plot(files: Sequence[tuple[str, LayerErrors]]) -> str:
    """Error behind each layer and by kind of linear, as an SVG element; "" where none has any."""
    with_error = [
        (index, name, errors)
        for index, (name, errors) in enumerate(files)
        if any(layer.so_far.value > 0 for layer in errors.layers)
    ]
    if not with_error:
        return ""

    def draw(figure: "Figure") -> None:
        by_layer, by_kind = figure.subplots(1, 2, width_ratios=(3, 2))
        for index, name, errors in with_error:
            colour, dash = _colour(index), _dash(index)
            by_layer.plot(
                [100 * layer.so_far.value for layer in errors.layers],
                label=name,
                color=colour,
                linestyle=dash,
                marker="." if len(errors.layers) < 20 else "",
            )
            parts = (errors.embedding.value, *map(errors.of_kind, KINDS), errors.output.value)
            by_kind.plot(
                [100 * part if part > 0 else float("nan") for part in parts],
                color=colour,
                linestyle="",
                marker="o" if dash == "-" else "D",
                alpha=0.85,
            )
        for axes in (by_layer, by_kind):
            plain(axes)
            axes.set_yscale("log")
            _name_percent(axes)
        by_layer.xaxis.get_major_locator().set_params(integer=True)
        by_layer.set_xlabel("layer")
        by_layer.set_ylabel("error behind the layer, %")
        titles = ("embedding", *(kind.removesuffix("_proj") for kind in KINDS), "output")
        by_kind.set_xticks(range(len(titles)), titles, rotation=45, ha="right")
        by_kind.set_ylabel("added alone, %")
        _legend(figure, by_layer)

    return draw_svg(draw, height=4.2)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _dash(index: int) -> str:
    return DASHES[index // len(COLOURS) % len(DASHES)]


def _name_percent(axes: "Axes") -> None:
    """10, 1, 0.1 and not powers of ten; steps between them where few of them are in sight."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
