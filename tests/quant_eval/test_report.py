"""Results to JSON and back, the terminal's table, and the page: whole, escaped, offline."""

import json
import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from quant_eval.curves import layers_plot, tail_plot
from quant_eval.divergence import POSITION_PARTS, Divergence, Estimate
from quant_eval.layers import KINDS as LINEARS
from quant_eval.layers import LayerError, LayerErrors
from quant_eval.plot import kl_plot
from quant_eval.report import (
    AGAINST_REFERENCE,
    caption_of,
    format_accuracy,
    format_estimate,
    format_excess,
    format_percent,
    kinds_of,
    results_tables,
    summary_of,
    write_html,
)
from quant_eval.results import (
    Accuracy,
    Attempt,
    Behaviour,
    EvaluationSettings,
    Example,
    FileResult,
    Flip,
    Floor,
    Report,
    Speed,
    TaskLoss,
    short_names,
    to_json,
    write_json,
)

KINDS = ("arithmetic", "compare", "letters", "choice", "tool_call", "tool_result", "second_turn")
# type, bytes, bits per weight, mean KL, top-1 share, solved of 20, tokens/s
ROWS = (
    ("BF16", 8_420_000, 16.0, 1.1e-7, 0.9999, 20, 1010.0),
    ("Q8_0", 4_530_000, 8.5, 2.3e-4, 0.995, 20, 1400.0),
    ("Q6_K", 3_540_000, 6.56, 1.1e-3, 0.99, 19, 1300.0),
    ("Q5_K_M", 3_100_000, 5.7, 3.2e-3, 0.983, 19, 1320.0),
    ("Q4_K_M", 2_740_000, 4.9, 9.7e-3, 0.97, 18, 1450.0),
    ("Q4_K_S", 2_600_000, 4.6, 1.2e-2, 0.965, 18, 1470.0),
    ("Q3_K_M", 2_200_000, 3.9, 5.1e-2, 0.93, 14, 1330.0),
    ("Q2_K", 1_800_000, 3.0, 4.4e-1, 0.80, 6, 1400.0),
    ("gptq-4bit", 2_900_000, 4.6, 8.0e-3, 0.972, 18, 62.0),
)


def accuracy(n: int, n_correct: int, n_cut: int = 0) -> Accuracy:
    """One reply to each of n problems."""
    ends = ["length"] * n_cut + ["stop"] * (n - n_cut)
    return Accuracy.of(
        [
            Attempt(str(i), "letters", "?", i < n_correct, "", "", end, (), 2, 1.0, 0.1, 9)
            for i, end in enumerate(ends)
        ]
    )


def divergence(kl: float, top1: float) -> Divergence:
    return Divergence(
        n_tokens=16_301,
        n_passages=160,
        perplexity=Estimate(1.213 + kl, 0.011, 16_301),
        reference_perplexity=Estimate(1.213, 0.011, 16_301),
        kl_nats=Estimate(kl, kl / 15, 16_301),
        kl_median_nats=Estimate(kl / 9, kl / 9 / 8, 16_301),
        kl_q99_nats=Estimate(kl * 11, kl * 11 / 8, 16_301),
        kl_q999_nats=Estimate(kl * 40, kl * 40 / 8, 16_301),
        top1_agreement=Estimate(top1, (1 - top1) / 12, 16_301),
        rms_change=Estimate(kl**0.5 / 4, kl / 20, 16_301),
        perplexity_ratio=Estimate(1 + kl, kl / 9, 16_301),
    )


def floor_at(name: str, kl: float, top1: float) -> Floor:
    parts = ("reply", "thought", "answer")
    return Floor(name, "fe" * 32, {part: divergence(kl, top1) for part in parts})


FLOORS = {
    "llama.cpp": floor_at("nano-qwq-BF16.gguf", ROWS[0][3], ROWS[0][4]),
    "transformers": floor_at("checkpoint", 3e-5, 0.9995),
}


