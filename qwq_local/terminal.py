"""Replies in a terminal: answers on stdout, all else on stderr."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Literal, TextIO

import typer

from qwq_local.reply import Answer, Done, Event, Notice, Reasoning, ToolCall

if TYPE_CHECKING:
    from rich.markdown import Markdown

    from qwq_local.memory_plan import MemoryPlan

Thought = Literal["dimmed", "folded", "hidden"]
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_LINE_S = 0.2  # between two updates of a line
_PATIENCE_S = 1.0  # what is over sooner needs no progress shown


def print_reply(
    events: Iterator[Event], *, thought: Thought, figures: bool, markdown: bool = False
) -> None:
    """Write a reply as it comes; its thought, notices and figures go to stderr.

    thought: how the thought is shown. figures: whether counts and speed are, at the end. markdown:
    whether the answer is laid out, for a terminal.
    """
    answered = False
    thoughts, answers = ThoughtPrinter(thought), AnswerPrinter(markdown=markdown)
    with ExitStack() as at_the_end:
        at_the_end.callback(answers.end)
        at_the_end.callback(thoughts.end)
        for event in events:
            if not isinstance(event, Reasoning):
                thoughts.end()
            match event:
                case Reasoning(text):
                    thoughts.feed(text)
                case Answer(text):
                    answers.feed(text)
                    answered = True
                case ToolCall(name=name, arguments=arguments):
                    note(_shown(f"calls {name}({arguments})", sys.stderr), dim=False)
                case Notice(text=text):
                    note(text)
                case Done():
                    answers.end()
                    if answered and not markdown:
                        typer.echo()
                    _print_end(event, figures=figures)


def note(text: str, *, dim: bool = True) -> None:
    """One line on stderr about what is going on."""
    typer.secho(text, dim=dim, err=True)


def plan_lines(memory: MemoryPlan) -> Iterator[str]:
    """What a model takes of each device."""
    from convert.files import format_nbytes

    yield (
        f"{memory.context:,} tokens, kv_cache in {memory.kv_type}, batches of {memory.batch}, "
        f"{memory.n_gpu_layers} layers on GPUs"
    )
    for share in memory.shares:
        yield (
            f"  {share.device.name}: weights {format_nbytes(share.weights_nbytes)}, kv_cache "
            f"{format_nbytes(share.kv_nbytes)}, compute {format_nbytes(share.compute_nbytes)}"
        )


class ProgressLine:
    """How far something is, on a line of the terminal that is gone at the end; else nothing.

    It is told done and total, as an OnProgress.
    """

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._next_s = time.monotonic() + _PATIENCE_S if sys.stderr.isatty() else math.inf
        self._is_shown = False

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _LINE_S
        self._is_shown = True
        line = f"\r\x1b[K{self._verb}: {100 * done // max(total, 1)} %"
        typer.secho(line, dim=True, err=True, nl=False)

    def before(self, events: Iterator[Event]) -> Iterator[Event]:
        """The events, each without the line."""
        with closing(self):
            for event in events:
                self.close()
                yield event

    def close(self) -> None:
        if self._is_shown:
            typer.echo("\r\x1b[K", err=True, nl=False)
            self._is_shown = False


class ThoughtPrinter:
    """A thought as it comes, or one line with its length and time."""

    def __init__(self, thought: Thought) -> None:
        self._thought = thought
        self._is_terminal = sys.stderr.isatty()
        self._began_s: float | None = None
        self._shown_s = 0.0
        self._n_pieces = 0

    def feed(self, text: str) -> None:
        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s = now_s
        self._n_pieces += 1
        if self._thought == "dimmed":
            typer.secho(_shown(text, sys.stderr), dim=True, nl=False, err=True)
        elif self._thought == "folded" and self._is_terminal and now_s - self._shown_s > _LINE_S:
            self._shown_s = now_s
            self._show("thinking")

    def end(self) -> None:
        if self._began_s is None:
            return
        if self._thought == "dimmed":
            typer.echo("\n", err=True)
        elif self._thought == "folded":
            self._show("thought", last=True)
        self._began_s = None
        self._n_pieces = 0

    def _show(self, verb: str, *, last: bool = False) -> None:
        assert self._began_s is not None
        start = "\r\x1b[K" if self._is_terminal else ""
        elapsed_s = time.monotonic() - self._began_s
        line = f"{start}{verb} for {elapsed_s:.1f} s, about {self._n_pieces:,} tokens"
        typer.secho(line, dim=True, err=True, nl=last)


class AnswerPrinter:
    """An answer as it comes: its text, or its Markdown laid out block by block."""

    def __init__(self, *, markdown: bool) -> None:
        self._text = ""
        self._live = None
        if markdown:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=sys.stdout)
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def feed(self, text: str) -> None:
        text = _shown(text, sys.stdout)
        if self._live is None:
            typer.echo(text, nl=False)
            sys.stdout.flush()
            return
        self._live.start()
        self._text += text
        done, self._text = split_blocks(self._text)
        if done:
            self._live.console.print(_markdown(done))
        self._live.update(_markdown(self._text), refresh=True)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            if self._text:
                self._live.console.print(_markdown(self._text))
            self._text = ""


def split_blocks(text: str) -> tuple[str, str]:
    """Markdown that nothing which follows can change, and the rest."""
    fenced, cut, end = False, 0, 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and line == "\n":
            cut = end
    return text[:cut], text[cut:]


def _markdown(text: str) -> Markdown:
    from rich.markdown import Markdown

    return Markdown(text, hyperlinks=False)


def _print_end(done: Done, *, figures: bool) -> None:
    usage, timings = done.usage, done.timings
    if done.finish_reason == "length":
        note(
            f"the reply was cut after {usage.completion_tokens:,} tokens; "
            "raise --max-tokens or --context"
        )
    if figures:
        speed = timings.tokens_per_s
        note(
            f"{usage.prompt_tokens:,} tokens in ({timings.n_cached:,} cached, "
            f"{timings.prefill_s:.2f} s), {usage.completion_tokens:,} out "
            f"({usage.reasoning_tokens:,} of them thought"
            + (f", {speed:.1f} tokens/s)" if speed is not None else ")")
        )


def _shown(text: str, stream: TextIO) -> str:
    """What a terminal may see: a model's control characters are none of its business."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if stream.isatty() else text
