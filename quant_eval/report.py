"""Results for people: a table for the terminal, and one page that needs no network."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.files import format_nbytes, replacing_file
from quant_eval.behaviour import FLAGS
from quant_eval.curves import layers_plot, tail_plot
from quant_eval.divergence import KIND_PART, POSITION_PARTS, Divergence, Estimate
from quant_eval.paired import MIN_CLUSTERS
from quant_eval.plot import kl_plot
from quant_eval.results import Accuracy, FileResult, Report, short_names
from quant_eval.tasks import TASKS

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATE = "report.html.j2"
TASK_TITLES = {
    "arithmetic": "arith-\nmetic",
    "compare": "com-\npare",
    "letters": "let-\nters",
    "tool_call": "tool\ncall",
    "tool_result": "tool\nresult",
    "second_turn": "second\nturn",
    "mathematics/built-in": "mathe-\nmatics",
    "code/built-in": "code",
    "instructions/built-in": "instruc-\ntions",
}


def kinds_of(files: Sequence[FileResult]) -> list[str]:
    """Kinds of task that at least one file was given: in the order of TASKS, then benchmarks."""
    given = {kind: None for file in files for kind in file.accuracy}
    return [kind for kind in TASKS if kind in given] + [kind for kind in given if "/" in kind]


def format_estimate(estimate: Estimate | None) -> tuple[str, str]:
    """Value and standard error, as far as the error lets it be known; "" where absent."""
    if estimate is None:
        return "", ""
    value, error = estimate.value, estimate.standard_error
    if not error:
        return format_plain(value, 4), ""
    n_decimals = 1 - math.floor(math.log10(error))
    if n_decimals > 4 and 0 < abs(value) < 0.1:
        exponent = math.floor(math.log10(abs(value)))
        scale = 10.0**exponent
        n_decimals = min(max(exponent + n_decimals - 1, 1), 3)
        return (
            f"{value / scale:.{n_decimals}f}e{exponent}",
            f"±{error / scale:.{n_decimals}f}e{exponent}",
        )
    n_decimals = max(n_decimals, 0)
    return f"{value:.{n_decimals}f}", f"±{error:.{n_decimals}f}"


def format_plain(value: float, n_digits: int = 2) -> str:
    """A number whose error is not known, to so many digits; small ones as 2.3e-4."""
    if 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{value:.{n_digits - 1}e}".partition("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:.{n_digits}g}"


def format_percent(estimate: Estimate | None) -> tuple[str, str]:
    """A share and its standard error in percent, to two decimals at most; "" where absent."""
    if estimate is None:
        return "", ""
    value, error = 100 * estimate.value, estimate.standard_error
    if not error:
        return f"{value:.4g}", ""
    n_decimals = min(max(1 - math.floor(math.log10(100 * error)), 0), 2)
    return f"{value:.{n_decimals}f}", f"±{100 * error:.{n_decimals}f}"


def format_excess(ratio: Estimate) -> tuple[str, str]:
    """By how much a ratio exceeds 1, and its standard error, in percent."""
    error = ratio.standard_error
    return format_estimate(
        Estimate(100 * (ratio.value - 1), None if error is None else 100 * error, ratio.n)
    )


def format_accuracy(accuracy: Accuracy | None) -> tuple[str, str]:
    """Solved problems and their standard error in percent; "" where absent."""
    if accuracy is None or accuracy.standard_error is None:
        return "", ""
    return f"{100 * accuracy.share:.0f}", f"±{100 * accuracy.standard_error:.0f}"


def format_interval(accuracy: Accuracy) -> tuple[str, str]:
    """Solved problems in percent, and the 95 % interval of it."""
    assert accuracy.low is not None
    assert accuracy.high is not None
    return f"{100 * accuracy.share:.0f}", f"{100 * accuracy.low:.0f} to {100 * accuracy.high:.0f}"


def format_change(estimate: Estimate | None) -> tuple[str, str, str]:
    """A difference with its sign, its standard error and n; "" where absent."""
    if estimate is None:
        return "", "", ""
    value, error = format_estimate(estimate)
    if estimate.standard_error == 0:
        error = "±0"
    return f"+{value}" if estimate.value > 0 else value, error, f"n={estimate.n}"


@dataclass(frozen=True, slots=True)
class Column:
    """A number against the reference: value and standard error as text; narrow: for terminals."""

    title: str
    format: Callable[[Divergence], tuple[str, str]]
    narrow: str | None = None


AGAINST_REFERENCE = (
    Column("perplexity", lambda one: format_estimate(one.perplexity), "perpl-\nexity"),
    Column("perplexity\nhigher by %", lambda one: format_excess(one.perplexity_ratio)),
    Column("mean KL\nnats", lambda one: format_estimate(one.kl_nats), "mean KL\nnats"),
    Column("median\nKL", lambda one: format_estimate(one.kl_median_nats)),
    Column("99 %\nKL", lambda one: format_estimate(one.kl_q99_nats)),
    Column("99.9 %\nKL", lambda one: format_estimate(one.kl_q999_nats)),
    Column("RMS of\nchange", lambda one: format_percent(one.rms_change)),
    Column("top-1\nagreement %", lambda one: format_percent(one.top1_agreement), "top-1\n%"),
)
MEAN_KL = AGAINST_REFERENCE[2]

Cell = tuple[str, str, str]
"""A number, its standard error, and the same number of the 16-bit file; each may be ""."""


def number_cell(column: Column, file: FileResult, part: str = "reply") -> Cell:
    """One number of a part of the replies, with the noise of the path itself beside it."""
    mine = file.divergence.get(part)
    if mine is None:
        return "", "", ""
    value, error = column.format(mine)
    noise = None if file.floor is None else file.floor.divergence.get(part)
    return value, error, "" if noise is None else f"({column.format(noise)[0]})"


def results_tables(report: Report, *, width: int) -> "list[Table]":
    """One row a file; under each number its standard error and the noise of the path itself.

    Columns that find no room in so many characters go to further tables, to be shown below.
    """
    from rich import box
    from rich.table import Table

    names = short_names([file.name for file in report.files])
    tables = []
    for columns in _side_by_side(report, width - 1 - _width(["file", *names])):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("file", no_wrap=True, style="bold")
        for title, _ in columns:
            table.add_column(title, justify="right", no_wrap=True)
        for row in zip(names, *(cells for _, cells in columns), strict=True):
            table.add_row(*row)
        tables.append(table)
    tables[0].title = f"{report.model}: what each type costs"
    return tables


def _side_by_side(report: Report, width: int) -> list[list[tuple[str, list[str]]]]:
    """Titles and cells of columns, in groups that the width has room for."""
    groups: list[list[tuple[str, list[str]]]] = []
    n_free = 0
    for title, found in _columns(report):
        if not any(value for value, *_ in found):  # what was measured of no file takes no room
            continue
        wide = _width([title, *(line for cell in found for line in cell)])
        if wide > n_free or not groups:
            groups.append([])
            n_free = width
        n_free -= wide
        cells = ["\n[dim]".join((value, "\n".join(filter(None, rest)))) for value, *rest in found]
        groups[-1].append((title, cells))
    return groups


def _width(texts: Sequence[str]) -> int:
    """Characters that a column of these takes, with what stands between columns."""
    return max(len(line) for text in texts for line in text.split("\n")) + 2


def _columns(report: Report) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """A column's title, and value, error and noise of each file."""
    files = report.files
    sizes = ("" if file.nbytes is None else f"{file.nbytes / 1e6:,.1f}" for file in files)
    bits = ("" if f.bits_per_weight is None else f"{f.bits_per_weight:.2f}" for f in files)
    yield "size\nMB", [(size,) for size in sizes]
    yield "bits per\nweight", [(n_bits,) for n_bits in bits]
    for column in AGAINST_REFERENCE:
        if column.narrow:
            yield column.narrow, [number_cell(column, file) for file in files]
    for kind in kinds_of(files):
        yield _title(kind), [format_accuracy(file.accuracy.get(kind)) for file in files]
    yield "all\ntasks", [format_accuracy(file.overall_accuracy) for file in files]
    yield "tokens\n/s", [format_estimate(f.speed.tokens_per_s if f.speed else None) for f in files]