def result(name: str, *row: float) -> FileResult:
    nbytes, bits, kl, top1, n_correct, speed = row
    return FileResult(
        name=f"nano-qwq-{name}" + ("" if name.startswith("gptq") else ".gguf"),
        sha256="ab" * 32,
        nbytes=int(nbytes),
        bits_per_weight=bits,
        engine="transformers" if name.startswith("gptq") else "llama.cpp",
        divergence={part: divergence(kl, top1) for part in ("reply", "thought", "answer")},
        accuracy={kind: accuracy(20, int(n_correct)) for kind in KINDS},
        behaviour=None,
        speed=Speed(Estimate(speed, speed / 90, 140)),
        examples=(
            Example(
                "Which is larger, 9.9 or 9.11?",
                "Line up 9.90 and 9.11.\n9=9\n9>1\nSo 9.9 is larger.",
                "9.9 is larger than 9.11.",
                "stop",
            ),
        ),
        elapsed_s=17.2,
        overall_accuracy=accuracy(7 * 20, 7 * int(n_correct)),
        floor=None
        if name == "BF16"
        else FLOORS["transformers" if name.startswith("gptq") else "llama.cpp"],
    )


REPORT = Report(
    model="nano-qwq",
    checkpoint_sha256="cd" * 32,
    evaluation_sha256="ef" * 32,
    settings=EvaluationSettings(),
    environment={"python": "3.11.9", "processor": "x86_64, 2 cores", "torch": "2.13.0"},
    files=tuple(result(*row) for row in ROWS),
)


def text_of(report: Report, width: int = 140) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(*results_tables(report, width=width))
    console.print(caption_of(report))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


BEHAVIOUR = Behaviour(
    n_replies=100,
    unfinished_thoughts=Estimate(0.03, 0.02, 100),
    empty_thoughts=Estimate(0.0, 0.01, 100),
    loops=Estimate(0.0, 0.01, 100),
    language_switches=Estimate(0.0, 0.01, 100),
    cut_replies=Estimate(0.25, 0.04, 100),
    thought_tokens=Estimate(81.25, 3.1, 100),
    first_token_s=Estimate(0.0312, 0.0011, 100),
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a: tasks not held against a 16-bit file; KL 9.7e-3 ±0.6e-3"),
        ({"accuracy": {}}, "a: no tasks asked; KL 9.7e-3 ±0.6e-3"),
        (
            {"task_loss": TaskLoss(-0.2, None, None, 7)},
            "a: too few problems for a verdict on tasks (7 of 8 needed); KL 9.7e-3 ±0.6e-3",
        ),
        (
            {"bits_per_weight": 16.0, "divergence": {}},
            "a: the 16-bit file that tasks are held against; KL not measured",
        ),
        (
            {"task_loss": TaskLoss(-0.01, -0.05, 0.03, 112), "divergence": {}},
            (
                "a: no measurable loss on tasks (-1 %, interval -5 to +3, 112 problems); "
                "KL not measured"
            ),
        ),
        (
            {"task_loss": TaskLoss(-0.2, -0.3, -0.1, 112), "behaviour": BEHAVIOUR},
            (
                "a: solves 10 to 30 % of 112 problems fewer; KL 9.7e-3 ±0.6e-3; "
                "3 of 100 thoughts did not end"
            ),
        ),
        (
            {
                "task_loss": TaskLoss(0.0, -0.1, 0.1, 14),
                "accuracy": {"letters": accuracy(14, 0, 3)},
                "overall_accuracy": accuracy(14, 0, 3),
            },
            "a: solves none of 14 problems, nor does the 16-bit file; KL 9.7e-3 ±0.6e-3",
        ),
        (
            {"task_loss": TaskLoss(0.2, 0.1, 0.3, 112)},
            "a: solves 10 to 30 % of 112 problems more; KL 9.7e-3 ±0.6e-3",
        ),
    ],
)
def test_the_summary_says_no_more_than_was_measured(changes: dict[str, Any], words: str) -> None:
    """Catches a loss that is within the noise, and a "no loss" where nothing was compared."""
    file = replace(REPORT.files[4], name="a.gguf", floor=None, **changes)
    assert summary_of(replace(REPORT, files=(file,))) == [words]
    if "KL 9" in words:
        (beside,) = summary_of(replace(REPORT, files=(replace(file, floor=FLOORS["llama.cpp"]),)))
        assert beside == words.replace("±0.6e-3", "±0.6e-3 (noise of the path 1.10e-7)")


def test_unmeasured_is_absent() -> None:
    """Catches a null or a 0 where nothing was measured."""
    bare = replace(REPORT.files[0], divergence={}, accuracy={}, speed=None)
    data = to_json(bare)
    assert "speed" not in data
    assert data["accuracy"] == {}
    text = text_of(replace(REPORT, files=(bare,)))
    assert re.search(r"\b0\b", text) is None
    assert kl_plot(replace(REPORT, files=(bare,))) == ""


