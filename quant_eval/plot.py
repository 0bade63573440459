"""Drawing for a page whose text colour it takes; and the first plot, mean KL against size."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from quant_eval.divergence import Estimate
from quant_eval.results import Report, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENGINE_STYLES = {"llama.cpp": ("o", "#3b82f6"), "transformers": ("s", "#f59e0b")}
OTHER_STYLE = ("D", "#10b981")
INK = "#010203"  # stands for the page's text colour until the plot is in the page
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qwq-local",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# where a name may stand, in points from its mark: beside it first, then above and below
LABEL_PLACES = ((9, 3), (-9, 3), (0, 10), (0, -18), (9, -12), (-9, -12), (9, 14), (-9, 14))


@dataclass(frozen=True, slots=True)
class _Point:
    name: str
    engine: str
    size: float
    kl_nats: Estimate

    def beats(self, other: "_Point") -> bool:
        """Whether it is no larger and no further from the reference, and one of them is less."""
        mine = self.size, self.kl_nats.value
        theirs = other.size, other.kl_nats.value
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def kl_plot(report: Report) -> str:
    """Mean KL against size as an SVG element; "" where no file has a KL. Same input, same text."""
    names = short_names([file.name for file in report.files])
    sizes = [file.nbytes or 0 for file in report.files]
    unit, unit_nbytes = ("GB", 1e9) if max(sizes, default=0) >= 1e9 else ("MB", 1e6)
    points = [
        _Point(name, file.engine, nbytes / unit_nbytes, file.divergence["reply"].kl_nats)
        for name, nbytes, file in zip(names, sizes, report.files, strict=True)
        if "reply" in file.divergence
    ]
    if not points:
        return ""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        _draw(axes, points)
        axes.set_xlabel(f"size, {unit}")
        _place_labels(axes, points)

    return draw_svg(draw, height=4.6)


def draw_svg(draw: Callable[["Figure"], None], *, height: float) -> str:
    """An SVG element, ten inches wide, of what is drawn. Same input, same text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, height), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return svg.replace(INK, "currentColor")


def plain(axes: "Axes") -> None:
    """No frame and a faint grid."""
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.15, color=INK, linewidth=0.8)


def _draw(axes: "Axes", points: Sequence[_Point]) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    plain(axes)
    best = [one for one in points if not any(other.beats(one) for other in points)]
    frontier = sorted((one.size, one.kl_nats.value) for one in best)
    for engine in dict.fromkeys(point.engine for point in points):
        marker, colour = ENGINE_STYLES.get(engine, OTHER_STYLE)
        for is_best in (True, False):
            mine = [one for one in points if one.engine == engine and (one in best) is is_best]
            if mine:
                axes.errorbar(
                    [point.size for point in mine],
                    [point.kl_nats.value for point in mine],
                    yerr=[point.kl_nats.standard_error or 0.0 for point in mine],
                    fmt=marker,
                    color=colour,
                    markerfacecolor=colour if is_best else "none",
                    markersize=7,
                    capsize=3,
                    label=engine if is_best else f"{engine}, beaten",
                )
    if len(frontier) > 1:
        axes.plot(
            *zip(*frontier, strict=True), color=INK, alpha=0.4, zorder=1, label="Pareto front"
        )
    positive = [point.kl_nats.value for point in points if point.kl_nats.value > 0]
    if len(positive) == len(points):
        axes.set_yscale("log")
    else:  # a file equal to the reference: 0 has a place on a scale that is linear around it
        axes.set_yscale("symlog", linthresh=min(positive, default=1e-9))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("mean KL against bf16, nats")
    axes.margins(x=0.08, y=0.1)
    axes.legend(frameon=False)


def _place_labels(axes: "Axes", points: Sequence[_Point]) -> None:
    """Write each point's name beside it, at the first place that is free."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    marks = [axes.transData.transform((point.size, point.kl_nats.value)) for point in points]
    taken = [mark[:, None] + [[-6, 6], [-6, 6]] for mark in marks]  # (2, 2): x, y; low, high
    for point in points:
        for dx, dy in LABEL_PLACES:
            label = axes.annotate(
                point.name,
                (point.size, point.kl_nats.value),
                (dx, dy),
                textcoords="offset points",
                horizontalalignment="left" if dx > 0 else "right" if dx < 0 else "center",
            )
            extent = label.get_window_extent().get_points().T
            free = all(
                (extent[:, 1] < other[:, 0]).any() or (other[:, 1] < extent[:, 0]).any()
                for other in taken
            )
            if free or (dx, dy) == LABEL_PLACES[-1]:
                taken.append(extent)
                break
            label.remove()