def _title(kind: str) -> str:
    """Of a column: narrow."""
    family, _, name = kind.partition("/")
    if family == "needle":
        return f"needle\n{name}"
    return TASK_TITLES.get(kind) or "\n".join(filter(None, (name[:12], name[12:24]))) or kind


def caption_of(report: Report) -> str:
    """What the numbers of the tables are, and of how much."""
    parts = []
    if any(file.divergence for file in report.files):
        parts.append("mean KL(bf16 reference || file) over reply tokens; ± one standard error")
    for file in report.files[:1]:
        if reply := file.divergence.get("reply"):
            parts.append(
                f"{reply.n_tokens:,} tokens of {reply.n_passages} passages, perplexity of "
                f"the reference {reply.reference_perplexity.value:.4g}"
            )
    if noise := _noise_words(report):
        parts.append(noise)
    counts = {one.n_problems for file in report.files for one in file.accuracy.values()} - {0}
    if counts:
        replies = f", {report.settings.n_replies} replies each" * (report.settings.n_replies > 1)
        parts.append(
            f"tasks in %, n = {_span(counts)} problems of each kind and file{replies}, sampled "
            "with the defaults"
        )
    if words := speed_words(report):
        parts.append(words)
    if ungraded := ungraded_of(report):
        parts.append(f"not graded, for no rule is known: {ungraded}")
    return "\n".join(parts)