def test_json_is_sorted_and_versioned(tmp_path: Path) -> None:
    """Catches a document whose bytes depend on the order of measuring."""
    write_json(tmp_path / "report.json", REPORT)
    text = (tmp_path / "report.json").read_text()
    data = json.loads(text)
    assert data["schema_version"] == 2
    assert data["files"][1]["floor"]["divergence"]["reply"]["kl_nats"]["value"] == 1.1e-7
    assert list(data) == sorted(data)
    assert len(data["files"]) == len(ROWS)


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(0.021345, 0.00112, 9), ("0.0213", "±0.0011")),
        (Estimate(1.23456, 0.0123, 9), ("1.235", "±0.012")),
        (Estimate(412.7, 31.0, 9), ("413", "±31")),
        (Estimate(1.23e-7, 2e-9, 9), ("1.23e-7", "±0.02e-7")),
        (Estimate(9.7e-3, 6.6e-4, 9), ("9.7e-3", "±0.7e-3")),
        (Estimate(1.5e-8, 6.5e-6, 9), ("1.5e-8", "±650.0e-8")),
        (Estimate(0.5, None, 9), ("0.5", "")),
        (Estimate(2.3456e-4, None, 9), ("2.346e-4", "")),
        (Estimate(1.0, 0.0, 9), ("1", "")),
        (None, ("", "")),
    ],
)
def test_estimates_show_the_digits_they_have(
    estimate: Estimate | None, expected: tuple[str, str]
) -> None:
    """Catches digits beyond the error, and errors rounded away."""
    assert format_estimate(estimate) == expected


def test_shares_are_percent() -> None:
    """Catches a share shown as a fraction, and decimals that a share near 100 % does not need."""
    assert format_percent(Estimate(0.97, 0.0025, 9)) == ("97.00", "±0.25")
    assert format_percent(Estimate(0.9999, 8e-6, 9)) == ("99.99", "±0.00")
    assert format_percent(Estimate(0.8, 0.017, 9)) == ("80.0", "±1.7")
    assert format_percent(None) == ("", "")


def test_ratios_are_percent_above_one() -> None:
    """Catches a ratio whose digits are all noughts, and an error that is not scaled with it."""
    assert format_excess(Estimate(1.0123, 0.0011, 9)) == ("1.23", "±0.11")
    assert format_excess(Estimate(1 - 1.5e-7, 2e-8, 9)) == ("-1.5e-5", "±0.2e-5")
    assert format_excess(Estimate(1.5, None, 9)) == ("50", "")


def test_accuracy_is_never_certain() -> None:
    """Catches an error of 0 where all or none of a few problems were solved."""
    assert format_accuracy(accuracy(16, 16)) == ("100", "±7")
    assert format_accuracy(accuracy(16, 0)) == ("0", "±7")
    assert format_accuracy(accuracy(96, 48)) == ("50", "±5")
    assert format_accuracy(None) == ("", "")


def test_names_are_what_differs() -> None:
    """Catches a shared beginning cut inside a word."""
    assert short_names(["nano-qwq-Q4_K_M.gguf", "nano-qwq-Q4_K_S.gguf"]) == ["Q4_K_M", "Q4_K_S"]
    assert short_names(["a-Q8_0.gguf", "a-gptq-4bit"]) == ["Q8_0", "gptq-4bit"]
    assert short_names(["nano-qwq-Q8_0.gguf"]) == ["nano-qwq-Q8_0"]


def test_the_table_has_a_row_a_file() -> None:
    """Catches rows or columns lost, and a table that does not fit a wide terminal."""
    text = text_of(REPORT)
    for name, *_ in ROWS:
        assert name in text
    assert "±0.6e-3" in text
    assert kinds_of(REPORT.files) == list(KINDS)
    assert "n = 20 problems of each kind" in text
    assert "tokens/s: median over 140 replies, decoded one at a time" in text
    assert "±11" in text  # of BF16's tokens/s


