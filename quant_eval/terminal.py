"""What the commands show: bars on stderr, tables on stdout."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from quant_eval.pipeline import Progress

TABLE_WIDTH = 132  # where stdout is no terminal
LOOK_BACK_S = 3600  # for the time left: a layer of a large model takes minutes


@contextmanager
def progress(console: "Console") -> "Iterator[Progress]":
    """One bar a stage; where nobody watches, one line a stage when it begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bars = Bars(
        *columns,
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=LOOK_BACK_S,
    )
    tasks = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
            if not console.is_terminal:
                console.print(f"{stage}: {total:,}")
        bars.update(tasks[stage], completed=done)

    with bars:
        yield show


def hush_engines() -> None:
    """Keep llama.cpp's log of loading from between our lines."""
    logging.getLogger("qwq_local.llama").setLevel(logging.ERROR)


def stderr_console(*, quiet: bool) -> "Console":
    """For progress and plans."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False)


def stdout_console() -> "Console":
    """For results; wide where it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=TABLE_WIDTH)
