"""What a terminal gets to see."""

import io
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from convert.errors import EngineError
from qwq_local import Answer, Done, Notice, Reasoning, Timings, ToolCall, Usage
from qwq_local.reply import Event
from qwq_local.terminal import ProgressLine, print_reply, split_blocks

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


def plain(err: io.StringIO) -> str:
    """Without what makes it dim."""
    return re.sub(r"\x1b\[\d+m", "", err.getvalue())


def test_streams_are_kept_apart(capsys: pytest.CaptureFixture[str]) -> None:
    print_reply(iter(EVENTS), thought="dimmed", figures=True)
    out, err = capsys.readouterr()
    assert out == "Yes\x07\nindeed\n"
    for part in ("Hm", "watch out", "calls add({'a': 1})", "cut after 4 tokens", "2.0 tokens/s"):
        assert part in err
    print_reply(iter(EVENTS), thought="hidden", figures=False)
    out, err = capsys.readouterr()
    assert out == "Yes\x07\nindeed\n"
    assert "Hm" not in err
    assert "tokens/s" not in err


def test_a_model_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch escape sequences in a reply that clear the screen or worse."""
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    print_reply(iter(EVENTS), thought="dimmed", figures=False)
    assert out.getvalue() == "Yes\ufffd\nindeed\n"
    assert "Hm\ufffd[2J" in err.getvalue()


def test_a_folded_thought_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_reply(iter(EVENTS), thought="folded", figures=False)
    out, err = capsys.readouterr()
    assert out == "Yes\x07\nindeed\n"
    assert "Hm" not in err
    assert "thought for 0.0 s, about 1 tokens\n" in err


def test_markdown_is_laid_out_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, once, however it was cut, and with no control character of the model's."""
    text = "# Title\n\n1. *one*\n\n2. two\n\n```\na\n\nb\n```\n\n| x |\n|---|\n| y\x1b[2J |\n"
    for n_cut in (1, 3, len(text)):
        out = Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("TERM", "dumb")
        pieces = [Answer(text[i : i + n_cut]) for i in range(0, len(text), n_cut)]
        print_reply(iter([*pieces, EVENTS[-1]]), thought="hidden", figures=False, markdown=True)
        shown = out.getvalue()
        for part in ("Title", "1 ", "one", "2 ", "two", "a", "b", "y\ufffd[2J"):
            assert part in shown, (part, shown)
        assert "*" not in shown
        assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\n\ntwo", "one\n\n"),
        ("```\none\n\ntwo", ""),
        ("```\none\n\n```\n\n", "```\none\n\n```\n\n"),
    ],
)
def test_only_whole_blocks_are_done(text: str, done: str) -> None:
    assert split_blocks(text) == (done, text[len(done) :])


def test_progress_is_one_line_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a line for what is over at once, one in a file, and one that stays."""
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for err in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", err)
        now_s = 0.0
        with closing(ProgressLine("loading")) as line:
            line(1, 8)
            assert not err.getvalue()
            for n_done in range(2, 8):
                now_s += 0.6
                line(n_done, 8)
        shown = "".join(f"\r\x1b[Kloading: {n} %" for n in (37, 50, 62, 75, 87)) + "\r\x1b[K"
        assert plain(err) == (shown if err.isatty() else "")


def test_progress_goes_before_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a reply that is written behind the progress of its prompt."""
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr("qwq_local.terminal._PATIENCE_S", -1.0)
    line = ProgressLine("reading")

    def reply() -> Iterator[Event]:
        line(1, 4)
        yield Notice("kind", "watch out")
        raise EngineError("it died")

    with pytest.raises(EngineError):
        print_reply(line.before(reply()), thought="dimmed", figures=False)
    assert plain(err) == "\r\x1b[Kreading: 25 %\r\x1b[Kwatch out\n"