def test_the_floor_stands_beside_every_number(tmp_path: Path) -> None:
    """Catches a number against the reference alone, and the 16-bit file held against itself.

    And llama.cpp's noise beside what transformers computed.
    """
    text = text_of(REPORT)
    words = "in brackets, the same number of nano-qwq-BF16.gguf (llama.cpp) and checkpoint"
    assert f"noise of the path itself: {words} (transformers)" in text
    n_gguf = len(ROWS) - 2
    for noise in ("(1.213)", "(1.10e-7)", "(99.99)"):  # perplexity, mean KL, top-1
        assert text.count(noise) == n_gguf + (noise == "(1.213)")
    assert text.count("(3.0e-5)") == 1
    write_html(tmp_path / "report.html", REPORT)
    page = (tmp_path / "report.html").read_text()
    table = page[page.index("<h2>Size") : page.index("<h2>Tasks")]
    whole, *parts = table.split("<table>")[1:]
    for engine, n in (("llama.cpp", n_gguf), ("transformers", 1)):
        floor = FLOORS[engine].divergence["reply"]
        for column in AGAINST_REFERENCE:
            assert whole.count(f"<small>({column.format(floor)[0]})</small>") >= n
    assert whole.count("<small>(") == len(AGAINST_REFERENCE) * (n_gguf + 1)
    (by_part,) = parts
    assert by_part.count("<small>(1.10e-7)</small>") == 2 * n_gguf  # thoughts and answers
    assert page.count("Noise of the path itself: in brackets") == 2
    assert "<dt>checkpoint, noise of the path, SHA-256</dt>" in page


def test_noise_that_was_not_measured_is_said_to_be_unknown(tmp_path: Path) -> None:
    """Catches one engine's noise passed off as another's, and silence where there is none."""
    bare = [replace(one, floor=None) for one in REPORT.files]
    folder = "noise of the path itself (transformers): not known; give the checkpoint's folder"
    file = "noise of the path itself (llama.cpp): not known; give the BF16 file"
    whole = replace(REPORT, files=(*REPORT.files[:-1], bare[-1]))
    assert f"of nano-qwq-BF16.gguf (llama.cpp); {folder}, as `qwq eval run --floor`" in words_of(
        whole
    )
    assert "(1.10e-7)" not in text_of(whole).split("gptq-4bit")[1]
    alone = replace(REPORT, files=tuple(bare[1:]))
    assert file in words_of(alone)
    assert folder in words_of(alone)
    assert not re.search(r"\(\d", text_of(alone))
    write_html(tmp_path / "alone.html", alone)
    assert "<small>(" not in (tmp_path / "alone.html").read_text()
    servers = replace(REPORT, files=(replace(bare[1], divergence={}),))
    assert "noise of the path" not in words_of(servers)


def words_of(report: Report) -> str:
    return " ".join(text_of(report).split())


def test_columns_are_what_their_titles_say() -> None:
    """Catches one quantile under another's title."""
    found = replace(
        divergence(0.02, 0.9),
        kl_median_nats=Estimate(0.001, 0.0002, 9),
        kl_q99_nats=Estimate(0.3, 0.02, 9),
        kl_q999_nats=Estimate(0.7, None, 9),
        perplexity=Estimate(1.5, 0.01, 9),
        perplexity_ratio=Estimate(1.25, 0.01, 9),
        rms_change=Estimate(0.04, 0.002, 9),
    )
    values = {column.title: column.format(found)[0] for column in AGAINST_REFERENCE}
    assert values == {
        "perplexity": "1.500",
        "perplexity\nhigher by %": "25.0",
        "mean KL\nnats": "0.0200",
        "median\nKL": "1.0e-3",
        "99 %\nKL": "0.300",
        "99.9 %\nKL": "0.7",
        "RMS of\nchange": "4.00",
        "top-1\nagreement %": "90.00",
    }


def test_benchmarks_of_like_names_have_columns_of_their_own() -> None:
    """Catches a benchmark that hides another's share, and a limit of years on the page."""
    shares = {
        "mathematics/built-in": accuracy(20, 1),
        "code/built-in": accuracy(20, 3),
        "code/livecodebench_v5": accuracy(20, 5),
        "code/livecodebench_v6": accuracy(20, 7),
        "mathematics/aime": accuracy(20, 9),
        "choice/aime": accuracy(20, 11),
    }
    report = replace(REPORT, files=(replace(REPORT.files[0], accuracy=shares),))
    (table,) = results_tables(report, width=1000)
    cells = {str(one.header): str(next(iter(one.cells))).split("\n")[0] for one in table.columns}
    assert cells["mathe-\nmatics"] == "5"
    assert cells["code"] == "15"
    assert cells["livecodebenc\nh_v5"] == "25"
    assert cells["livecodebenc\nh_v6"] == "35"
    titles = [str(one.header) for one in table.columns]
    assert titles.count("aime") == 2


