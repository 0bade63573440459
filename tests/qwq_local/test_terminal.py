"""What a terminal gets to see."""

import io
import sys

import pytest

from qwq_local import Answer, Done, Notice, Reasoning, Timings, ToolCall, Usage
from qwq_local.reply import Event
from qwq_local.terminal import print_reply

EVENTS: list[Event] = [
    Reasoning("Hm\x1b[2J"),
    Notice("kind", "watch out"),
    Answer("Yes\x07\n"),
    Answer("indeed"),
    ToolCall("1", "add", {"a": 1}),
    Done("length", Usage(5, 4, 2), Timings(3, 2, 0.5, 4, 1.5)),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_streams_are_kept_apart(capsys: pytest.CaptureFixture[str]) -> None:
    print_reply(iter(EVENTS), thought=True, figures=True)
    out, err = capsys.readouterr()
    assert out == "Yes\x07\nindeed\n"
    for part in ("Hm", "watch out", "calls add({'a': 1})", "cut after 4 tokens", "2.0 tokens/s"):
        assert part in err
    print_reply(iter(EVENTS), thought=False, figures=False)
    out, err = capsys.readouterr()
    assert out == "Yes\x07\nindeed\n"
    assert "Hm" not in err
    assert "tokens/s" not in err


def test_a_model_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch escape sequences in a reply that clear the screen or worse."""
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    print_reply(iter(EVENTS), thought=True, figures=False)
    assert out.getvalue() == "Yes\ufffd\nindeed\n"
    assert "Hm\ufffd[2J" in err.getvalue()
