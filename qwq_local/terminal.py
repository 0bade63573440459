"""Replies and conversations in a terminal: answers on stdout, all else on stderr."""

import re
import sys
from collections.abc import Iterator
from typing import TextIO

import typer

from convert.errors import QwqError
from qwq_local.model import QwQ
from qwq_local.reply import Answer, Done, Event, Notice, Reasoning, ToolCall
from qwq_local.sampling import Sampling

CHAT_HELP = """\
/help            this list
/system TEXT     start anew with this system prompt
/clear           start anew
/exit            leave, as does Ctrl-D
Ctrl-C stops a reply; the conversation goes on as if it had not been asked for."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def print_reply(events: Iterator[Event], *, thought: bool, figures: bool) -> None:
    """Write a reply as it comes; its thought, notices and figures go to stderr.

    thought: whether the thought is shown. figures: whether counts and speed are, at the end.
    """
    answered = thinking = False
    for event in events:
        if thinking and not isinstance(event, Reasoning):
            typer.echo("\n", err=True)
            thinking = False
        match event:
            case Reasoning(text):
                if thought:
                    typer.secho(_shown(text, sys.stderr), dim=True, nl=False, err=True)
                    thinking = True
            case Answer(text):
                typer.echo(_shown(text, sys.stdout), nl=False)
                sys.stdout.flush()
                answered = True
            case ToolCall(name=name, arguments=arguments):
                typer.echo(f"calls {name}({arguments})", err=True)
            case Notice(text=text):
                note(text)
            case Done():
                if answered:
                    typer.echo()
                _print_end(event, figures=figures)


def note(text: str) -> None:
    """One line on stderr about what is going on."""
    typer.secho(text, dim=True, err=True)


def chat(qwq: QwQ, *, system: str | None, sampling: Sampling, seed: int | None) -> None:
    """Converse until the input ends."""
    _enable_line_editing()
    note(f"{qwq.name}; /help lists the commands")
    session = qwq.session(system=system, sampling=sampling, seed=seed)
    while (line := _read_line()) is not None:
        command, _, argument = line.strip().partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/help":
                note(CHAT_HELP)
            case "/clear" | "/system":
                system = argument.strip() or None if command == "/system" else system
                session = qwq.session(system=system, sampling=sampling, seed=seed)
                note("a new conversation")
            case _ if command.startswith("/"):
                note(f"{command}: no such command; /help lists them")
            case _:
                try:
                    print_reply(session.send(line), thought=True, figures=False)
                except KeyboardInterrupt:
                    note("\nstopped")
                except QwqError as error:
                    note(f"error: {error}")


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


def _read_line() -> str | None:
    """The next line, "" where Ctrl-C took it back, None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        typer.echo()
        return ""


def _shown(text: str, stream: TextIO) -> str:
    """What a terminal may see: a model's control characters are none of its business."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if stream.isatty() else text


def _enable_line_editing() -> None:
    """Let input() have history and editing, where the platform has them."""
    try:
        import readline  # noqa: F401 - importing it is what enables it
    except ImportError:
        return