@pytest.mark.parametrize("width", [60, 80, 100, 132, 200])
def test_no_number_is_cut_where_the_terminal_is_narrow(width: int) -> None:
    """Catches a column that ends in dots, one that is left out, and needless tables."""
    text = text_of(REPORT, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    titles = [str(c.header) for t in results_tables(REPORT, width=width) for c in t.columns[1:]]
    (whole,) = results_tables(REPORT, width=1000)
    assert titles == [str(column.header) for column in whole.columns[1:]]
    words = " ".join(text.split())
    assert words.count("what each type costs") == words.count("one standard error") == 1
    lengths = [len(one.columns) for one in results_tables(REPORT, width=width)]
    assert (len(lengths) == 1) is (width >= 132), lengths


def test_no_limit_of_time_is_no_number(tmp_path: Path) -> None:
    """Catches a page that says a billion seconds."""
    for seconds, said in ((45.0, True), (1e9, False), (math.inf, False)):
        settings = replace(REPORT.settings, task_seconds=seconds)
        write_html(tmp_path / "report.html", replace(REPORT, settings=settings))
        assert ("none begun" in (tmp_path / "report.html").read_text()) is said


def test_the_page_shows_parts_of_the_reply(tmp_path: Path) -> None:
    """Catches thoughts under answers, positions out of order, and parts without tokens."""
    parts = {"answer": 0.25, "thought": 0.5, "128 to 511": 0.125, "from 32768": 2.0}
    assert set(parts) - {"answer", "thought"} < set(POSITION_PARTS)
    found = {name: divergence(kl, 0.9) for name, kl in parts.items()}
    file = replace(REPORT.files[0], divergence={"reply": divergence(1.0, 0.5), **found})
    other = replace(REPORT.files[1], floor=Floor(file.name, file.sha256, file.divergence))
    write_html(tmp_path / "report.html", replace(REPORT, files=(file, other)))
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r"<tr><th>([^<]*)</th><td>160</td>\n<td>([^<]*)<small>±", page)
    assert rows == [
        ("thoughts", "0.500"),
        ("answers", "0.250"),
        ("positions 128 to 511", "0.1250"),
        ("positions from 32768", "2.00"),
    ]
    noise = re.findall(r"±0.2e-4</small><small>(.*)</small>", page)
    assert noise == ["(1.000)", "(0.500)", "(0.250)"]  # of the whole, thoughts, answers


def test_the_plot_is_an_svg_with_every_name() -> None:
    """Catches a plot that is no XML, names a file nowhere, or is drawn in a fixed ink."""
    svg = kl_plot(REPORT)
    ElementTree.fromstring(svg)
    for name, *_ in ROWS:
        assert svg.count(f">{name}<") == 1
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert kl_plot(REPORT) == svg


def test_the_plot_tells_beaten_files_from_the_front() -> None:
    """Catches a front through files that a smaller and closer one beats."""
    rows = {"Q2_K": (2.0, 0.4), "Q4_K_S": (3.0, 0.01), "Q4_K_M": (3.1, 0.02), "Q8_0": (5.0, 1e-3)}
    files = [
        replace(
            REPORT.files[1],
            name=f"m-{name}.gguf",
            nbytes=int(1e6 * size),
            divergence={"reply": divergence(kl, 0.9)},
        )
        for name, (size, kl) in rows.items()
    ]
    drawn = kl_plot(replace(REPORT, files=tuple(files)))
    assert drawn.count(">llama.cpp, beaten<") == drawn.count(">Pareto front<") == 1
    front = max(re.findall(r'<path d="([^"]*)"[^>]*stroke-opacity: 0.4', drawn), key=len)
    assert len(re.findall(r"[ML] ", front)) == 3
    best = kl_plot(replace(REPORT, files=tuple(files[:2])))
    assert "beaten" not in best
    one = kl_plot(replace(REPORT, files=tuple(files[:1])))
    assert "Pareto" not in one