def _span(numbers: Iterable[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def speed_words(report: Report) -> str:
    """Of what the tokens/s are a median; "" where there are none."""
    speeds = [(file.name, file.speed) for file in report.files if file.speed is not None]
    if not speeds:
        return ""
    n = _span({one.tokens_per_s.n for _, one in speeds})
    at_once = [f"of {name} {one.at_once} at a time" for name, one in speeds if one.at_once > 1]
    one_by_one = ["one at a time"] if len(at_once) < len(speeds) else []
    return f"tokens/s: median over {n} replies, decoded {'; '.join(one_by_one + at_once)}"


def _noise_words(report: Report) -> str:
    """What the numbers in brackets are, or how to come by them; "" where there is no divergence."""
    files = [file for file in report.files if "reply" in file.divergence]
    names: dict[str, str] = {}
    for file in files:
        if file.floor is not None or file.is_unquantized:
            names.setdefault(file.engine, file.name if file.floor is None else file.floor.name)
    several = len({file.engine for file in files}) > 1
    known = [f"{name} ({engine})" if several else name for engine, name in names.items()]
    words = [f"noise of the path itself: in brackets, the same number of {' and '.join(known)}"]
    return "; ".join(
        words * bool(known)
        + [
            f"{unknown_noise(engine)}, as `qwq eval run --floor` or among the files"
            for engine in dict.fromkeys(file.engine for file in files)
            if engine not in names
        ]
    )


def unknown_noise(engine: str) -> str:
    """That the noise of an engine's path was not measured, and with what it is."""
    what = "the checkpoint's folder" if engine == "transformers" else "the BF16 file"
    return f"noise of the path itself ({engine}): not known; give {what}"


def parts_of(report: Report) -> dict[str, tuple[str, int]]:
    """What scored tokens are divided by, kinds of text aside: title and passages, by part."""
    titles = {"thought": "thoughts", "answer": "answers"}
    titles |= {name: f"positions {name}" for name in POSITION_PARTS}
    n_passages = _n_passages(report)
    return {part: (title, n_passages[part]) for part, title in titles.items() if part in n_passages}


def text_kinds_of(report: Report) -> dict[str, tuple[str, int]]:
    """The kinds of passages that were scored: title and passages, by part."""
    return {
        part: (part.removeprefix(KIND_PART).replace("_", " "), n)
        for part, n in _n_passages(report).items()
        if part.startswith(KIND_PART)
    }


def _n_passages(report: Report) -> dict[str, int]:
    return {
        name: part.n_passages for file in report.files for name, part in file.divergence.items()
    }


def ungraded_of(report: Report) -> str:
    """Which replies could be neither right nor wrong; "" where there are none."""
    most: dict[str, int] = {}
    for file in report.files:
        for kind, one in file.accuracy.items():
            most[kind] = max(most.get(kind, 0), one.n_ungraded)
    return ", ".join(f"{n} replies of {kind}" for kind, n in most.items() if n)


def summary_of(report: Report) -> list[str]:
    """One sentence a file: what it lost, in words; what was not measured is said so."""
    names = short_names([file.name for file in report.files])
    return [f"{name}: {_sentence(file)}" for name, file in zip(names, report.files, strict=True)]


def _sentence(file: FileResult) -> str:
    parts = [_task_words(file)]
    reply = file.divergence.get("reply")
    if reply is None and file.engine == "server":
        parts.append("a server shows no KL")
    elif reply is None:
        parts.append("KL not measured")
    else:
        above = ""
        if file.floor is not None:
            noise = format_estimate(file.floor.divergence["reply"].kl_nats)[0]
            above = f" (noise of the path {noise})"
        parts.append("KL " + " ".join(format_estimate(reply.kl_nats)).strip() + above)
    if file.behaviour is not None:
        n = file.behaviour.n_replies
        for share, words in (
            (file.behaviour.unfinished_thoughts, "thoughts did not end"),
            (file.behaviour.loops, "replies looped"),
        ):
            if share.value > 0:
                parts.append(f"{share.value * n:.0f} of {n} {words}")
    return "; ".join(parts)


def _task_words(file: FileResult) -> str:
    """What it lost on tasks against the 16-bit file, or why that is not known."""
    loss = file.task_loss
    if loss is None and not file.accuracy:
        return "no tasks asked"
    if loss is None and file.is_unquantized:
        return "the 16-bit file that tasks are held against"
    if loss is None:
        return "tasks not held against a 16-bit file"
    if loss.low is None or loss.high is None:
        return f"too few problems for a verdict on tasks ({loss.n} of {MIN_CLUSTERS} needed)"
    if loss.value == 0 and file.overall_accuracy and not file.overall_accuracy.n_correct:
        return f"solves none of {loss.n} problems, nor does the 16-bit file"
    if loss.low <= 0 <= loss.high:
        return (
            f"no measurable loss on tasks ({100 * loss.value:+.0f} %, interval "
            f"{100 * loss.low:+.0f} to {100 * loss.high:+.0f}, {loss.n} problems)"
        )
    fewer = "fewer" if loss.high < 0 else "more"
    ends = sorted(abs(100 * end) for end in (loss.low, loss.high))
    return f"solves {ends[0]:.0f} to {ends[1]:.0f} % of {loss.n} problems {fewer}"


def format_share(estimate: Estimate) -> tuple[str, str]:
    """A share of replies in whole percent."""
    error = estimate.standard_error
    return f"{100 * estimate.value:.0f}", "" if error is None else f"±{100 * error:.0f}"


def write_html(path: Path, report: Report) -> None:
    """Write the page, whole or not at all, over an older one."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("quant_eval", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        nbytes=format_nbytes,
        estimate=format_estimate,
        percent=format_percent,
        interval=format_interval,
        change=format_change,
        share=format_share,
        capitalize_first=lambda text: text[:1].upper() + text[1:],
    )
    names = short_names([file.name for file in report.files])
    rows = list(zip(names, report.files, strict=True))
    page = environment.get_template(TEMPLATE).render(
        report=report,
        rows=rows,
        kinds=kinds_of(report.files),
        summary=summary_of(report),
        flags=FLAGS,
        ungraded=ungraded_of(report),
        columns=AGAINST_REFERENCE,
        number=number_cell,
        speed=speed_words(report),
        mean_kl=MEAN_KL,
        noise=_noise_words(report),
        floors=list({f.floor.sha256: f.floor for f in report.files if f.floor}.values()),
        parts=parts_of(report),
        text_kinds=text_kinds_of(report),
        # drawn here from numbers, and from file names that matplotlib escapes
        plot=Markup(kl_plot(report)),
        tail=Markup(tail_plot(report)),
        by_layer=Markup(layers_plot([(n, f.layers) for n, f in rows if f.layers is not None])),
    )
    with replacing_file(path, force=True) as file:
        file.write(page.encode())
