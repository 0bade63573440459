"""What a terminal gets to see."""

import io
import sys

import pytest

from qwq_local import Answer, Done, Notice, Reasoning, Timings, ToolCall, Usage
from qwq_local.reply import Event
from qwq_local.terminal import print_reply, split_blocks

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