def test_the_page_says_how_it_was_measured(tmp_path: Path) -> None:
    """Catches settings, tasks and recipes that numbers depend on and that no one is told."""
    settings = replace(REPORT.settings, n_replies=4, reply_seed=9, needles=(8192,), seed=3)
    busy = replace(
        REPORT.files[2],
        name="m at cluster",
        speed=Speed(Estimate(55.0, 2.0, 140), at_once=32),
        recipe="name = Q6_K",
        behaviour=BEHAVIOUR,
        thought_change=Estimate(4.2, 1.3, 16),
        flips=(Flip("Asked", "R", "A", "r", "a", 1, 4, 4),),
    )
    report = replace(
        REPORT, settings=settings, files=(REPORT.files[0], busy), benchmarks={"aime.csv": "99" * 32}
    )
    write_html(tmp_path / "report.html", report)
    page = (tmp_path / "report.html").read_text()
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>(?:<pre>)?([^<]*)<", page))
    assert facts["replies to a problem"] == "4"
    assert facts["seed"] == "3"
    assert facts["seed of sampling"] == "9"
    assert facts["needles"] == "in 8192 tokens"
    assert facts["task aime.csv"] == "99" * 32
    assert facts["m at cluster, recipe"] == "name = Q6_K"
    speeds = "okens/s: median over 140 replies, decoded one at a time; of m at cluster 32 at a time"
    assert f"T{speeds}." in page
    assert f"t{speeds}" in words_of(report)
    assert "<td>+4.2<small>±1.3</small><small>n=16</small></td>" in page
    assert "16 bits, solved in 4 of 4 replies" in page
    assert "m at cluster, solved in 1 of 4 replies" in page
    assert "each with up to 4 replies" in " ".join(page.split())
    assert "4 replies each" in words_of(report)


def layers_of(error: float) -> LayerErrors:
    one = Estimate(error, error / 9, 500)
    layer = LayerError(one, one, dict.fromkeys(LINEARS, one))
    return LayerErrors(500, 9, one, (layer, layer), one)


def test_curves_name_every_file_with_an_error() -> None:
    """Catches a logarithm of 0, a file that is lost, and colours that differ between the halves."""
    tails = [((1.0, kl / 10), (0.1, kl), (0.001, 9 * kl)) for kl in (0.0, 1e-3, 0.1)]
    files = [replace(one, kl_tail=each) for one, each in zip(REPORT.files, tails, strict=False)]
    drawn = tail_plot(replace(REPORT, files=tuple(files)))
    ElementTree.fromstring(drawn)
    assert [drawn.count(f">{name}<") for name in ("BF16", "Q8_0", "Q6_K")] == [1, 1, 1]
    assert tail_plot(REPORT) == ""

    drawn = layers_plot([("BF16", layers_of(0)), ("Q8_0", layers_of(0.01))])
    ElementTree.fromstring(drawn)
    assert "BF16" not in drawn
    assert drawn.count(">Q8_0<") == 1
    assert ">down<" in drawn
    assert layers_plot([("BF16", layers_of(0))]) == ""


@pytest.mark.parametrize(("low", "high"), [(0.016, 0.039), (0.0161, 0.0164), (0.002, 0.9)])
def test_an_axis_has_numbers_whatever_its_span(low: float, high: float) -> None:
    """Catches errors between two powers of ten, where no tick of a logarithm falls."""
    drawn = layers_plot([("low", layers_of(low)), ("high", layers_of(high))])
    numbers = [float(text) for text in re.findall(r">(\d+\.?\d*)</text>", drawn)]
    assert sum(100 * low <= number <= 100 * high for number in numbers) >= 2 * 2  # on both axes


def test_the_page_shows_kinds_of_text(tmp_path: Path) -> None:
    """Catches a table over one kind, which is the whole, and files in each other's columns."""
    kinds = {f"kind {name}": divergence(kl, 0.9) for name, kl in (("code", 0.25), ("prose", 0.5))}
    file = replace(REPORT.files[0], divergence={**REPORT.files[0].divergence, **kinds})
    write_html(tmp_path / "report.html", replace(REPORT, files=(file, REPORT.files[1])))
    page = (tmp_path / "report.html").read_text()
    row = page[page.index("<tr><th>code</th>") : page.index("<tr><th>prose</th>")]
    assert re.search("<td>0.250<small>±0.017</small></td>\\s*<td></td>", row)
    kinds.pop("kind code")
    one_kind = replace(file, divergence={**REPORT.files[0].divergence, **kinds})
    write_html(tmp_path / "bare.html", replace(REPORT, files=(one_kind,)))
    assert "KL by kind of text" not in (tmp_path / "bare.html").read_text()


