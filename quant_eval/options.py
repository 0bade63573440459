"""Options that several commands share: one meaning for a flag everywhere."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint
    from quant_eval.results import EvaluationSettings

Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads (default: by the machine and the model).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, no table.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no plan and no progress.")]
_EVALUATION = "Evaluation"
UNLIMITED_S = 1e9
BENCHMARK_MAX_TOKENS = 32_768
Text = Annotated[
    Path | None,
    typer.Option(
        help="What to score: JSON Lines or Parquet of conversations or texts, or a plain text "
        "(default: built in).",
        rich_help_panel=_EVALUATION,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Reply tokens to score, at most (default: 16384; large models 2048).",
        rich_help_panel=_EVALUATION,
    ),
]
Problems = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Problems of each kind (default: 16; large models 0).",
        rich_help_panel=_EVALUATION,
    ),
]
TaskSeconds = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Begin no problem after so many seconds a file (default: 45; for servers and with "
        "--task or --needles no limit; with --smoke 5).",
        rich_help_panel=_EVALUATION,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Longest reply, thought included (default: 512; large models 256; for servers and "
        "with --task or --needles 32768; with --smoke 256).",
        rich_help_panel=_EVALUATION,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=1 << 31,
        help="Of problems and sampling (default: 0).",
        rich_help_panel=_EVALUATION,
    ),
]
ReferenceOption = Annotated[
    str, typer.Option(help="The checkpoint that they were made from: folder or repository.")
]
States = Annotated[
    Path | None,
    typer.Option(
        help="Folder that `qwq eval reference` wrote (default: kept beside the results).",
        rich_help_panel=_EVALUATION,
    ),
]
Replies = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Replies to each problem, each with its own seed (default: 1).",
        rich_help_panel=_EVALUATION,
    ),
]
ReplySeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=1 << 31,
        help="Of the sampling alone (default: --seed).",
        rich_help_panel=_EVALUATION,
    ),
]

TaskFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--task",
        help="Benchmark to ask too, again for more: mathematics, code or instructions, which are "
        "built in, or AIME, MATH, GSM8K, GPQA, LiveCodeBench or IFEval as JSONL, JSON, CSV or "
        "Parquet, or a folder of such files.",
        rich_help_panel=_EVALUATION,
        show_default=False,
    ),
]
TaskProblems = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Problems of each --task, drawn by the seed (default: all of a file; 24 that are "
        "built in).",
        rich_help_panel=_EVALUATION,
    ),
]
Needles = Annotated[
    list[int] | None,
    typer.Option(
        min=256,
        help="Hide numbers in texts of so many tokens, again for more: 8192 and 40960 lie below "
        "and above the YaRN switch.",
        rich_help_panel=_EVALUATION,
        show_default=False,
    ),
]
Files = Annotated[
    list[Path] | None, typer.Argument(help="GGUF files and GPTQ folders.", show_default=False)
]
FileReference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        help="The checkpoint that the files were made from: folder or repository; servers are "
        "sampled with its defaults.",
        show_default=False,
    ),
]
Floors = Annotated[
    list[Path] | None,
    typer.Option(
        "--floor",
        help="The checkpoint's 16-bit file, whose numbers are the noise of the path itself; again "
        "for more: GGUF files need the BF16 GGUF, GPTQ folders the checkpoint's folder (default: "
        "those among the files).",
        show_default=False,
    ),
]
BaseUrl = Annotated[
    list[str] | None,
    typer.Option(
        help="OpenAI-compatible server to ask the tasks of, as in "
        "http://localhost:8000/v1#NAME; again for more. What it replied is kept under this "
        "address in --out.",
        show_default=False,
    ),
]
AtOnce = Annotated[int, typer.Option(min=1, help="Replies that a server makes at a time.")]
Out = Annotated[
    Path,
    typer.Option(
        "-o", "--out", help="Folder that keeps what was measured, so that it is not done twice."
    ),
]


def settings_for(
    checkpoint: "Checkpoint | None",
    tasks: Sequence[Path] | None = None,
    needles: Sequence[int] | None = None,
    *,
    smoke: bool = False,
    **given: float | None,
) -> "EvaluationSettings":
    """The settings for a model of this size with what was given on the command line.

    checkpoint: None for a server's model. Of one, and with benchmarks, replies may be as long as
    QwQ's own figures were made with, and none is left out for the time, except in a smoke run.
    """
    from quant_eval import pipeline, suite

    small = checkpoint is None or pipeline.is_small(checkpoint)
    settings = suite.SMOKE if smoke else suite.default_settings(is_small=small)
    settings = replace(settings, needles=tuple(needles or ()))
    if (tasks or needles or checkpoint is None) and not smoke:
        settings = replace(settings, max_tokens=BENCHMARK_MAX_TOKENS, task_seconds=UNLIMITED_S)
    return replace(settings, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