def test_the_page_shows_where_errors_come_from(tmp_path: Path) -> None:
    """Catches plots that are drawn and left out, and headings over nothing."""
    write_html(tmp_path / "bare.html", REPORT)
    assert "Error by layer" not in (tmp_path / "bare.html").read_text()
    files = [replace(one, kl_tail=((1.0, 0.1),), layers=layers_of(0.1)) for one in REPORT.files]
    write_html(tmp_path / "report.html", replace(REPORT, files=tuple(files)))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "Error by layer" in page


def test_a_plot_takes_a_divergence_of_zero() -> None:
    """Catches a logarithm of 0: a file may equal the reference exactly."""
    same = replace(REPORT.files[0], divergence={"reply": divergence(0.0, 1.0)})
    assert ">BF16<" in kl_plot(replace(REPORT, files=(same, *REPORT.files[1:])))


def test_the_page_is_whole_and_offline(tmp_path: Path) -> None:
    """Catches anything that a browser would fetch, and script of any kind."""
    write_html(tmp_path / "report.html", REPORT)
    page = (tmp_path / "report.html").read_text()
    for name, *_ in ROWS:
        assert name in page
    assert not re.search(r"<(script|link|img|iframe|object)\b", page)
    links = set(re.findall(r"https?://[^\"'<> ]+", page))
    assert all(link.startswith("http://www.w3.org/") for link in links), links
    assert not re.search(r"@import|url\((?!#)", page)


def test_the_page_tells_what_was_said_and_where(tmp_path: Path) -> None:
    """Catches replies on each other's side, cuts that are not shown, and hashes without a name."""
    file = replace(
        REPORT.files[3],
        sha256="12" * 32,
        accuracy={"letters": accuracy(17, 4, 3)},
        examples=(Example("The question", "The thought", "The answer", "length"),),
        flips=(Flip("Asked", "Right thought", "Right answer", "Wrong thought", "Wrong answer"),),
    )
    write_html(tmp_path / "report.html", replace(REPORT, files=(REPORT.files[0], file)))
    page = (tmp_path / "report.html").read_text()
    flipped = page[page.index("<h2>Answers that flipped") : page.index("<h2>Replies")]
    said = re.findall(r"<(?:p class=\"soft\"|h3|small|pre)>([^<]+)<", flipped)
    assert said[1:] == [
        "Q5_K_M",
        "Asked",
        "16 bits",
        "Right thought",
        "Right answer",
        "Q5_K_M",
        "Wrong thought",
        "Wrong answer",
    ]
    replies = page[page.index("<h2>Replies") : page.index("<h2>Where")]
    assert replies.count("(cut)") == 1
    assert replies.index("The thought") < replies.index("The answer") < replies.index("(cut)")
    assert 'title="4 of 17, 3 replies cut"' in page
    assert "24<small>9 to 48</small><small>n=17</small>" in page
    where = page[page.index("<h2>Where") :]
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", where))
    assert facts["checkpoint, SHA-256"] == "cd" * 32
    assert facts["evaluation text, SHA-256"] == "ef" * 32
    assert facts["nano-qwq-Q5_K_M.gguf, SHA-256"] == "12" * 32
    assert facts["nano-qwq-BF16.gguf, SHA-256"] == "ab" * 32
    assert REPORT.environment.items() <= facts.items()
    assert facts["scored tokens"] == "at most 16384"
    assert "16,301 tokens of 160 conversations" in page
    assert "has a perplexity of 1.213" in page
    assert "<td>1320<small>±15</small></td>" in page


def test_the_page_escapes_what_models_write(tmp_path: Path) -> None:
    """Catches markup of a reply, a question or a file name that a browser would run."""
    evil = "<img src=x onerror=alert(1)>"
    file = replace(
        REPORT.files[0],
        name=f"a-{evil}.gguf",
        examples=(Example(evil, evil, evil, "stop"),),
        behaviour=BEHAVIOUR,
        flips=(Flip(evil, evil, evil, evil, evil),),
    )
    write_html(tmp_path / "report.html", replace(REPORT, files=(file, REPORT.files[1])))
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page
    assert page.count("&lt;img src=x") >= 9
    assert "<th>unfinished<br>thoughts</th>" in page
    assert "<td>81.2<small>±3.1</small></td>" in page
    assert "<td>25<small>±4</small></td>" in page
